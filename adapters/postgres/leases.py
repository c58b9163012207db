"""Leases in PostgreSQL: a row for each name, kept for ever so that its epoch never goes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, LiteralString

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from adapters.postgres.arrays import bigints, smallints, texts
from adapters.postgres.pool import deadline
from domain.event_log import LogUnavailable
from domain.leases import Lease, Mark

TABLES = """
CREATE TABLE IF NOT EXISTS lease (
    name       text        PRIMARY KEY,
    holder     text        NOT NULL,               -- '' when it was given back
    epoch      bigint      NOT NULL,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 10);
-- How far the shards of the log have come on Kafka's topics.
CREATE TABLE IF NOT EXISTS relay_mark (
    topic       text     NOT NULL,
    shard       smallint NOT NULL,
    position    bigint   NOT NULL,
    next_offset bigint   NOT NULL,                 -- on the shard's partition, after the last record acknowledged
    began       bigint   NOT NULL,                 -- the position before the first event that was sent there
    PRIMARY KEY (topic, shard)
) WITH (fillfactor = 10);
"""

CALL_S: Final = 4.0
_TTL = "clock_timestamp() + make_interval(secs => %b)"
# Everything in the update sees the row as it is under its lock, the clock included.
_ACQUIRE = f"""
    INSERT INTO lease AS l VALUES (%b, %b, 1, {_TTL})
        ON CONFLICT (name) DO UPDATE
       SET holder = excluded.holder, expires_at = {_TTL},
           epoch = l.epoch + CASE WHEN l.holder = excluded.holder THEN 0 ELSE 1 END
     WHERE l.holder = excluded.holder OR l.expires_at <= clock_timestamp()
           OR (%b AND split_part(l.holder, '/', 1) = split_part(excluded.holder, '/', 1))
    RETURNING epoch
"""
_RELEASE = "UPDATE lease SET holder = '', expires_at = '-infinity' WHERE name = %b AND holder = %b"
_HELD = """
    SELECT name, holder, epoch, expires_at FROM lease WHERE holder <> '' AND expires_at > clock_timestamp()
     ORDER BY name
"""
_UPSERT = """
    INSERT INTO relay_mark SELECT m.* FROM unnest(%b, %b, %b, %b, %b) m, allowed
        ON CONFLICT (topic, shard) DO UPDATE
       SET position = excluded.position, next_offset = excluded.next_offset, began = excluded.began
"""
# Whoever acquires the lease meanwhile waits for this statement, and then finds what it saved.
_SAVE_MARKS = f"""
    WITH allowed AS (SELECT 1 FROM lease WHERE name = %b AND epoch = %b FOR SHARE), saved AS ({_UPSERT})
    SELECT count(*) FROM allowed
"""
_MARKS = "SELECT topic, shard, position, next_offset, began FROM relay_mark ORDER BY topic, shard"
_REWIND = f"""
    WITH allowed AS (
        INSERT INTO lease AS l VALUES (%b, '', 1, '-infinity')
            ON CONFLICT (name) DO UPDATE SET holder = '', epoch = l.epoch + 1, expires_at = '-infinity'
        RETURNING 1
    )
    {_UPSERT}
"""


class PostgresLeases:
    """Implements `domain.leases.Leases`."""

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool

    async def acquire(
        self, name: str, holder: str, ttl_s: float, *, from_earlier_life: bool = False
    ) -> int | None:
        ttl_s = float(ttl_s)
        rows = await self._fetch(_ACQUIRE, (name, holder, ttl_s, ttl_s, from_earlier_life))
        return int(rows[0][0]) if rows else None

    async def release(self, name: str, holder: str) -> None:
        async with self._connection() as connection:
            await connection.execute(_RELEASE, (name, holder))

    async def held(self) -> list[Lease]:
        return [Lease(*row) for row in await self._fetch(_HELD, ())]

    async def save_marks(self, name: str, epoch: int, marks: Collection[Mark]) -> bool:
        rows = await self._fetch(_SAVE_MARKS, (name, epoch, *_columns(marks)))
        return bool(rows[0][0])

    async def marks(self) -> list[Mark]:
        return [Mark(*row) for row in await self._fetch(_MARKS, ())]

    async def rewind(self, name: str, marks: Collection[Mark]) -> None:
        async with self._connection() as connection:
            await connection.execute(_REWIND, (name, *_columns(marks)))

    async def _fetch(self, query: LiteralString, arguments: Sequence[Any]) -> list[Any]:
        async with self._connection() as connection:
            cursor = await connection.execute(query, arguments, binary=True)
            return await cursor.fetchall()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        try:
            async with asyncio.timeout(CALL_S), self._pool.connection(timeout=CALL_S) as connection:
                with deadline(connection, CALL_S):
                    yield connection
        except (psycopg.Error, PoolTimeout, OSError) as failure:
            raise LogUnavailable(f"the leases cannot be reached: {failure}") from failure


def _columns(marks: Collection[Mark]) -> tuple[Any, ...]:
    return (
        texts([mark.topic for mark in marks]),
        smallints([mark.shard for mark in marks]),
        bigints([mark.position for mark in marks]),
        bigints([mark.next_offset for mark in marks]),
        bigints([mark.began for mark in marks]),
    )
