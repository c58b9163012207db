"""Waiting for the read models in a process that does not run them: the checkpoints tell."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import psycopg
from psycopg_pool import PoolTimeout

from projections.catalogue import PROJECTIONS
from projections.read_side import Deadline, Pool

LOOK_FIRST_S, LOOK_MAX_S = 0.005, 0.05
LOOK_LIMIT_S = 1.0
AWAITED = "oshaani_awaited"  # the channel on which whoever waits tells the projector not to wait for company
VERSIONS = {projection.name: projection.version for projection in PROJECTIONS}
_APPLIED = "SELECT min(positions[%s]) FROM checkpoint"
# What is said need not be durable.
_HURRY = "SELECT set_config('synchronous_commit', 'off', true), pg_notify(%s, '')"
_CHECKPOINTS = "SELECT projection, version, positions FROM checkpoint"


class CheckpointWatch:
    """Implements `CaughtUp` by looking at the checkpoints."""

    def __init__(self, pool: Pool, deadline: Deadline) -> None:
        self._pool, self._deadline = pool, deadline

    async def __call__(self, shard: int, position: int, timeout_s: float = 2.0) -> bool:
        look_s = LOOK_FIRST_S
        try:
            async with asyncio.timeout(timeout_s):
                if await self._applied(shard) >= position:
                    return True
                await self._hurry()
                while await self._applied(shard) < position:
                    await asyncio.sleep(look_s)
                    look_s = min(look_s * 2, LOOK_MAX_S)
        except (TimeoutError, psycopg.Error, PoolTimeout, OSError):
            return False
        return True

    async def behind(self, heads: Mapping[int, int]) -> int | None:
        """How many events the projection that is furthest behind has not applied; None while some are not built.

        Raises:
            psycopg.Error, PoolTimeout, OSError: the database failed.
        """
        async with self._pool.connection(timeout=LOOK_LIMIT_S) as connection:
            with self._deadline(connection, LOOK_LIMIT_S):
                try:
                    rows = await (await connection.execute(_CHECKPOINTS)).fetchall()
                except psycopg.errors.UndefinedTable:
                    return None
        live = {name: positions for name, version, positions in rows if VERSIONS.get(name) == version}
        if len(live) < len(VERSIONS):
            return None
        lags: list[int] = [
            sum(max(0, head - positions[shard]) for shard, head in heads.items())
            for positions in live.values()
        ]
        return max(lags)

    async def _hurry(self) -> None:
        async with self._pool.connection(timeout=LOOK_LIMIT_S) as connection:
            with self._deadline(connection, LOOK_LIMIT_S):
                await connection.execute(_HURRY, (AWAITED,))

    async def _applied(self, shard: int) -> int:
        async with self._pool.connection(timeout=LOOK_LIMIT_S) as connection:
            with self._deadline(connection, LOOK_LIMIT_S):
                try:
                    # Postgres counts the elements of an array from 1.
                    row = await (await connection.execute(_APPLIED, (shard + 1,))).fetchone()
                except psycopg.errors.UndefinedTable:
                    return 0  # the projector has not begun yet
        return row[0] or 0 if row else 0
