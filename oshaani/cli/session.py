"""How commands reach the database: the configured one, that of a running `oshaani up`, or an embedded one of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

from adapters.postgres.data_folder import DataFolderTaken
from adapters.postgres.embedded import embedded_postgres, running_dsn
from oshaani.cli import logs
from oshaani.cli.trouble import Failed
from oshaani.settings import Settings, read_settings

if TYPE_CHECKING:
    from oshaani.wiring import Core

STARTING_S = 20.0  # how long another process that holds the folder may take to have its database ready
LOOK_S = 0.1
CONNECT_S = 5

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work in an event loop, the fast one where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def quiet_settings() -> Settings:
    """The settings of a command that ends by itself; its log shows only what is wrong."""
    logs.set_up("warning")
    settings = read_settings()
    logs.set_up(settings.log_level if settings.log_level in ("error", "critical") else "warning")
    return settings


@asynccontextmanager
async def open_database(settings: Settings, *, may_create: bool = False) -> AsyncIterator[str]:
    """The URL of the database, which is served at least as long as the block runs.

    Raises:
        Failed: there is no database yet, and the command is not one that makes it.
        DataFolderTaken, DataFolderUnusable: see `embedded_postgres`.
    """
    if settings.database_url is not None:
        yield settings.database_url
        return
    if not may_create and not (settings.data_dir / "postgres").exists():
        raise Failed(
            f"there is no database in {str(settings.data_dir)!r} yet; start `oshaani up`, or set OSHAANI_DATA_DIR"
        )
    async with AsyncExitStack() as stack:
        yield await _embedded(settings, stack)


@asynccontextmanager
async def open_core(*, may_create: bool = False) -> AsyncIterator[Core]:
    """The write side and its surroundings for one command. Nothing works in the background."""
    from oshaani.wiring import core_of, migrate

    settings = quiet_settings()
    async with open_database(settings, may_create=may_create) as dsn:
        if not await is_migrated(dsn):
            if not may_create:
                raise Failed("the database is not set up; run `oshaani migrate`")
            await migrate(dsn)
        async with core_of(settings, dsn) as core:
            yield core


async def is_migrated(dsn: str) -> bool:
    """Whether the tables of the log are there.

    Raises:
        psycopg.OperationalError: the database cannot be reached.
    """
    async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=CONNECT_S) as connection:
        cursor = await connection.execute("SELECT to_regclass('oshaani.event') IS NOT NULL")
        row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def check_read_models(core: Core) -> None:
    """Refuse to go on without the tables of the read models.

    Raises:
        Failed: they are not there.
    """
    async with core.pool.connection() as connection:
        cursor = await connection.execute("SELECT to_regclass('oshaani.credit_hold') IS NOT NULL")
        row = await cursor.fetchone()
    if row is None or not row[0]:
        raise Failed("the read models are not built yet; start `oshaani up` once")


async def _embedded(settings: Settings, stack: AsyncExitStack) -> str:
    """The database of whoever runs on the data folder; without such a one, our own until the stack ends."""
    if (dsn := running_dsn(settings.data_dir)) is not None:
        return dsn
    try:
        return await stack.enter_async_context(embedded_postgres(settings.data_dir))
    except DataFolderTaken as taken:
        return await _started_by_another(settings, taken)


async def _started_by_another(settings: Settings, taken: DataFolderTaken) -> str:
    """The holder of the folder has not finished starting; it will be ready soon, or never."""
    until_s = time.monotonic() + STARTING_S
    while time.monotonic() < until_s:
        if (dsn := running_dsn(settings.data_dir)) is not None:
            return dsn
        await asyncio.sleep(LOOK_S)
    raise taken
