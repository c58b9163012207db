"""Waiting for the read models in a process that does not run them: the checkpoints tell."""

from __future__ import annotations

import asyncio

import psycopg
from psycopg_pool import PoolTimeout

from projections.read_side import Deadline, Pool

LOOK_FIRST_S, LOOK_MAX_S = 0.005, 0.05
LOOK_LIMIT_S = 1.0
_APPLIED = "SELECT min(positions[%s]) FROM checkpoint"


class CheckpointWatch:
    """Implements `CaughtUp` by looking at the checkpoints."""

    def __init__(self, pool: Pool, deadline: Deadline) -> None:
        self._pool, self._deadline = pool, deadline

    async def __call__(self, shard: int, position: int, timeout_s: float = 2.0) -> bool:
        look_s = LOOK_FIRST_S
        try:
            async with asyncio.timeout(timeout_s):
                while await self._applied(shard) < position:
                    await asyncio.sleep(look_s)
                    look_s = min(look_s * 2, LOOK_MAX_S)
        except (TimeoutError, psycopg.Error, PoolTimeout, OSError):
            return False
        return True

    async def _applied(self, shard: int) -> int:
        async with self._pool.connection(timeout=LOOK_LIMIT_S) as connection:
            with self._deadline(connection, LOOK_LIMIT_S):
                # Postgres counts the elements of an array from 1.
                row = await (await connection.execute(_APPLIED, (shard + 1,))).fetchone()
        return row[0] or 0 if row else 0
