"""The master key: given, or in a file of 32 bytes in base64 that is for this user alone."""

from __future__ import annotations

import base64
import os
import secrets
import stat
from pathlib import Path

from oshaani import shapes
from oshaani.settings import Settings, SettingsInvalid

FILE_BYTES_MAX = 1024


def master_key(settings: Settings) -> bytes:
    """The 32 bytes that wrap the vault's keys: given, from their file, or made in the data folder when embedded.

    Blocks on the disk for a moment; processes that start at once agree on one key.

    Raises:
        SettingsInvalid: the file is missing, open to other users, or holds something else.
    """
    if settings.given_master_key is not None:
        return settings.given_master_key
    file = settings.master_key_file
    return (
        _made_if_missing(file) if settings.is_embedded and file.parent == settings.data_dir else _key_in(file)
    )


def _key_in(file: Path) -> bytes:
    """The key in `file`."""
    try:
        return _read(file)
    except OSError as fault:
        raise _refused(
            file, f"cannot be used: {fault.strerror}; make it readable, or {_a_new_one(file)}"
        ) from fault


def _made_if_missing(file: Path) -> bytes:
    """The key in `file`, made first when there is none. Two processes that make it at once agree on one."""
    try:
        if not file.exists():
            _make(file)
        return _read(file)
    except OSError as fault:
        raise _refused(
            file, f"cannot be made: {fault.strerror}; make its folder writable, or set OSHAANI_MASTER_KEY"
        ) from fault


def _read(file: Path) -> bytes:
    descriptor = os.open(file, os.O_RDONLY)
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as opened:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise _refused(
                file,
                f"is open to other users (mode {mode:04o}); "
                f"run `chmod 600 {file}`, and change the key if others may have read it",
            )
        text = opened.read(FILE_BYTES_MAX)
    try:
        return shapes.key_of(text)
    except ValueError as fault:
        raise _refused(file, f"must hold {shapes.KEY.text}; restore it, or {_a_new_one(file)}") from fault


def _make(file: Path) -> None:
    """Written whole beside its place, then linked there: a link never replaces a key that is already there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(base64.b64encode(secrets.token_bytes(shapes.MASTER_KEY_BYTES)) + b"\n")
            opened.flush()
            os.fsync(descriptor)
        try:
            file.hardlink_to(unfinished)
        except FileExistsError:
            return
    finally:
        unfinished.unlink()
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(file: Path, what: str) -> SettingsInvalid:
    return SettingsInvalid([f"OSHAANI_MASTER_KEY_FILE {str(file)!r} {what}"])


def _a_new_one(file: Path) -> str:
    return f"make a new one: (umask 077; openssl rand -base64 {shapes.MASTER_KEY_BYTES} > {file})"
