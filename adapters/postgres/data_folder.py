"""The data folder of the embedded mode: prepared, checked, and held by one process at a time.

Started as root, the embedded Postgres runs as a user of its own (Postgres refuses to run as root), who must
be able to enter the data folder. Only the data folder itself is opened for that, never a folder above it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER_USER = "pgserver"
FREE_BYTES_MIN = 128 * 1024 * 1024  # A new database takes 40 MB, its log of changes grows to 256 MB with use.
USERADD_TIMEOUT_S = 20.0


class EmbeddedPostgresFault(Exception):
    """The embedded database cannot serve; the text is one line with the fix, meant for an operator."""


class DataFolderUnusable(EmbeddedPostgresFault):
    """The data folder cannot be made, entered or written."""


class DataFolderTaken(EmbeddedPostgresFault):
    """Another process works in this data folder."""


@contextmanager
def held_by_this_process(data_dir: Path) -> Iterator[None]:
    """Prepare `data_dir` and keep every other process out of it until the block ends.

    The operating system gives the lock back when the process dies, however it dies.

    Raises:
        DataFolderUnusable: the folder cannot be made, entered or written, or its disk is full.
        DataFolderTaken: another process holds it.
    """
    with _faults_named(data_dir):
        _prepare(data_dir)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, data_dir)
        yield
    finally:
        os.close(descriptor)


def server_account() -> pwd.struct_passwd | None:
    """The user Postgres runs as when this process is root (made when missing), otherwise None.

    Raises:
        EmbeddedPostgresFault: the user is missing and cannot be made.
    """
    if os.geteuid() != 0:
        return None
    if (account := _account(SERVER_USER)) is None:
        _add_user()
        account = _account(SERVER_USER)
    if account is None:
        raise EmbeddedPostgresFault(
            f"Postgres does not run as root and the user {SERVER_USER!r} could not be made; "
            f"run `useradd --system {SERVER_USER}`, or start as an ordinary user, or set DATABASE_URL"
        )
    return account


def may_enter(folder: Path, account: pwd.struct_passwd) -> bool:
    """Whether `account` may pass through `folder` (by its mode bits)."""
    facts = folder.stat()
    if facts.st_uid == account.pw_uid:
        return bool(facts.st_mode & stat.S_IXUSR)
    if facts.st_gid == account.pw_gid:
        return bool(facts.st_mode & stat.S_IXGRP)
    return bool(facts.st_mode & stat.S_IXOTH)


def _prepare(data_dir: Path) -> None:
    missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    if not data_dir.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    account = server_account()
    if missing:
        data_dir.chmod(0o700)
    if account is not None:
        _refuse_closed_parents(data_dir, account)
        if not may_enter(data_dir, account):
            data_dir.chmod(stat.S_IMODE(data_dir.stat().st_mode) | stat.S_IXOTH)
    free_bytes = shutil.disk_usage(data_dir).free
    if free_bytes < FREE_BYTES_MIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refuse_closed_parents(data_dir: Path, account: pwd.struct_passwd) -> None:
    for folder in data_dir.resolve().parents:
        if not may_enter(folder, account):
            raise DataFolderUnusable(
                f"cannot use the data folder {str(data_dir)!r}: as root, Postgres runs as user "
                f"{account.pw_name!r}, who may not enter {str(folder)!r}; "
                "set OSHAANI_DATA_DIR to a folder outside private homes, for example /var/lib/oshaani"
            )


@contextmanager
def _faults_named(data_dir: Path) -> Iterator[None]:
    """Turn what the operating system says about `data_dir` into one line with the fix."""
    try:
        yield
    except OSError as fault:
        raise DataFolderUnusable(disk_fault(data_dir, fault)) from fault


def disk_fault(data_dir: Path, fault: OSError) -> str:
    """One line with the fix for a file system's refusal."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of the data folder {str(data_dir)!r} is full; "
            f"free at least {FREE_BYTES_MIN // 1024 // 1024} MB, or set OSHAANI_DATA_DIR to another disk"
        )
    return (
        f"cannot use the data folder {str(data_dir)!r}: {fault.strerror or fault}; "
        "make it a folder this user may write, or set OSHAANI_DATA_DIR to another"
    )


def _lock(descriptor: int, data_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as taken:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
        raise DataFolderTaken(
            f"the data folder {str(data_dir)!r} is in use by process {holder}; "
            "stop that one, or give this one a folder and a port of its own: OSHAANI_DATA_DIR, OSHAANI_PORT"
        ) from taken
    with _faults_named(data_dir):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)


def _account(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _add_user() -> None:
    """Make the server's user; whether that worked is seen by looking for it."""
    program = shutil.which("useradd", path=f"{os.defpath}:/usr/sbin:/sbin")
    if program is None:
        return
    subprocess.run(
        [
            program,
            "--system",
            "--user-group",
            "--no-create-home",
            "--shell",
            "/usr/sbin/nologin",
            SERVER_USER,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=USERADD_TIMEOUT_S,
        check=False,
    )
