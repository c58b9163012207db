"""The embedded Kafka: one real broker for development and tests, run on `<data folder>/kafka`.

Apache Kafka itself, in KRaft mode, on loopback only. What it holds can be written again from the log, so it is never
the place of anything.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil

from adapters.kafka.faults import EmbeddedKafkaFault, KafkaDidNotStart, KafkaFolderUnusable, KafkaPortTaken
from adapters.kafka.node import SERVER, answers, free_ports, is_free, nodes_on, write_settings
from adapters.kafka.programs import KafkaPrograms, Say, kafka_programs
from adapters.watching import keep_running

START_TIMEOUT_S = 90.0
ORDERLY_STOP_S = 5.0
KILL_S = 5.0
POLL_S = 0.05
PORT_TRIES = 5
FREE_BYTES_MIN = 256 * 1024 * 1024

_EXCEPTION = re.compile(r"(Caused by: )?[\w.$]+(Exception|Error): .")
_log = logging.getLogger(__name__)


@asynccontextmanager
async def embedded_kafka(
    data_dir: Path, port: int | None = None, say: Say | None = None
) -> AsyncIterator[str]:
    """Run the embedded broker while the block runs, and give its bootstrap servers.

    The folder is held against other processes. What an earlier life of the program left running is ended first, and a
    broker that dies while the block runs is started again at the same port. Without `port` it is the last one used
    on this folder, or any that is free. `say` hears what takes long.

    Raises:
        EmbeddedKafkaFault: it cannot run here; the text says why and what to do.
    """
    server = KafkaServer(data_dir / "kafka", port, say=say)
    with _held(server.folder):
        watch: asyncio.Task[None] | None = None
        try:
            await asyncio.to_thread(server.start)
            watch = asyncio.create_task(
                keep_running(server, "Kafka", EmbeddedKafkaFault), name="embedded-kafka-watch"
            )
            yield server.bootstrap_servers
        finally:
            if watch is not None:
                watch.cancel()
            await asyncio.to_thread(server.stop)


def running_servers(data_dir: Path) -> str | None:
    """The bootstrap servers that another process runs on this folder; None when none answers there.

    Takes and changes nothing. A broker that outlived the program which started it does not count: whoever takes the
    folder next ends it.
    """
    server = KafkaServer(data_dir / "kafka")
    holder = _text(server.folder / "lock")
    port = _last_port(server.folder)
    if port is None or not any(str(process.ppid()) == holder for process in nodes_on(server.folder)):
        return None
    return f"127.0.0.1:{port}" if answers(port) else None


class KafkaServer:
    """One broker process on `folder`. Its methods block; the caller holds the folder."""

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        say: Say | None = None,
    ) -> None:
        """`settings` come on top of those in deploy/kafka/server.properties."""
        self.folder = folder.resolve()
        self.log_file = self.folder / "broker.log"
        self._given_port = port
        self._settings = dict(settings or {})
        self._say = say
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    @property
    def bootstrap_servers(self) -> str:
        """Where it listens, the same over restarts; known once it was started."""
        assert self._port is not None, "not started yet"
        return f"127.0.0.1:{self._port}"

    @property
    def has_ended(self) -> bool:
        """Whether a broker that was started runs no longer."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start the broker and wait until it answers.

        Raises:
            EmbeddedKafkaFault: it cannot run; the text says why and what to do.
        """
        with self._changing:
            programs = kafka_programs(self._say)
            try:
                self._prepare()
                self.stop_left_over()
                self._start(programs)
            except OSError as fault:
                raise KafkaFolderUnusable(_disk_fault(self.folder, fault)) from fault

    def stop(self) -> None:
        """Stop the broker, in order if it does so within `ORDERLY_STOP_S`; a second call does nothing."""
        with self._changing:
            self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the broker as a failing machine would."""
        with self._changing:
            self._end(signal.SIGKILL)

    def stop_left_over(self) -> None:
        """End every broker that works on this folder: a program that was killed leaves its own running."""
        for process in nodes_on(self.folder):
            _end_process(process)

    def _prepare(self) -> None:
        """The folder, its file of this cluster's id, and the first records of its metadata."""
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if "," in str(self.folder):
            raise KafkaFolderUnusable(
                f"Apache Kafka takes no comma in a folder's name, and {str(self.folder)!r} has one; "
                "set OSHAANI_DATA_DIR to another"
            )
        if shutil.disk_usage(data).free < FREE_BYTES_MIN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _start(self, programs: KafkaPrograms) -> None:
        """Where the port is free to choose, one that somebody else took in the meantime is no reason to give up."""
        for tries_left in reversed(range(PORT_TRIES)):
            port, controller_port = self._ports()
            self._launch(programs, (port, controller_port))
            try:
                self._wait_until_it_answers(port)
            except KafkaPortTaken:
                self._end(signal.SIGKILL)
                if tries_left == 0 or self._given_port is not None:
                    raise
            except BaseException:
                self._end(signal.SIGKILL)
                raise
            else:
                self._port = port
                (self.folder / "port").write_text(str(port), "ascii")
                return

    def _ports(self) -> tuple[int, int]:
        """The given port, the one before, or any; a broker that is started again keeps its own."""
        port, controller_port = free_ports()
        fixed = self._given_port or self._port
        if fixed is not None:
            if not is_free(fixed):
                raise KafkaPortTaken(
                    f"port {fixed} is taken by another program; end that, or start with another port for Kafka"
                )
            return fixed, controller_port
        last = _last_port(self.folder)
        return (last if last is not None and is_free(last) else port), controller_port

    def _launch(self, programs: KafkaPrograms, ports: tuple[int, int]) -> None:
        settings = write_settings(self.folder, ports, self._settings)
        _format(self.folder / "data", programs)
        self.log_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as log:
            self._process = subprocess.Popen(
                [*programs.command(self.folder), SERVER, str(settings)],
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A session of its own: Ctrl-C reaches the program, which then stops the broker last.
                start_new_session=True,
            )

    def _wait_until_it_answers(self, port: int) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self.has_ended:
                raise self._failure("the broker ended")
            if answers(port):
                return
            time.sleep(POLL_S)
        raise self._failure(f"the broker did not answer within {START_TIMEOUT_S:.0f} s")

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                _end_process(psutil.Process(process.pid), number)
            process.wait(KILL_S)

    def _failure(self, what: str) -> EmbeddedKafkaFault:
        """What happened in one line: the taken port and the full disk by name, anything else by its last words."""
        lines = _text(self.log_file).splitlines()
        if any("Address already in use" in line for line in lines):
            return KafkaPortTaken(
                "the broker's port was taken by another program; end that, or start with another"
            )
        if any("No space left on device" in line for line in lines):
            return KafkaFolderUnusable(
                _disk_fault(self.folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            )
        # What went wrong stands in the exception's own line, below the one that says that there was one.
        grave = [line for line in lines if _EXCEPTION.match(line)] or [
            line for line in lines if " ERROR " in line
        ]
        words = (grave or lines or ["it said nothing"])[-1].strip()
        return KafkaDidNotStart(
            f"the embedded Kafka did not start: {what}: {words} (all of it: {str(self.log_file)!r}); mend that, or "
            f"remove {str(self.folder / 'data')!r}, whose topics are then written again from the log"
        )


def _format(data: Path, programs: KafkaPrograms) -> None:
    """What `kafka-storage format` does, without a second start of Java."""
    properties = data / "meta.properties"
    if properties.exists():
        return
    shutil.copyfile(programs.bootstrap, data / "bootstrap.checkpoint")
    unfinished = data / "meta.properties.new"
    unfinished.write_text(
        f"version=1\nnode.id=1\ncluster.id={_kafka_uuid()}\ndirectory.id={_kafka_uuid()}\n", "ascii"
    )
    unfinished.rename(properties)


def _kafka_uuid() -> str:
    """16 bytes as Kafka writes them: URL-safe base64 without padding, and none that looks like an option."""
    while (text := urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")).startswith("-"):
        continue
    return text


def _last_port(folder: Path) -> int | None:
    text = _text(folder / "port")
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep every other process out of the broker's folder; the system frees the lock of a process that dies."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as fault:
        raise KafkaFolderUnusable(_disk_fault(folder, fault)) from fault
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise KafkaFolderUnusable(
                f"the folder {str(folder)!r} is in use by process {holder}; "
                "stop that one, or give this one a folder of its own: OSHAANI_DATA_DIR"
            ) from taken
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def _disk_fault(folder: Path, fault: OSError) -> str:
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of Kafka's folder {str(folder)!r} is full; free at least {FREE_BYTES_MIN // 1024 // 1024} MB, "
            "or set OSHAANI_DATA_DIR to another disk"
        )
    return (
        f"cannot use Kafka's folder {str(folder)!r}: {fault.strerror or fault}; "
        "make it a folder this user may write, or set OSHAANI_DATA_DIR to another"
    )


def _end_process(process: psutil.Process, number: signal.Signals = signal.SIGTERM) -> None:
    for each, patience_s in ((number, ORDERLY_STOP_S), (signal.SIGKILL, KILL_S)):
        try:
            process.send_signal(each)
            process.wait(patience_s)
            return
        except psutil.NoSuchProcess:
            return
        except psutil.TimeoutExpired:
            continue
