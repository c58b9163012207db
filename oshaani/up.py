"""`oshaani up`: database, API, processors and read models in one process, until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import uvicorn

from oshaani.settings import Settings
from oshaani.wiring import Platform, core_of, database, migrate, platform

log_of = logging.getLogger(__name__)

DRAIN_S = 6.0  # what running model and tool calls get after SIGTERM; whoever starts next takes over the rest
READ_MODELS_S = 8.0  # what building read models may delay the start
STREAMS_S = 2  # what open HTTP streams get


class PortTaken(Exception):
    """Somebody else listens on our port."""


async def up(settings: Settings, announce: Callable[[Settings], None]) -> None:
    """Run everything until SIGTERM or SIGINT. `announce` is called when the first request can be served.

    Raises:
        PortTaken: the port is in use.
        adapters.postgres.data_folder.DataFolderUnusable and kin: the data folder cannot be used.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with listening(settings) as listener:
        async with database(settings) as dsn:
            await migrate(dsn)
            async with core_of(settings, dsn) as core, platform(core) as running, served(running, listener):
                _quieten_collector()
                announce(settings)
                await stop.wait()
                log_of.info("stopping")


@asynccontextmanager
async def served(running: Platform, listener: socket.socket) -> AsyncIterator[None]:
    """Everything at work while the block runs: read models first, then processors, then HTTP."""
    core = running.core
    async with AsyncExitStack() as stack:
        tasks = [
            asyncio.create_task(core.projector.run(), name="projector"),
            asyncio.create_task(running.host.run(), name="processors"),
            asyncio.create_task(running.sweeper.beat(), name="heartbeat"),
            asyncio.create_task(running.sweeper.run(), name="sweeper"),
        ]
        stack.push_async_callback(_cancel, tasks)
        if not await core.projector.ready(READ_MODELS_S):
            log_of.warning("the read models are still being built; /readyz says when they are there")
        server = _Http(
            uvicorn.Config(
                running.app,
                http="httptools",
                log_config=None,
                access_log=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=STREAMS_S,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                date_header=True,
            )
        )
        http = asyncio.create_task(server.serve(sockets=[listener]), name="http")
        stack.push_async_callback(_stop_http, server, http)
        while not server.started:
            if http.done():
                http.result()
            await asyncio.sleep(0.01)
        watch = asyncio.create_task(_die_with(tasks), name="watch")
        stack.push_async_callback(_cancel, [watch])
        yield
        log_of.info("no new requests; letting running calls finish")
        server.should_exit = True
        await running.work.drain(DRAIN_S)
        await core.bus.drain()
        await running.host.drain()


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The socket of the API, taken before anything else is started.

    Raises:
        PortTaken: somebody else has it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as failure:
            raise PortTaken(
                f"cannot listen on {settings.host}:{settings.port} ({failure.strerror}); "
                "stop what uses it or set OSHAANI_PORT to another port"
            ) from failure
        listener.listen(2048)
        listener.setblocking(False)
        yield listener


class _Http(uvicorn.Server):
    """Uvicorn without signal handlers of its own: signals end the whole platform, in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _stop_http(server: uvicorn.Server, http: asyncio.Task[None]) -> None:
    server.should_exit = True
    done, _ = await asyncio.wait({http}, timeout=STREAMS_S + 2)
    if not done:
        server.force_exit = True
        http.cancel()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=3)


async def _die_with(tasks: list[asyncio.Task[None]]) -> None:
    """A process that lost one of its parts must not look alive: end it, and whatever supervises it starts anew."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if not task.cancelled() and (failure := task.exception()) is not None:
            log_of.critical("%s ended", task.get_name(), exc_info=failure)
            signal.raise_signal(signal.SIGTERM)


def _quieten_collector() -> None:
    """What lives from here on lives long; look for garbage in what is young, and less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
