"""Telling other processes that the log has grown: after the commit, never in it, and nothing depends on its arrival.

Hints (`schemas.hints`) that could not be sent at once become one; those that are lost are made up for by whoever looks at
the log by itself, a little later. Every listener of the database wakes for each, so only those listen who are in a hurry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg

from adapters.postgres.pool import connect, deadline
from schemas.hints import Hint, News, read, written
from schemas.records import AnyRecord

log_of = logging.getLogger(__name__)

CHANNEL = "oshaani_log"
TELL_S = 2.0  # what sending one may take before its connection is cut
PAUSE_S = 1.0  # after the database failed
CHECK_S = 5.0  # a silent connection is tried this often, so that a dead one is noticed
# The transaction of a NOTIFY needs no disk: what it tells of is durable already.
_PLANS = "-c synchronous_commit=off"

OUTAGE = (psycopg.Error, OSError, TimeoutError)


class Hints:
    """Sends and receives hints. `run` it as one task for the life of the process."""

    def __init__(self, dsn: str, channel: str = CHANNEL) -> None:
        self._dsn, self._channel = dsn, channel
        self._news, self._told = News(), asyncio.Event()
        self._listeners: list[Callable[[Hint], None]] = []

    def tell(self, records: Sequence[AnyRecord]) -> None:
        """Say soon that these are committed. Never blocks."""
        self._news.add(records)
        self._told.set()

    def on_hint(self, listener: Callable[[Hint], None]) -> None:
        """Have a function called with each hint; also with this process's own."""
        self._listeners.append(listener)

    async def run(self, *, sends: bool = True) -> None:
        """Send and receive until cancelled; survives any outage of the database."""
        async with asyncio.TaskGroup() as group:
            if sends:
                group.create_task(self._insist(self._send))
            if self._listeners:
                group.create_task(self._insist(self._receive))

    async def _insist(self, work: Callable[[psycopg.AsyncConnection[Any]], Any]) -> None:
        while True:
            try:
                connection = await connect(self._dsn, _PLANS)
                async with connection:
                    await work(connection)
            except OUTAGE as failure:
                log_of.info("hints wait for the database: %r", failure)
            await asyncio.sleep(PAUSE_S)

    async def _send(self, connection: psycopg.AsyncConnection[Any]) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await self._told.wait()
            self._told.clear()
            hint = self._news.take()
            with deadline(connection, TELL_S):
                if hint is not None:
                    await connection.execute("SELECT pg_notify(%s, %s)", (self._channel, written(hint)))
                else:
                    await connection.execute("SELECT 1")

    async def _receive(self, connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute(f"LISTEN {self._channel}".encode())
        while True:
            async for notify in connection.notifies(timeout=CHECK_S):
                hint = read(notify.payload)
                if hint is not None:
                    for listener in self._listeners:
                        listener(hint)
            with deadline(connection, TELL_S):
                await connection.execute("SELECT 1")
