"""Connections to Postgres: how they plan, how they are named, how long anything may take."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from adapters.postgres import arrays

SCHEMA = "oshaani"
CONNECT_S, STATEMENT_S = 5, 10
# A plan cached while a table was empty scans it for the connection's life; these keep every plan on its index.
LOG_PLANS = "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off"
READ_PLANS = "-c jit=off"


def options(plans: str) -> str:
    """Settings of a session: our schema, its planner, its limits."""
    limits = f"-c statement_timeout={STATEMENT_S * 1000} -c idle_in_transaction_session_timeout=15000"
    return f"-c search_path={SCHEMA} -c TimeZone=UTC {plans} {limits}"


async def connect(dsn: str, plans: str = LOG_PLANS) -> psycopg.AsyncConnection[Any]:
    """One connection in autocommit mode, ready for binary arrays; raises within `CONNECT_S`."""
    async with asyncio.timeout(CONNECT_S):
        connection = await psycopg.AsyncConnection.connect(
            dsn,
            autocommit=True,
            options=options(plans),
            connect_timeout=CONNECT_S,
            application_name="oshaani",
        )
    await configure(connection)
    return connection


async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
    """What every connection of ours needs to know."""
    connection.prepare_threshold = 0  # prepare at first use: every statement of ours comes again
    arrays.register(connection.adapters)


@asynccontextmanager
async def open_pool(dsn: str, size: int, plans: str = READ_PLANS) -> AsyncIterator[AsyncConnectionPool[Any]]:
    """A pool of `size` connections in autocommit mode, closed at the end."""
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        dsn,
        min_size=1,
        max_size=size,
        open=False,
        timeout=CONNECT_S,
        configure=configure,
        kwargs={
            "autocommit": True,
            "options": options(plans),
            "connect_timeout": CONNECT_S,
            "application_name": "oshaani",
        },
    )
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close(timeout=2)


@contextmanager
def deadline(connection: psycopg.AsyncConnection[Any], seconds: float = STATEMENT_S) -> Iterator[None]:
    """Cut the connection when the block takes longer, so that an await on a half-open one ends with an error.

    Neither statement_timeout nor cancelling the await is enough: both need the other side to answer.
    """
    timer = asyncio.get_running_loop().call_later(seconds, _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: psycopg.AsyncConnection[Any]) -> None:
    with suppress(OSError, psycopg.Error):
        twin = socket.socket(fileno=os.dup(connection.pgconn.socket))
        with twin:
            twin.shutdown(socket.SHUT_RDWR)
