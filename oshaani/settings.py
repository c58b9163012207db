"""Settings: the environment first, then `oshaani.toml`, then defaults; read once, all faults reported together.

The file's keys are the variables' names (`OSHAANI_PORT = 8080`); a list of texts and a table may be written as
such. `TABLE` names every setting: what `oshaani settings` prints and what the reference is made from.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from domain.plans import Limits
from oshaani import shapes
from oshaani.shapes import SettingsInvalid, Shape, bracketed
from schemas.topics import PRIVATE_PARTITIONS

__all__ = [
    "TABLE",
    "Setting",
    "SettingLine",
    "Settings",
    "SettingsInvalid",
    "describe",
    "read_settings",
]

CONFIG_VARIABLE = "OSHAANI_CONFIG"
CONFIG_FILE = "oshaani.toml"
ROOT_DATA_DIR = Path("/var/lib/oshaani")
OPENAI_URL = "https://api.openai.com/v1"
KAFKA_LOGIN = ("kafka_sasl_username", "kafka_sasl_password")
KAFKA_CERTIFICATES = ("kafka_ssl_ca_file", "kafka_ssl_cert_file", "kafka_ssl_key_file")
ENVIRONMENT, DEFAULT, DERIVED, UNSET = "environment", "default", "derived", "not set"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where such a server is reached


@dataclass(frozen=True, slots=True)
class SettingLine:
    """One setting as shown to people: secrets are masked."""

    name: str
    value_masked: str
    source: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything this process was told. None and empty mean: not there, do without."""

    host: str
    port: int
    base_url: str
    data_dir: Path
    database_url: str | None = field(repr=False)
    kafka_bootstrap_servers: tuple[str, ...]
    kafka_partitions: int
    kafka_security_protocol: str
    kafka_sasl_mechanism: str
    kafka_sasl_username: str | None
    kafka_sasl_password: str | None = field(repr=False)
    kafka_ssl_ca_file: Path | None
    kafka_ssl_cert_file: Path | None
    kafka_ssl_key_file: Path | None
    ollama_url: str
    openai_base_url: str | None
    openai_api_key: str | None = field(repr=False)
    aws_region: str | None
    bedrock_endpoint: str | None
    default_model: str | None
    tavily_api_key: str | None = field(repr=False)
    brave_api_key: str | None = field(repr=False)
    searxng_url: str | None
    egress_allow: tuple[IPv4Network | IPv6Network, ...]
    egress_ports: tuple[int, ...]
    free_credits_ncr: int
    given_master_key: bytes | None = field(repr=False)
    previous_master_keys: tuple[bytes, ...] = field(repr=False)
    master_key_file: Path
    plans: Mapping[str, Limits] = field(repr=False)
    metrics_token: str | None = field(repr=False)
    slot: str | None
    worker_host: str
    worker_port: int
    log_level: str
    turn_deadline_s: float
    model_timeout_s: float
    session_days: int
    lines: tuple[SettingLine, ...] = field(repr=False)

    @property
    def is_embedded(self) -> bool:
        """Whether the program runs its own Postgres in the data folder."""
        return self.database_url is None


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `names` are the variables that say it, the first is the one to set."""

    field: str
    names: tuple[str, ...]
    shape: Shape
    description: str
    default: str | None = None
    masked: Callable[[str], str] = str

    @property
    def is_secret(self) -> bool:
        """Whether people are never shown the value as it is."""
        return self.masked is not str


TABLE: tuple[Setting, ...] = (
    Setting("host", ("OSHAANI_HOST",), shapes.HOST, "Address the API listens on.", "127.0.0.1"),
    Setting("port", ("OSHAANI_PORT",), shapes.PORT, "Port the API listens on.", "8080"),
    Setting(
        "base_url",
        ("OSHAANI_BASE_URL",),
        shapes.URL,
        "Where people reach the API: links in mail, OAuth callbacks. Follows from host and port.",
    ),
    Setting(
        "data_dir",
        ("OSHAANI_DATA_DIR",),
        shapes.FOLDER,
        "Embedded Postgres, files, master key, outbox. By default in the user's data home; "
        f"for root {ROOT_DATA_DIR}.",
    ),
    Setting(
        "database_url",
        ("DATABASE_URL",),
        shapes.DATABASE_URL,
        "External Postgres; without it the embedded one runs in the data folder.",
        masked=shapes.without_password,
    ),
    Setting(
        "kafka_bootstrap_servers",
        ("KAFKA_BOOTSTRAP_SERVERS",),
        shapes.BROKERS,
        "Kafka brokers; without them everything runs in one process.",
        "",
    ),
    Setting(
        "kafka_partitions",
        ("OSHAANI_KAFKA_PARTITIONS",),
        shapes.PARTITIONS,
        "Partitions of the private topics that `oshaani topics apply` makes. They stay as they were made.",
        str(PRIVATE_PARTITIONS),
    ),
    Setting(
        "kafka_security_protocol",
        ("KAFKA_SECURITY_PROTOCOL",),
        shapes.SECURITY_PROTOCOL,
        "How brokers are spoken to: encrypted (SSL), with a login (SASL), both, or neither.",
        "PLAINTEXT",
    ),
    Setting(
        "kafka_sasl_mechanism",
        ("KAFKA_SASL_MECHANISM",),
        shapes.SASL_MECHANISM,
        "How a login at Kafka is proved.",
        "PLAIN",
    ),
    Setting("kafka_sasl_username", ("KAFKA_SASL_USERNAME",), shapes.TEXT, "User at Kafka."),
    Setting(
        "kafka_sasl_password",
        ("KAFKA_SASL_PASSWORD",),
        shapes.TEXT,
        "Password of that user.",
        masked=shapes.hidden,
    ),
    Setting(
        "kafka_ssl_ca_file",
        ("KAFKA_SSL_CA_FILE",),
        shapes.CERTIFICATE,
        "Certificates (PEM) that brokers are trusted by; without it those of this system.",
    ),
    Setting(
        "kafka_ssl_cert_file",
        ("KAFKA_SSL_CERT_FILE",),
        shapes.CERTIFICATE,
        "Our own certificate (PEM), where brokers ask for one.",
    ),
    Setting(
        "kafka_ssl_key_file",
        ("KAFKA_SSL_KEY_FILE",),
        shapes.CERTIFICATE,
        "The key of our own certificate (PEM, without a password).",
    ),
    Setting(
        "ollama_url",
        ("OLLAMA_HOST",),
        shapes.OLLAMA_HOST,
        "Ollama, used when it answers.",
        "http://127.0.0.1:11434",
    ),
    Setting(
        "openai_base_url",
        ("OPENAI_BASE_URL",),
        shapes.URL,
        "Any OpenAI-compatible upstream: vLLM, LM Studio, a gateway. With only a key it is OpenAI.",
    ),
    Setting(
        "openai_api_key", ("OPENAI_API_KEY",), shapes.TOKEN, "Key of that upstream.", masked=shapes.hidden
    ),
    Setting(
        "aws_region",
        ("AWS_REGION", "AWS_DEFAULT_REGION"),
        shapes.REGION,
        "AWS region of Bedrock and the AWS tools; credentials come from boto3's own chain.",
    ),
    Setting(
        "bedrock_endpoint",
        ("OSHAANI_BEDROCK_ENDPOINT",),
        shapes.URL,
        "Bedrock under another address, for example a VPC endpoint.",
    ),
    Setting(
        "default_model",
        ("OSHAANI_DEFAULT_MODEL",),
        shapes.MODEL,
        "Model of agents that name none; otherwise the first provider that answers chooses.",
    ),
    Setting(
        "tavily_api_key",
        ("OSHAANI_SEARCH_TAVILY_API_KEY",),
        shapes.TOKEN,
        "Web search with Tavily.",
        masked=shapes.hidden,
    ),
    Setting(
        "brave_api_key",
        ("OSHAANI_SEARCH_BRAVE_API_KEY",),
        shapes.TOKEN,
        "Web search with Brave.",
        masked=shapes.hidden,
    ),
    Setting(
        "searxng_url", ("OSHAANI_SEARCH_SEARXNG_URL",), shapes.URL, "Web search with a SearXNG of your own."
    ),
    Setting(
        "egress_allow",
        ("OSHAANI_EGRESS_ALLOW",),
        shapes.NETWORKS,
        "Private networks that agents may reach; none by default.",
        "",
    ),
    Setting(
        "egress_ports", ("OSHAANI_EGRESS_PORTS",), shapes.PORTS, "Ports that agents may reach.", "80,443"
    ),
    Setting(
        "free_credits_ncr", ("FREE_CREDITS_AMOUNT",), shapes.CREDITS, "Credits a new user starts with.", "200"
    ),
    Setting(
        "given_master_key",
        ("OSHAANI_MASTER_KEY",),
        shapes.KEY,
        "Wraps the vault's keys. Required with DATABASE_URL, here or in a file.",
        masked=shapes.hidden,
    ),
    Setting(
        "previous_master_keys",
        ("OSHAANI_PREVIOUS_MASTER_KEYS",),
        shapes.KEYS,
        "Keys that still wrap something: the old one while `oshaani master-key rotate` has not run, or the one to come.",
        "",
        masked=shapes.hidden,
    ),
    Setting(
        "master_key_file",
        ("OSHAANI_MASTER_KEY_FILE",),
        shapes.FILE,
        "File that holds the master key; by default master.key in the data folder, made when missing.",
    ),
    Setting(
        "plans",
        ("OSHAANI_PLAN_LIMITS",),
        shapes.PLAN_LIMITS,
        "Daily limits that differ from the built-in plans'.",
        "{}",
    ),
    Setting(
        "metrics_token",
        ("OSHAANI_METRICS_TOKEN",),
        shapes.TOKEN,
        "Bearer token for /metrics; without it only this machine may read them.",
        masked=shapes.hidden,
    ),
    Setting(
        "slot",
        ("OSHAANI_SLOT",),
        shapes.SLOT,
        "Name of this worker process, the same after every restart; what its earlier life left is then taken over "
        "at once. No two may have the same.",
    ),
    Setting(
        "worker_host",
        ("OSHAANI_WORKER_HOST",),
        shapes.HOST,
        "Address where a worker process answers /healthz, /readyz and /metrics.",
        "127.0.0.1",
    ),
    Setting("worker_port", ("OSHAANI_WORKER_PORT",), shapes.ANY_PORT, "Port of that; 0: any free one.", "0"),
    Setting("log_level", ("OSHAANI_LOG_LEVEL",), shapes.LOG_LEVEL, "How much is logged.", "info"),
    Setting(
        "turn_deadline_s",
        ("OSHAANI_TURN_DEADLINE_S",),
        shapes.SECONDS,
        "Seconds after which an unfinished turn fails.",
        "300",
    ),
    Setting(
        "model_timeout_s",
        ("OSHAANI_MODEL_TIMEOUT_S",),
        shapes.SECONDS,
        "Seconds one model call may take.",
        "60",
    ),
    Setting("session_days", ("OSHAANI_SESSION_DAYS",), shapes.DAYS, "Days a login lasts.", "14"),
)


_SETTINGS = {setting.field: setting for setting in TABLE}


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read everything from `environment` (this process's by default) and the file it or the folder names.

    An empty variable counts as not set.

    Raises:
        SettingsInvalid: naming every setting that is wrong or missing.
    """
    return _Reading(os.environ if environment is None else environment).settings()


def describe(settings: Settings) -> list[SettingLine]:
    """Every setting with where its value came from, in the table's order."""
    return list(settings.lines)


class _Reading:
    """One pass over the table; faults are gathered, not raised, until the pass is over."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.faults: list[str] = []
        self.values: dict[str, Any] = {}
        self.said: dict[str, tuple[str, str]] = {}  # Field to text and source.
        self.file = Path(environment.get(CONFIG_VARIABLE) or CONFIG_FILE)
        self.file_says = self._file()

    def settings(self) -> Settings:
        for setting in TABLE:
            self.values[setting.field] = self._value(setting)
        self._check_master_key()
        self._check_kafka()
        if self.faults:
            raise SettingsInvalid(self.faults)
        self._derive()
        return Settings(**self.values, lines=tuple(self._line(setting) for setting in TABLE))

    def _value(self, setting: Setting) -> object:
        name, text, source = self._text(setting)
        self.said[setting.field] = (text or "", source)
        if text is None:
            return None
        try:
            return setting.shape.read(text)
        except (ValueError, RuntimeError):  # RuntimeError: `~` of a user without a home.
            shown = "" if setting.is_secret else f" {text!r}"
            self.faults.append(
                f"{name}{shown} ({source}) must be {setting.shape.text}; for example {name}={setting.shape.example}"
            )
            return None

    def _text(self, setting: Setting) -> tuple[str, str | None, str]:
        for name in setting.names:
            if text := self.environment.get(name, "").strip():
                return name, text, ENVIRONMENT
        for name in setting.names:
            if text := self.file_says.get(name, "").strip():
                return name, text, str(self.file)
        return setting.names[0], setting.default, UNSET if not setting.default else DEFAULT

    def _file(self) -> dict[str, str]:
        try:
            content = tomllib.loads(self.file.read_text("utf-8"))
        except FileNotFoundError:
            if self.environment.get(CONFIG_VARIABLE):
                self.faults.append(
                    f"{CONFIG_VARIABLE} {str(self.file)!r} does not exist; make it, or unset the variable"
                )
            return {}
        except (OSError, ValueError) as fault:
            self.faults.append(
                f"{CONFIG_VARIABLE} {str(self.file)!r} must be a readable TOML file ({fault}); "
                "for example a line OSHAANI_PORT = 8080"
            )
            return {}
        known = {name for setting in TABLE for name in setting.names}
        for name in sorted(content.keys() - known):
            self.faults.append(
                f"{name} ({self.file}) is not a setting; remove it, or see `oshaani settings` for the names"
            )
        return {name: _as_text(value) for name, value in content.items() if name in known}

    def _check_master_key(self) -> None:
        said = [self.said[name][1] != UNSET for name in ("given_master_key", "master_key_file")]
        if all(said):
            self.faults.append(
                "OSHAANI_MASTER_KEY and OSHAANI_MASTER_KEY_FILE must not both be set; unset one of them"
            )
        elif not any(said) and self.said["database_url"][1] != UNSET:
            self.faults.append(
                "OSHAANI_MASTER_KEY is missing: with DATABASE_URL it must be set, the same for every process, to "
                f"{shapes.KEY.text}; for example OSHAANI_MASTER_KEY={shapes.KEY.example}, or OSHAANI_MASTER_KEY_FILE"
            )
        if self.said["data_dir"][1] == UNSET and _default_data_dir(self.environment) is None:
            self.faults.append(
                "OSHAANI_DATA_DIR is missing and there is no HOME to choose it from; "
                f"for example OSHAANI_DATA_DIR={shapes.FOLDER.example}"
            )

    def _check_kafka(self) -> None:
        """A login and a certificate each need all their parts, and a protocol that uses them."""
        protocol = self.values["kafka_security_protocol"]
        if protocol is None:
            return  # It was said, and is wrong.
        said = {name for name in KAFKA_LOGIN + KAFKA_CERTIFICATES if self.said[name][1] != UNSET}
        if protocol.startswith("SASL_"):
            self._need(KAFKA_LOGIN, said, f"with KAFKA_SECURITY_PROTOCOL={protocol}")
        else:
            self._refuse(KAFKA_LOGIN, said, "a login", "SASL_SSL")
        if not protocol.endswith("SSL"):
            self._refuse(KAFKA_CERTIFICATES, said, "encryption", "SSL or SASL_SSL")
        elif own := said.intersection(KAFKA_CERTIFICATES[1:]):
            self._need(KAFKA_CERTIFICATES[1:], said, f"with {self._variable(own.pop())}")

    def _need(self, fields: tuple[str, ...], said: set[str], why: str) -> None:
        for name in fields:
            if name not in said:
                variable, shape = self._variable(name), _SETTINGS[name].shape
                self.faults.append(
                    f"{variable} is missing: {why} it must be set, to {shape.text}; for example {variable}={shape.example}"
                )

    def _refuse(self, fields: tuple[str, ...], said: set[str], without: str, protocols: str) -> None:
        for name in fields:
            if name in said:
                self.faults.append(
                    f"{self._variable(name)} has no effect without {without}; set KAFKA_SECURITY_PROTOCOL to {protocols}, "
                    "or unset it"
                )

    @staticmethod
    def _variable(name: str) -> str:
        return _SETTINGS[name].names[0]

    def _derive(self) -> None:
        """Fill in what follows from other settings."""
        values = self.values
        host = _ANY_ADDRESS.get(values["host"], values["host"])
        derived: dict[str, Any] = {
            "base_url": f"http://{bracketed(host)}:{values['port']}",
            "data_dir": _default_data_dir(self.environment),
            "openai_base_url": OPENAI_URL if values["openai_api_key"] else None,
        }
        derived["master_key_file"] = Path(values["data_dir"] or derived["data_dir"]) / "master.key"
        for name, value in derived.items():
            if values[name] is None and value is not None:
                values[name] = value
                self.said[name] = (str(value), DERIVED)

    def _line(self, setting: Setting) -> SettingLine:
        text, source = self.said[setting.field]
        return SettingLine(setting.names[0], setting.masked(text), source, setting.description)


def _as_text(value: object) -> str:
    """A value of the file as the variable of the same name would have it."""
    if isinstance(value, list):
        return ",".join(str(part) for part in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _default_data_dir(environment: Mapping[str, str]) -> Path | None:
    """The XDG base directory specification's data home: an absolute path, or `~/.local/share`."""
    if os.geteuid() == 0:
        return ROOT_DATA_DIR
    data_home = Path(environment.get("XDG_DATA_HOME", ""))
    if data_home.is_absolute():
        return data_home / "oshaani"
    home = environment.get("HOME")
    return Path(home) / ".local" / "share" / "oshaani" if home else None
