"""The master key: given, read from its file, or made in the data folder on the first embedded start."""

from __future__ import annotations

import base64
import os
import secrets
import stat
from pathlib import Path

from oshaani import shapes
from oshaani.settings import Settings, SettingsInvalid

_MAKE = "(umask 077; openssl rand -base64 32 > {file})"


def master_key(settings: Settings) -> bytes:
    """The 32 bytes that wrap the vault's keys. Blocks on the disk; two processes that start at once agree.

    Raises:
        SettingsInvalid: the file is missing, readable by others, or holds something else.
    """
    if settings.given_master_key is not None:
        return settings.given_master_key
    file = settings.master_key_file
    try:
        if settings.is_embedded and file.parent == settings.data_dir:
            _make_if_missing(file)
        return _read(file)
    except OSError as fault:
        raise SettingsInvalid(
            [
                f"OSHAANI_MASTER_KEY_FILE {str(file)!r} cannot be used: {fault.strerror}; "
                f"make it readable, or make a new one: {_MAKE.format(file=file)}"
            ]
        ) from fault


def _read(file: Path) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as opened:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise SettingsInvalid(
                [
                    f"OSHAANI_MASTER_KEY_FILE {str(file)!r} is open to other users (mode {mode:04o}); "
                    f"run `chmod 600 {file}`, and change the key if others may have read it"
                ]
            )
        try:
            key = shapes.KEY.read(opened.read(1024))
        except ValueError as fault:
            raise SettingsInvalid(
                [
                    f"OSHAANI_MASTER_KEY_FILE {str(file)!r} must hold {shapes.KEY.text}; "
                    f"restore it, or make a new one: {_MAKE.format(file=file)}"
                ]
            ) from fault
    assert isinstance(key, bytes)
    return key


def _make_if_missing(file: Path) -> None:
    """Written whole beside its place, then linked there: a link never replaces a key that is already there."""
    if file.exists():
        return
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
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
