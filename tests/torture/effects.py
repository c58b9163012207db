"""What the workers' handlers do, and what must be true of it in the end.

An effect is a row that can be there once, with a count in the same transaction: what is fenced cannot happen twice. Some
records also give credits by a command, fenced by the log itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from psycopg_pool import AsyncConnectionPool

TABLES: Final = """
CREATE TABLE IF NOT EXISTS effect (
    id     bigint  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,   -- in the order in which they happened
    stream integer NOT NULL,
    seq    integer NOT NULL,
    worker text    NOT NULL,
    UNIQUE (stream, seq)
);
CREATE TABLE IF NOT EXISTS tally (
    worker    text    PRIMARY KEY,
    done      integer NOT NULL,
    delivered integer NOT NULL,
    first_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""
BATCH_MAX: Final = 500
_HAPPEN: Final = """
    WITH given AS (
        SELECT * FROM unnest(%b::int[], %b::int[]) WITH ORDINALITY AS g(stream, seq, n)
    ), made AS (
        INSERT INTO effect (stream, seq, worker) SELECT stream, seq, %b FROM given ORDER BY n
            ON CONFLICT DO NOTHING RETURNING 1
    )
    INSERT INTO tally AS t (worker, done, delivered) VALUES (%b, (SELECT count(*) FROM made), (SELECT count(*) FROM given))
        ON CONFLICT (worker) DO UPDATE
       SET done = t.done + excluded.done, delivered = t.delivered + excluded.delivered
"""
_FOUND: Final = """
    SELECT (SELECT count(*) FROM effect),
           (SELECT count(*) FROM (SELECT seq - coalesce(lag(seq) OVER (PARTITION BY stream ORDER BY id), 0) AS step
                                    FROM effect) s WHERE step < 1),
           (SELECT coalesce(sum(done), 0) FROM tally),
           (SELECT coalesce(sum(delivered), 0) FROM tally)
"""


@dataclass(frozen=True, slots=True)
class Found:
    """`counted`: what the counts say happened; `delivered`: how often handlers came to their effect."""

    effects: int
    out_of_order: int
    counted: int
    delivered: int


class Effects:
    """The effects of one worker, many in one transaction."""

    def __init__(self, pool: AsyncConnectionPool[Any], worker: str) -> None:
        self._pool, self._worker = pool, worker
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()

    async def happen(self, stream: int, seq: int) -> None:
        """Returns when it has happened."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((stream, seq, done))
        self._wake.set()
        await done

    async def run(self) -> None:
        """Write what waits, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
                await self._write(batch)

    async def _write(self, batch: Sequence[tuple[int, int, asyncio.Future[None]]]) -> None:
        streams, seqs = [stream for stream, _, _ in batch], [seq for _, seq, _ in batch]
        async with self._pool.connection() as connection:
            await connection.execute(_HAPPEN, (streams, seqs, self._worker, self._worker))
        for _, _, done in batch:
            if not done.done():
                done.set_result(None)


async def found(pool: AsyncConnectionPool[Any]) -> Found:
    """What there is of effects."""
    async with pool.connection() as connection:
        cursor = await connection.execute(_FOUND)
        row = await cursor.fetchone()
    assert row is not None
    return Found(*map(int, row))


async def effects_so_far(pool: AsyncConnectionPool[Any]) -> int:
    """How many there are."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT coalesce(sum(done), 0) FROM tally")
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def workers_so_far(pool: AsyncConnectionPool[Any]) -> dict[str, datetime]:
    """The workers that had any, and since when."""
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT worker, first_at FROM tally")
        return dict(await cursor.fetchall())
