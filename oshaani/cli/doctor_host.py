"""What `oshaani doctor` looks at on this machine: it changes nothing."""

from __future__ import annotations

import ipaddress
import os
import platform
import shutil
import stat
import sys
from pathlib import Path

from adapters.postgres.data_folder import FREE_BYTES_MIN, SERVER_USER
from oshaani import __version__
from oshaani.cli.findings import Finding, fail, ok, warn
from oshaani.master_key import master_key
from oshaani.settings import DEFAULT, DERIVED, UNSET, Settings, SettingsInvalid

PYTHON_MIN = (3, 11)
FREE_BYTES_WANTED = 2_000_000_000


def python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    if sys.version_info < PYTHON_MIN:
        return fail("python", version, "install Python 3.11 or newer")
    return ok("python", f"{version}, oshaani {__version__}")


def settings_source(settings: Settings) -> Finding:
    """Where the settings that differ from the defaults come from."""
    said = [line.name for line in settings.lines if line.source not in (DEFAULT, DERIVED, UNSET)]
    return ok("settings", f"valid; set: {', '.join(said)}" if said else "valid; all defaults")


def data_folder(settings: Settings) -> list[Finding]:
    """Whether the data folder can be used, and is nobody else's business."""
    folder = settings.data_dir
    if not folder.exists():
        return [warn("data folder", f"{folder} is not there yet", "the first `oshaani up` makes it")]
    facts = folder.stat()
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        fix = f"run as the user with the id {facts.st_uid}, or set OSHAANI_DATA_DIR to another folder"
        return [fail("data folder", f"{folder} cannot be written by this user", fix)]
    found = [ok("data folder", f"{folder}, {_gigabytes(_free_bytes(folder))} free")]
    if _free_bytes(folder) < FREE_BYTES_MIN:
        found = [fail("data folder", f"the disk of {folder} is full", "free some space on it")]
    elif _free_bytes(folder) < FREE_BYTES_WANTED:
        detail = f"{folder} has only {_gigabytes(_free_bytes(folder))} left"
        found = [warn("data folder", detail, "free some space before it is full")]
    if facts.st_mode & (stat.S_IRWXG | stat.S_IROTH | stat.S_IWOTH):
        detail = f"other users can look into {folder} (mode {stat.S_IMODE(facts.st_mode):04o})"
        found.append(warn("data folder", detail, f"run `chmod go-rw,g-x {folder}`"))
    if facts.st_uid != os.geteuid():
        detail = f"{folder} belongs to the user with the id {facts.st_uid}, this is {os.geteuid()}"
        found.append(warn("data folder", detail, "run commands as the user that runs the server"))
    return found


def master_key_file(settings: Settings) -> Finding:
    """Whether the key that wraps all others is there, and only ours to read."""
    if settings.given_master_key is None and settings.is_embedded and not settings.master_key_file.exists():
        return warn("master key", "not there yet", "the first `oshaani up` makes it")
    try:
        master_key(settings)
    except SettingsInvalid as invalid:
        return fail("master key", invalid.faults[0], "without the right key no secret can be read")
    where = "OSHAANI_MASTER_KEY" if settings.given_master_key is not None else str(settings.master_key_file)
    return ok("master key", f"{where}; keep a copy in a safe place, nothing replaces it")


def readable_key(settings: Settings) -> bytes | None:
    """The master key, if it is there and can be read; it is not made."""
    if settings.given_master_key is None and not settings.master_key_file.exists():
        return None
    try:
        return master_key(settings)
    except SettingsInvalid:
        return None


def listening(settings: Settings) -> Finding:
    """Whether passwords would cross a network in the clear."""
    beyond = not _is_loopback(settings.host)
    if beyond and settings.base_url.startswith("http://"):
        fix = "put a proxy with TLS before it and set OSHAANI_BASE_URL to its https address"
        return warn("address", f"{settings.host}:{settings.port} is open to other machines without TLS", fix)
    as_root = (
        f"; as root Postgres runs as {SERVER_USER!r}" if os.geteuid() == 0 and settings.is_embedded else ""
    )
    return ok("address", f"{settings.host}:{settings.port}, reached as {settings.base_url}{as_root}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
