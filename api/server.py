"""Everything the HTTP layer needs from outside, in one place. `oshaani/` fills it in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from commands.bus import Bus
from commands.command import Rules
from commands.turn import SendMessage
from domain.agent import Agent
from domain.event_log import EventLog
from domain.ports import (
    ApiKeys,
    Clock,
    KeyUses,
    Logins,
    ModelCard,
    Passwords,
    Sessions,
    Tool,
    ToolKind,
    Vault,
    WebhookSecrets,
)
from projections.read_side import ReadSide
from schemas.records import Records
from schemas.turn_feed import TurnFeed


@dataclass(frozen=True, slots=True)
class NumberedModel:
    """A model as people choose it: `model_id` is the number that stands in an agent's configuration."""

    model_id: int
    card: ModelCard


class Models(Protocol):
    """The models that agents can be given."""

    async def cards(self) -> Sequence[NumberedModel]:
        """Those that can be reached now."""

    def knows(self, model_id: int) -> bool:
        """Whether the number ever stood for a model on this server."""


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as an agent's owner sees it. `reason` says why it is not available, with the fix."""

    name: str
    description: str
    kind: ToolKind
    parameters: Mapping[str, Any] | None
    available: bool
    reason: str | None


class Toolbox(Protocol):
    """The tools of this server and of one agent."""

    def offered(self, agent: Agent) -> Sequence[OfferedTool]:
        """Every tool the agent may know by name, whether its configuration enables it or not."""

    def get(self, name: str, agent: Agent) -> Tool | None:
        """The tool, built-in or the agent's own; None when there is none of this name."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be in order for the server to serve."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much, for HTTP."""

    sync_timeout_s: float = 120.0  # of a chat call; then the answer is polled for
    read_wait_s: float = 2.0  # for read models to have what the caller wrote
    session_s: float = 14 * 86_400.0
    heartbeat_s: float = 15.0  # between comments on a silent stream
    key_cache_s: float = 60.0  # a key's row; revocations, also by other processes, are heard from the log
    session_cache_s: float = 0.5  # how long a session ended by another process may go unnoticed


Prepare = Callable[[SendMessage], Awaitable[SendMessage]]
"""What is done to a message before it is decided."""


async def as_it_is(message: SendMessage) -> SendMessage:
    """The message, where others go on with it."""
    return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What `create_app` is given."""

    bus: Bus
    db: ReadSide
    feed: TurnFeed
    log: EventLog
    records: Records
    rules: Rules
    clock: Clock
    keys: ApiKeys
    key_uses: KeyUses
    logins: Logins
    sessions: Sessions
    passwords: Passwords
    vault: Vault
    webhook_secrets: WebhookSecrets
    models: Models
    toolbox: Toolbox
    base_url: str
    signing_key: bytes  # of cursors and CSRF tokens
    next_agent_number: Callable[[], Awaitable[int]]
    ready: Callable[[], Awaitable[Sequence[Check]]]
    prepare: Prepare = as_it_is
    metrics: CollectorRegistry = field(default_factory=CollectorRegistry)
    metrics_token: str | None = None  # without one, /metrics answers loopback only
    limits: Limits = field(default_factory=Limits)
    version: str = "0"
