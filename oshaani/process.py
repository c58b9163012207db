"""What every long-running process of ours has: an end by signal, a port, parts that live and die together."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from oshaani.http_protocol import HttpProtocol

log_of = logging.getLogger(__name__)

SUPERVISED = "OSHAANI_SUPERVISED"  # set for processes that must not outlive the one that started them
PARENT_LOOK_S = 1.0
STREAMS_S = 2  # what open HTTP streams get at the end
CANCEL_S = 3.0
BACKGROUND_NICE = 15
AUTOGROUP = Path("/proc/self/autogroup")


class PortTaken(Exception):
    """Somebody else listens on our port."""


class PartLost(Exception):
    """A part of the process ended that should not have; whatever supervises the process starts it anew."""


class Ending:
    """When the process should end: a signal came, or one of its parts is lost."""

    def __init__(self) -> None:
        self._wanted = asyncio.Event()
        self.lost: BaseException | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._wanted.set)
        supervised = SUPERVISED in os.environ
        self._orphaned = asyncio.create_task(self._watch_parent(os.getppid())) if supervised else None

    async def wait(self) -> None:
        """Return when it is time to end."""
        await self._wanted.wait()

    def check(self) -> None:
        """Say, once all is ended in order, why.

        Raises:
            PartLost: a part had ended by itself.
        """
        if self.lost is not None:
            raise PartLost(repr(self.lost)) from self.lost

    @asynccontextmanager
    async def parts(self, parts: Mapping[str, Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
        """Run these until the block ends; one that ends before ends the process."""
        tasks = [asyncio.create_task(work, name=name) for name, work in parts.items()]
        for task in tasks:
            task.add_done_callback(self._part_ended)
        try:
            yield
        finally:
            for task in tasks:
                task.remove_done_callback(self._part_ended)
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_S)

    async def _watch_parent(self, pid: int) -> None:
        while os.getppid() == pid:  # noqa: ASYNC110 - nothing tells a child
            await asyncio.sleep(PARENT_LOOK_S)
        log_of.warning("the supervisor is gone; ending")
        self._wanted.set()

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        log_of.critical("%s ended", task.get_name(), exc_info=failure)
        self.lost = self.lost or failure or RuntimeError(f"{task.get_name()} ended")
        self._wanted.set()


@contextmanager
def listening(host: str, port: int, variable: str) -> Iterator[socket.socket]:
    """A socket that listens; `variable` is the setting that names the port.

    Raises:
        PortTaken: somebody else has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as failure:
            raise PortTaken(
                f"cannot listen on {host}:{port} ({failure.strerror}); "
                f"stop what uses it or set {variable} to another port"
            ) from failure
        listener.listen(2048)
        listener.setblocking(False)
        yield listener


class Http(uvicorn.Server):
    """Uvicorn without signal handlers of its own: signals end the whole process, in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def http(app: ASGIApp, listener: socket.socket) -> AsyncIterator[Http]:
    """Serve an application while the block runs; `should_exit` ends it sooner, letting open requests finish."""
    server = Http(
        uvicorn.Config(
            app,
            http=HttpProtocol,
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
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        while not server.started:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        done, _ = await asyncio.wait({serving}, timeout=STREAMS_S + 2)
        if not done:
            server.force_exit = True
            serving.cancel()


def quieten_collector() -> None:
    """What lives from here on lives long; look for garbage in what is young, and less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def step_back() -> None:
    """Have this process wait for the processor while others want it: for work that nobody waits for.

    Linux shares the processor among sessions first (`sched_autogroup`), and each role has a session of its own.
    """
    os.nice(BACKGROUND_NICE)
    with suppress(OSError):
        AUTOGROUP.write_text(str(BACKGROUND_NICE))
