"""`oshaani up`: database, API, processors and read models in one process, until a signal ends it."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from oshaani.process import Ending, http, listening, quieten_collector
from oshaani.role_metrics import watch_process
from oshaani.settings import Settings
from oshaani.store_metrics import StoreMetrics
from oshaani.wiring import Platform, core_of, database, migrate, platform

log_of = logging.getLogger(__name__)

DRAIN_S = 6.0  # what running model and tool calls get after SIGTERM; whoever starts next takes over the rest
READ_MODELS_S = 8.0  # what building read models may delay the start


async def up(settings: Settings, announce: Callable[[Settings], None]) -> None:
    """Run everything until SIGTERM or SIGINT. `announce` is called when the first request can be served.

    Raises:
        oshaani.process.PortTaken: the port is in use.
        oshaani.process.PartLost: something ended that should not have.
        adapters.postgres.data_folder.DataFolderUnusable and kin: the data folder cannot be used.
    """
    ending = Ending()
    with listening(settings.host, settings.port, "OSHAANI_PORT") as listener:
        async with database(settings) as dsn:
            await migrate(dsn)
            async with (
                core_of(settings, dsn) as core,
                platform(core) as running,
                served(running, listener, ending),
            ):
                quieten_collector()
                announce(settings)
                await ending.wait()
                log_of.info("stopping")
    ending.check()


@asynccontextmanager
async def served(running: Platform, listener: socket.socket, ending: Ending) -> AsyncIterator[None]:
    """Everything at work while the block runs: read models first, then processors, then HTTP."""
    core = running.core
    watch_process(running.server.metrics, "up")
    parts = {
        "database metrics": StoreMetrics(running.server.metrics).run(core.pool),
        "projector": core.projector.run(),
        "processors": running.host.run(),
        "heartbeat": running.sweeper.beat(),
        "sweeper": running.sweeper.run(),
    }
    async with ending.parts(parts):
        if not await core.projector.ready(READ_MODELS_S):
            log_of.warning("the read models are still being built; /readyz says when they are there")
        async with http(running.app, listener) as server:
            yield
            log_of.info("no new requests; letting running calls finish")
            server.should_exit = True
            await running.work.drain(DRAIN_S)
            await core.bus.drain()
            await running.host.drain()
