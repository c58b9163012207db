"""The shapes of settings: how a text becomes a value, and how the shape is called when it does not.

A reader raises ValueError for a wrong text; its message is not shown, the shape's text is.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from domain import money
from domain.ids import SHARDS
from domain.plans import Limits, plans_with

MASK = "********"
MASTER_KEY_BYTES = 32
OLLAMA_PORT = 11434
SECONDS_MAX = 86_400.0
SESSION_DAYS_MAX = 3650
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
SECURITY_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
SASL_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

_HOST = re.compile(r"[A-Za-z0-9._:-]+")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]+")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_REGION = re.compile(r"[a-z]{2,4}(-[a-z]+)+-\d")
_MODEL = re.compile(r"[a-z0-9_-]+:\S+")
_SLOT = re.compile(r"[A-Za-z0-9._-]{1,100}")
_BROKER = re.compile(r"[A-Za-z0-9._-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")


class SettingsInvalid(Exception):
    """Settings that cannot be used; each of `faults` names one, the shape it must have and the fix."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        count = "1 setting is wrong" if len(faults) == 1 else f"{len(faults)} settings are wrong"
        super().__init__("\n  ".join([f"{count}:", *faults]))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a setting's text must look like, in words and by example, and how it is read."""

    text: str
    example: str
    read: Callable[[str], object]


def hidden(text: str) -> str:
    """A secret as shown to people."""
    return MASK if text else ""


def without_password(text: str) -> str:
    """A URL as shown to people: everything but its password, wherever that stands."""
    parts = urlsplit(text)
    user, _, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    netloc = f"{name}:{MASK}@{host}" if colon else parts.netloc
    query = re.sub(r"(?i)((?:^|&)[^=&]*password=)[^&]*", rf"\g<1>{MASK}", parts.query)
    return urlunsplit(parts._replace(netloc=netloc, query=query))


def _matching(pattern: re.Pattern[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if pattern.fullmatch(text) is None:
            raise ValueError(text)
        return text

    return read


def _port(text: str) -> int:
    return _whole(text, 1, 65_535)


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError(text)
    return int(text)


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(text)
    _ = parts.port  # Raises ValueError for a port that is none.
    return text.rstrip("/")


def _database_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("postgresql", "postgres") or parts.path in ("", "/"):
        raise ValueError(text)
    return text


def _ollama_host(text: str) -> str:
    """Ollama's own rules: scheme and port may be left out, and `0.0.0.0` is what its server listens on."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if not parts.hostname:
        raise ValueError(text)
    host = "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname  # noqa: S104 - read, not bound
    port = parts.port or (OLLAMA_PORT if "://" not in text else {"http": 80, "https": 443}.get(parts.scheme))
    return _url(f"{parts.scheme}://{bracketed(host)}:{port}{parts.path}")


def bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def _folder(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _brokers(text: str) -> tuple[str, ...]:
    brokers = tuple(_listed(text))
    if not all(_BROKER.fullmatch(broker) for broker in brokers):
        raise ValueError(text)
    return brokers


def _partitions(text: str) -> int:
    if SHARDS % (partitions := _whole(text, 1, SHARDS)):
        raise ValueError(text)
    return partitions


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.upper() not in names:
            raise ValueError(text)
        return text.upper()

    return read


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(ip_network(part) for part in _listed(text))


def _ports(text: str) -> tuple[int, ...]:
    if not (ports := tuple(_port(part) for part in _listed(text))):
        raise ValueError(text)
    return ports


def _credits(text: str) -> int:
    if (amount_ncr := money.ncr(text)) < 0:
        raise ValueError(text)
    return amount_ncr


def key_of(text: str) -> bytes:
    """A master key from its base64, standard or URL-safe.

    Raises:
        ValueError: not base64, or not 32 bytes of it.
    """
    key = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    if len(key) != MASTER_KEY_BYTES:
        raise ValueError("not 32 bytes")
    return key


def _keys(text: str) -> tuple[bytes, ...]:
    return tuple(key_of(part) for part in _listed(text))


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(text)
    return text.lower()


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and 0 < seconds <= SECONDS_MAX):
        raise ValueError(text)
    return seconds


def _days(text: str) -> int:
    return _whole(text, 1, SESSION_DAYS_MAX)


def _plans(text: str) -> Mapping[str, Limits]:
    overrides = json.loads(text)
    if not isinstance(overrides, dict):
        raise ValueError(text)
    return plans_with(overrides)


HOST = Shape("a host name or address", "127.0.0.1", _matching(_HOST))
PORT = Shape("a port from 1 to 65535", "8080", _port)
ANY_PORT = Shape("a port up to 65535, 0 for any free one", "9464", lambda text: _whole(text, 0, 65_535))
SLOT = Shape("letters, digits, dots, dashes and underscores, at most 100", "agent_turns-1", _matching(_SLOT))
PORTS = Shape("ports from 1 to 65535, separated by commas", "80,443", _ports)
URL = Shape("an http or https address", "https://oshaani.example.com", _url)
DATABASE_URL = Shape(
    "postgresql://user:password@host:port/database",
    "postgresql://oshaani@127.0.0.1:5432/oshaani",
    _database_url,
)
BROKERS = Shape("host:port, separated by commas", "127.0.0.1:9092", _brokers)
PARTITIONS = Shape(
    f"a number that divides {SHARDS} evenly: 1, 2, 4, 8, 16 or 32",
    "8",
    _partitions,
)
SECURITY_PROTOCOL = Shape(f"one of {', '.join(SECURITY_PROTOCOLS)}", "SASL_SSL", _one_of(SECURITY_PROTOCOLS))
SASL_MECHANISM = Shape(f"one of {', '.join(SASL_MECHANISMS)}", "SCRAM-SHA-512", _one_of(SASL_MECHANISMS))
TEXT = Shape("printable characters", "oshaani", _matching(_TEXT))
CERTIFICATE = Shape("a file", "/etc/oshaani/kafka.pem", _folder)
OLLAMA_HOST = Shape("host, host:port or an http address", "127.0.0.1:11434", _ollama_host)
TOKEN = Shape("printable characters without spaces", "a-long-random-text", _matching(_TOKEN))
REGION = Shape("the name of an AWS region", "eu-central-1", _matching(_REGION))
MODEL = Shape("provider:model", "ollama:llama3.2", _matching(_MODEL))
NETWORKS = Shape("networks in CIDR form, separated by commas", "10.1.0.0/16", _networks)
CREDITS = Shape("an amount of credits, 0 or more, at most 9 decimals", "200", _credits)
FOLDER = Shape("a folder", "/var/lib/oshaani", _folder)
FILE = Shape("a file", "/etc/oshaani/master.key", _folder)
KEY = Shape("32 bytes in base64", "$(openssl rand -base64 32)", key_of)
KEYS = Shape("keys of 32 bytes in base64, separated by commas", "$(cat master.key.old)", _keys)
LOG_LEVEL = Shape(f"one of {', '.join(LOG_LEVELS)}", "info", _log_level)
SECONDS = Shape(f"a number of seconds above 0, at most {SECONDS_MAX:.0f}", "60", _seconds)
DAYS = Shape(f"a whole number of days from 1 to {SESSION_DAYS_MAX}", "14", _days)
PLAN_LIMITS = Shape(
    "a JSON object of known plans and meters: {plan: {meter: limit per day or null}}",
    '\'{"free": {"message": 100}}\'',
    _plans,
)
