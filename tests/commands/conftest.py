"""The same write side on both logs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from adapters.memory.event_log import MemoryEventLog
from adapters.postgres.event_log import PostgresEventLog
from commands.bus import Bus
from domain.event_log import EventLog
from schemas.records import Records
from tests.commands.write_side import Owner, memory_records, rules, signed_up
from tests.peers.databases import new_database

Opened = Callable[[str], Awaitable[PostgresEventLog]]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Opens logs on a database and closes them at the end."""
    async with AsyncExitStack() as stack:

        async def open_log(dsn: str) -> PostgresEventLog:
            log = PostgresEventLog(dsn)
            await log.migrate()
            await log.open()
            stack.push_async_callback(log.close)
            return log

        yield open_log


@pytest.fixture(scope="session")
def shared_database_url(postgres_dsn: str) -> Iterator[str]:
    """A database for many tests, each with tenants of its own: making one takes longer than most of them."""
    with new_database(postgres_dsn) as url:
        yield url


@pytest.fixture
async def postgres_log(shared_database_url: str, opened: Opened) -> PostgresEventLog:
    return await opened(shared_database_url)


@pytest.fixture(params=["memory", "postgres"])
def log(request: pytest.FixtureRequest) -> EventLog:
    if request.param == "memory":
        return MemoryEventLog()
    postgres: EventLog = request.getfixturevalue("postgres_log")
    return postgres


@pytest.fixture
def records() -> Records:
    return memory_records()


@pytest.fixture
def bus(log: EventLog, records: Records) -> Bus:
    return Bus(log, records, rules())


@pytest.fixture
async def owner(bus: Bus) -> Owner:
    return await signed_up(bus)
