"""`oshaani up --kafka`: the distributed layout on one machine. Every role has a process of its own; a dead one is started
again under its name, so that what its earlier life left is taken over at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from aiohttp import ClientError, ClientSession, ClientTimeout

from adapters.kafka.admin import apply
from adapters.kafka.broker import embedded_kafka
from adapters.kafka.clients import KafkaConfig
from oshaani.fork_server import Forked, Program, forked
from oshaani.master_key import master_key
from oshaani.process import SUPERVISED, Ending, listening
from oshaani.settings import Settings
from oshaani.wiring import database, migrate
from schemas.topics import PROCESSORS, TOPICS

log_of = logging.getLogger(__name__)

STOP_S = 10.0  # what a process gets between SIGTERM and SIGKILL
SETTLED_S = 3.0  # a process that lived as long had begun its work, and is started again at once
PAUSE_FIRST_S, PAUSE_MAX_S = 0.2, 10.0
LOOK_S = 0.1
CONNECTIONS = 250  # to the embedded database: ten or so of each process, any of which may be started twice

Say = Callable[[str, str], None]
"""Hears a line and who printed it: `say(slot, line)`."""


@dataclass(frozen=True, slots=True)
class Role:
    """One process of the layout. `port` is where it answers operators."""

    slot: str
    arguments: tuple[str, ...]
    port: int


def layout(first_port: int, processors: Sequence[str] = PROCESSORS) -> list[Role]:
    """One process a role, each with the next port after the API's."""
    slots = [
        ("api-1", ("api",)),
        ("relay-1", ("relay",)),
        ("projector-1", ("projector",)),
        *((f"{name}-1", ("processor", name)) for name in processors),
    ]
    return [Role(slot, arguments, first_port + number) for number, (slot, arguments) in enumerate(slots)]


def pause_after(lived_s: float, paused_s: float) -> float:
    """Seconds until a process is started again that lived so long, after a pause of `paused_s` before it."""
    if lived_s >= SETTLED_S:
        return 0.0
    return min(max(PAUSE_FIRST_S, paused_s * 2), PAUSE_MAX_S)


def run_oshaani(arguments: Sequence[str]) -> None:
    """The command `oshaani`, as a process of the layout runs it."""
    from oshaani.cli import main

    sys.argv = ["oshaani", *arguments]
    main()


class Supervisor:
    """Starts roles, starts the dead again, and ends them all. Children end by themselves when it is gone."""

    def __init__(
        self, environment: Mapping[str, str], run_folder: Path, say: Say, program: Program = run_oshaani
    ) -> None:
        self._environment, self._run_folder, self._say = dict(environment), run_folder, say
        self._program = program
        self._processes: dict[str, Forked] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    @asynccontextmanager
    async def running(self, roles: Sequence[Role]) -> AsyncIterator[None]:
        """The roles, while the block runs; those of a supervisor that was killed are ended first."""
        self._run_folder.mkdir(parents=True, exist_ok=True)
        end_left_over(self._run_folder)
        self._tasks = [asyncio.create_task(self._keep(role), name=role.slot) for role in roles]
        try:
            yield
        finally:
            await self._stop()

    async def _keep(self, role: Role) -> None:
        pause_s = 0.0
        while True:
            began = time.monotonic()
            code = await self._live(role)
            if self._ending:
                return
            lived_s = time.monotonic() - began
            pause_s = pause_after(lived_s, pause_s)
            cause = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            self._say(role.slot, f"ended {cause} after {lived_s:.0f} s; starting it again")
            await asyncio.sleep(pause_s)

    async def _live(self, role: Role) -> int:
        """One life of a process: its exit code, or minus the signal that ended it."""
        environment = self._environment | {
            "OSHAANI_SLOT": role.slot,
            "OSHAANI_PORT" if role.arguments == ("api",) else "OSHAANI_WORKER_PORT": str(role.port),
            SUPERVISED: "1",
        }
        async with forked(self._program, role.arguments, environment) as process:
            pid_file = self._run_folder / f"{role.slot}.pid"
            pid_file.write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
            self._processes[role.slot] = process
            try:
                async for line in process.lines():
                    self._say(role.slot, line)
                return await process.wait()
            finally:
                del self._processes[role.slot]
                pid_file.unlink(missing_ok=True)

    async def _stop(self) -> None:
        self._ending = True
        for process in self._processes.values():
            process.terminate()
        waiting = [task for task in self._tasks if task.get_name() in self._processes]
        for task in set(self._tasks) - set(waiting):
            task.cancel()
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=STOP_S)
            for task in late:
                self._say(task.get_name(), f"did not end within {STOP_S:.0f} s and is killed")
                self._processes[task.get_name()].kill()
            if late:
                await asyncio.wait(late, timeout=STOP_S)


async def up_kafka(
    settings: Settings, say: Say, announce: Callable[[Settings], None], program: Program = run_oshaani
) -> None:
    """Run the layout until SIGTERM or SIGINT, on the configured Postgres and Kafka or on embedded ones.

    `say` hears what each process prints, all of which run `program`; `announce` is called when the first request can be
    served.

    Raises:
        adapters.postgres.data_folder.EmbeddedPostgresFault, adapters.kafka.broker.EmbeddedKafkaFault: see there.
        oshaani.process.PortTaken: the port of the API or of a worker is in use.
    """
    ending, roles = Ending(), layout(settings.port)
    for role in roles:
        with listening(settings.host, role.port, "OSHAANI_PORT"):
            pass
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(database(settings, CONNECTIONS))
        await migrate(dsn)
        config = KafkaConfig.of(settings)
        if not config.bootstrap_servers:
            broker = embedded_kafka(settings.data_dir, say=lambda text: say("kafka", text))
            config = KafkaConfig.at(await stack.enter_async_context(broker))
        await apply(config, TOPICS, settings.kafka_partitions)
        master_key(settings)  # made now where it is missing, before several want it
        environment = os.environ | {
            "DATABASE_URL": dsn,
            "KAFKA_BOOTSTRAP_SERVERS": ",".join(config.bootstrap_servers),
            "OSHAANI_DATA_DIR": str(settings.data_dir),
        }
        if settings.given_master_key is None:
            environment["OSHAANI_MASTER_KEY_FILE"] = str(settings.master_key_file)
        supervisor = Supervisor(environment, settings.data_dir / "run", say, program)
        async with supervisor.running(roles):
            ready = asyncio.create_task(_ready(settings.base_url))
            stopped = asyncio.create_task(ending.wait())
            await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                announce(settings)
            ready.cancel()
            await stopped


async def _ready(base_url: str) -> None:
    async with ClientSession(timeout=ClientTimeout(total=LOOK_S * 10)) as client:
        while True:
            with suppress(ClientError, TimeoutError, OSError):
                async with client.get(f"{base_url}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(LOOK_S)


def end_left_over(run_folder: Path) -> None:
    """End what a supervisor that was killed left running; a pid that was given to another program since is let alone."""
    left = []
    for file in run_folder.glob("*.pid"):
        try:
            pid, created = file.read_text().split()
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(created)) < 1:
                process.terminate()
                left.append(process)
        except (ValueError, psutil.NoSuchProcess):
            pass
        file.unlink(missing_ok=True)
    _, alive = psutil.wait_procs(left, timeout=STOP_S)
    for process in alive:
        process.kill()
