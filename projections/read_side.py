"""How queries reach Postgres: bounded in time, rows as dataclasses, one named error for trouble with the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, LiteralString, Protocol, TypeVar
from uuid import UUID

import psycopg
from psycopg.rows import AsyncRowFactory, class_row, tuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

Connection = psycopg.AsyncConnection[Any]
Pool = AsyncConnectionPool[Any]
Deadline = Callable[[Connection, float], AbstractContextManager[None]]
RowT = TypeVar("RowT")

QUERY_S = 1.5  # what one query may take, connecting included; a server whose database is gone says so in two seconds
PAGE_MAX = 1_000  # rows of one page, whoever asks
After = tuple[datetime, UUID]  # the sort key of the last row seen
NEWEST: After = (datetime.max.replace(tzinfo=UTC), UUID(int=2**128 - 1))
NEWEST_POSITION = 2**63 - 1


class ReadSideUnavailable(Exception):
    """The read models cannot be reached now, or did not answer in time."""


class CaughtUp(Protocol):
    """Waits until the read models show an event; False when they did not within `timeout_s`."""

    async def __call__(self, shard: int, position: int, timeout_s: float = 2.0) -> bool: ...


class ReadSide:
    """What queries are given. `deadline` cuts a connection that takes too long."""

    def __init__(self, pool: Pool, deadline: Deadline, caught_up: CaughtUp) -> None:
        self._pool, self._deadline, self._caught_up = pool, deadline, caught_up

    async def caught_up(self, shard: int, position: int, timeout_s: float = 2.0) -> bool:
        """Wait until the read models show the event at this position. False when they did not in time."""
        return await self._caught_up(shard, position, timeout_s)

    async def all(
        self, row_class: type[RowT], query: LiteralString, arguments: Mapping[str, Any]
    ) -> list[RowT]:
        """The rows of a query; its columns are named like the fields of `row_class`."""
        return await self._fetch(class_row(row_class), query, arguments)

    async def one(
        self, row_class: type[RowT], query: LiteralString, arguments: Mapping[str, Any]
    ) -> RowT | None:
        """The first row of a query, if it has any."""
        found = await self.all(row_class, query, arguments)
        return found[0] if found else None

    async def rows(self, query: LiteralString, arguments: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The rows of a query as tuples."""
        return await self._fetch(tuple_row, query, arguments)

    @asynccontextmanager
    async def snapshot(self, limit_s: float) -> AsyncIterator[Connection]:
        """A connection that sees one instant of the whole database, for work that may take up to `limit_s`.

        What it writes (temporary tables, say) is undone at the end.
        """
        try:
            async with self._pool.connection(timeout=QUERY_S) as connection:
                with self._deadline(connection, limit_s):
                    async with connection.transaction(force_rollback=True):
                        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                        await connection.execute("SET LOCAL statement_timeout = 0")
                        yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, OSError) as failure:
            raise ReadSideUnavailable(str(failure)) from failure

    async def _fetch(
        self, row_factory: AsyncRowFactory[RowT], query: LiteralString, arguments: Mapping[str, Any]
    ) -> list[RowT]:
        """Ask; once more when the connection turns out to be dead, as all are after a restart of the database."""
        try:
            try:
                return await self._ask(row_factory, query, arguments)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                async with asyncio.timeout(QUERY_S):
                    await self._pool.check()
                return await self._ask(row_factory, query, arguments)
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, OSError) as failure:
            raise ReadSideUnavailable(str(failure)) from failure

    async def _ask(
        self, row_factory: AsyncRowFactory[RowT], query: LiteralString, arguments: Mapping[str, Any]
    ) -> list[RowT]:
        async with self._pool.connection(timeout=QUERY_S) as connection:
            with self._deadline(connection, QUERY_S):
                cursor: psycopg.AsyncCursor[RowT] = connection.cursor(row_factory=row_factory)
                await cursor.execute(query, arguments)
                return await cursor.fetchall()


def page(limit: int, after: After | None) -> dict[str, Any]:
    """Arguments of a query that is ordered by (created_at, id) descending."""
    after_at, after_id = after or NEWEST
    return {"limit": max(1, min(limit, PAGE_MAX)), "after_at": after_at, "after_id": after_id}
