"""Parked streams in PostgreSQL: one row for each that waits, and one for each record that was left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from adapters.postgres.pool import deadline
from domain.event_log import LogUnavailable
from domain.parked import ERROR_CHARS_MAX, Asked, NotParked, ParkedStream, Skipped, Stuck, check_ask

TABLES = """
CREATE TABLE IF NOT EXISTS parked_record (
    processor      text        NOT NULL,
    stream_id      uuid        NOT NULL,
    tenant_id      uuid,                      -- NULL when the record did not even say whose it is
    shard          smallint    NOT NULL,
    position       bigint      NOT NULL,      -- of the record that the stream stands at; 0 when that is not known
    stream_version integer     NOT NULL,      -- the same record's; 0 when that is not known
    type           text        NOT NULL,
    error          text        NOT NULL,
    parked_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    asked          text        CHECK (asked IN ('retry', 'skip')),
    asked_by       text,
    asked_reason   text,
    asked_at       timestamptz,
    PRIMARY KEY (processor, stream_id)
);
CREATE INDEX IF NOT EXISTS parked_record_by_ask ON parked_record (processor, asked_at) WHERE asked IS NOT NULL;
CREATE TABLE IF NOT EXISTS skipped_record (
    id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    processor      text        NOT NULL,      -- or projection
    stream_id      uuid        NOT NULL,
    shard          smallint    NOT NULL,
    position       bigint      NOT NULL,
    stream_version integer     NOT NULL,
    type           text        NOT NULL,
    error          text        NOT NULL,
    skipped_by     text        NOT NULL,
    reason         text        NOT NULL,
    skipped_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

CALL_S: Final = 4.0
_PARKED = """
    SELECT processor, stream_id, tenant_id, shard, position, stream_version, type, error, parked_at,
           asked, asked_by, asked_reason
      FROM parked_record
"""
_PARK = """
    INSERT INTO parked_record AS p (processor, stream_id, tenant_id, shard, position, stream_version, type, error)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
        ON CONFLICT (processor, stream_id) DO UPDATE
       SET shard = excluded.shard, position = excluded.position, stream_version = excluded.stream_version,
           type = excluded.type, error = excluded.error
     WHERE excluded.position <= p.position
"""
_ASK = """
    UPDATE parked_record SET asked = %s, asked_by = %s, asked_reason = %s, asked_at = clock_timestamp()
     WHERE processor = %s AND stream_id = %s
"""
_PARK_AGAIN = """
    UPDATE parked_record
       SET shard = %s, position = %s, stream_version = %s, type = %s, error = %s, parked_at = clock_timestamp(),
           asked = NULL, asked_by = NULL, asked_reason = NULL, asked_at = NULL
     WHERE processor = %s AND stream_id = %s
    RETURNING 1
"""
_UNPARK = "DELETE FROM parked_record WHERE processor = %s AND stream_id = %s RETURNING 1"
_NOTE = """
    INSERT INTO skipped_record
           (processor, stream_id, shard, position, stream_version, type, error, skipped_by, reason)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_SKIPPED = """
    SELECT processor, stream_id, shard, position, stream_version, type, error, skipped_by, reason, skipped_at
      FROM skipped_record ORDER BY skipped_at DESC, id DESC LIMIT %s
"""


class PostgresParkedRecords:
    """Implements `domain.parked.ParkedRecords`."""

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool

    async def park(self, processor: str, stream_id: UUID, tenant_id: UUID | None, stuck: Stuck) -> None:
        async with self._connection() as connection:
            await connection.execute(_PARK, [processor, stream_id, tenant_id, *_columns(stuck)])

    async def waiting(self, processor: str) -> set[UUID]:
        rows = await self._fetch("SELECT stream_id FROM parked_record WHERE processor = %s", [processor])
        return {row[0] for row in rows}

    async def waits(self, processor: str, stream_id: UUID) -> bool:
        query = "SELECT 1 FROM parked_record WHERE processor = %s AND stream_id = %s"
        return bool(await self._fetch(query, [processor, stream_id]))

    async def streams(self, limit: int = 1_000) -> list[ParkedStream]:
        query = f"{_PARKED} ORDER BY parked_at, processor, stream_id LIMIT %s"
        return [_parked(row) for row in await self._fetch(query, [limit])]

    async def ask(self, processor: str, stream_id: UUID, asked: Asked) -> ParkedStream:
        check_ask(asked)
        arguments = [asked.what, asked.by, asked.reason, processor, stream_id]
        columns = _PARKED.partition("FROM")[0].replace("SELECT", "RETURNING")
        rows = await self._fetch(f"{_ASK} {columns}", arguments)
        if not rows:
            raise NotParked(f"stream {stream_id} of processor {processor!r}")
        return _parked(rows[0])

    async def asked(self, processor: str, limit: int = 100) -> list[ParkedStream]:
        query = f"{_PARKED} WHERE processor = %s AND asked IS NOT NULL ORDER BY asked_at LIMIT %s"
        return [_parked(row) for row in await self._fetch(query, [processor, limit])]

    async def carried_out(self, parked: ParkedStream, stuck: Stuck | None) -> None:
        key = [parked.processor, parked.stream_id]
        asked = parked.asked
        async with self._connection() as connection, connection.transaction():
            if stuck is None:
                cursor = await connection.execute(_UNPARK, key)
            else:
                cursor = await connection.execute(_PARK_AGAIN, [*_columns(stuck), *key])
            held = await cursor.fetchone() is not None
            if held and asked is not None and asked.what == "skip" and parked.stuck.position:
                await connection.execute(_NOTE, [*key, *_columns(parked.stuck), asked.by, asked.reason])

    async def note_skip(self, skipped: Sequence[Skipped]) -> None:
        async with self._connection() as connection, connection.transaction():
            for each in skipped:
                await connection.execute(
                    _NOTE, [each.processor, each.stream_id, *_columns(each.stuck), each.by, each.reason]
                )

    async def skipped(self, limit: int = 1_000) -> list[Skipped]:
        rows = await self._fetch(_SKIPPED, [limit])
        return [Skipped(row[0], row[1], Stuck(*row[2:7]), *row[7:]) for row in rows]

    async def _fetch(self, query: str, arguments: Sequence[Any]) -> list[Any]:
        async with self._connection() as connection:
            cursor = await connection.execute(query.encode(), arguments)
            return await cursor.fetchall()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        try:
            async with asyncio.timeout(CALL_S), self._pool.connection(timeout=CALL_S) as connection:
                with deadline(connection, CALL_S):
                    yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, OSError) as failure:
            raise LogUnavailable(f"the parked streams cannot be reached: {failure}") from failure


def _columns(stuck: Stuck) -> tuple[Any, ...]:
    # Postgres takes no NUL in a text.
    error = stuck.error.replace("\0", "\ufffd")[:ERROR_CHARS_MAX]
    return stuck.shard, stuck.position, stuck.stream_version, stuck.type.replace("\0", "\ufffd"), error


def _parked(row: Any) -> ParkedStream:
    processor, stream_id, tenant_id, *stuck, parked_at, what, by, reason = row
    asked = None if what is None else Asked(what, by, reason)
    return ParkedStream(processor, stream_id, tenant_id, Stuck(*stuck), parked_at, asked)
