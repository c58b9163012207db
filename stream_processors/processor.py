"""What a processor is, and what it may use.

A processor is a plain async function `(record, work)`. It returns as soon as what it had to secure is in the log; long
work goes on in the background of its worker, remembered by a due row rather than by whoever delivered the record. A
redelivered record finds the work claimed, or done, and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Generic, Literal, Protocol, TypeVar
from uuid import UUID

from commands.bus import Bus, Overloaded
from commands.command import Command, Outcome
from domain.agent import Agent
from domain.configuration import Settings
from domain.event_log import EventLog, LogUnavailable
from domain.ports import (
    Clock,
    Egress,
    KeyRing,
    Logins,
    ModelCard,
    ModelReply,
    ModelRequest,
    Sessions,
    Tool,
    Vault,
    WebhookSecrets,
)
from schemas.records import AnyRecord, Records
from schemas.turn_feed import TurnFeed
from stream_processors.history import ConversationHistory
from stream_processors.publication import Publication

log_of = logging.getLogger(__name__)

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

MODEL_CALLS_MAX = 256  # under way at once in one worker
TOOL_CALLS_MAX = 64
CALLBACKS_MAX = 64
TAKEN_UP_MAX = 10_000  # steps of turns, by version, that were begun before their records came
PERSIST_PAUSE_FIRST_S, PERSIST_PAUSE_MAX_S = 0.2, 2.0


class Models(Protocol):
    """The chat models of this server."""

    async def resolve(self, model_id: int) -> ModelCard | None:
        """The model behind the number that agents are configured with; None when it cannot be reached."""

    async def complete(
        self, name: str, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        """As `domain.ports.ChatModel.complete`, for the model `name` (`provider:model`)."""


class Toolbox(Protocol):
    """The tools of this server and of its agents."""

    def offered(self, agent: Agent, settings: Settings) -> Mapping[str, Tool]:
        """What the agent may use now: enabled, and able to run on this server."""


class UsageRows(Protocol):
    """Rows by key, each with the tenant's shard: a table that its host rebuilds from a topic."""

    def get(self, key: bytes) -> bytes | None:
        """The row as this worker has it."""

    def put(self, shard: int, key: bytes, value: bytes | None) -> Awaitable[None]:
        """Keep a row, or with None remove it: here at once, durably when what is returned has ended.

        Others may wait for the same: it must not be cancelled.
        """


@dataclass(frozen=True, slots=True)
class Running:
    """A model or tool call of a turn that this worker is at."""

    turn_id: UUID
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class WayOut:
    """What it takes to tell callers' servers something."""

    log: EventLog
    records: Records
    egress: Egress
    secrets: WebhookSecrets
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CALLBACKS_MAX))


@dataclass(frozen=True, slots=True)
class Erasing:
    """Where what is known of a person is kept outside the log, and the keys to what is in it."""

    keys: KeyRing
    vault: Vault
    logins: Logins
    sessions: Sessions


class Latest(Generic[KeyT, ValueT]):
    """What was put aside under keys, each to be taken once. Of what nobody takes, the latest `count_max` are kept."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._values: dict[KeyT, ValueT] = {}

    def put(self, key: KeyT, value: ValueT) -> None:
        self._values[key] = value
        if len(self._values) > self._count_max:
            del self._values[next(iter(self._values))]

    def take(self, key: KeyT) -> ValueT | None:
        return self._values.pop(key, None)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._values


@dataclass(slots=True)
class Work:
    """What processors use: one for each worker process."""

    worker: str
    bus: Bus
    models: Models
    toolbox: Toolbox
    history: ConversationHistory
    feed: TurnFeed
    clock: Clock
    model_timeout_s: float = 60.0
    model_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MODEL_CALLS_MAX))
    tool_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(TOOL_CALLS_MAX))
    out: WayOut | None = None  # without one, this worker leaves callbacks to others
    erasing: Erasing | None = None  # without it, erasures are left to others
    running: dict[UUID, Running] = field(default_factory=dict)
    planned: Latest[UUID, Any] = field(
        default_factory=lambda: Latest(MODEL_CALLS_MAX)
    )  # first calls, by turn
    begun: Latest[tuple[UUID, int], bool] = field(
        default_factory=lambda: Latest(TAKEN_UP_MAX)
    )  # calls, by attempt
    taken_up: Latest[tuple[UUID, int], bool] = field(
        default_factory=lambda: Latest(TAKEN_UP_MAX)
    )  # steps begun
    retry_at: Callable[[datetime], None] = lambda at: None
    publication: Publication | None = None  # of workers that publish
    usage_rows: UsageRows | None = None  # of the worker that watches usage

    @property
    def actor(self) -> str:
        """How this worker signs its commands."""
        return f"worker:{self.worker}"

    async def ask(self, command: Command, command_id: UUID, turn_id: UUID) -> Outcome:
        """Execute a command of a turn."""
        return await self.bus.execute(command, by=self.actor, command_id=command_id, correlation_id=turn_id)

    async def persist(self, command: Command, command_id: UUID, turn_id: UUID, until: datetime) -> Outcome:
        """Execute a command of this worker alone, and insist while the log cannot be reached.

        What was written although its answer was lost counts as not seen before: it is the caller's to go on with.
        """
        pause_s, lost = PERSIST_PAUSE_FIRST_S, False
        while True:
            try:
                outcome = await self.ask(command, command_id, turn_id)
                return replace(outcome, seen=False) if lost else outcome
            except (LogUnavailable, Overloaded) as failure:
                lost = lost or isinstance(failure, LogUnavailable)
                if self.clock() >= until:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, PERSIST_PAUSE_MAX_S)

    def spawn(self, id: UUID, turn_id: UUID, work: Coroutine[Any, Any, None]) -> None:
        """Go on with call `id` of a turn in the background; `running` knows it until it lets go of it."""
        task = asyncio.create_task(work)
        self.running[id] = Running(turn_id, task)
        task.add_done_callback(lambda done: self._ended(id, done))

    def stop(self, id: UUID) -> None:
        """Give up the call, if it is under way here."""
        running = self.running.pop(id, None)
        if running is not None:
            running.task.cancel()

    def stop_turn(self, turn_id: UUID) -> None:
        """Give up everything under way here for a turn."""
        for id in [id for id, running in self.running.items() if running.turn_id == turn_id]:
            self.stop(id)

    async def drain(self, timeout_s: float) -> None:
        """Let what runs come to its end; after `timeout_s` leave the rest to whoever takes over."""
        tasks = {running.task for running in self.running.values()}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _ended(self, id: UUID, task: asyncio.Task[None]) -> None:
        running = self.running.get(id)
        if running is not None and running.task is task:
            del self.running[id]
        if not task.cancelled() and (failure := task.exception()) is not None:
            # The due row remembers the step; the sweeper takes it up again.
            log_of.error("work on %s ended with %r", id, failure, exc_info=failure)


Handler = Callable[[AnyRecord, Work], Awaitable[Awaitable[None] | None]]


@dataclass(frozen=True, slots=True)
class Processor:
    """A named set of handlers by event class; its records may be delivered more than once.

    Records of one stream are handled one at a time, in the order of the log; with `order` "tenant", those of all
    streams of a tenant. A handler may return what is still to be waited for, such as a broker's acknowledgement: the
    record is finished when that is, but the next one in order need not wait for it.
    """

    name: str
    handlers: dict[type, Handler] = field(default_factory=dict)
    order: Literal["stream", "tenant"] = "stream"

    def on(self, *event_classes: type) -> Callable[[Handler], Handler]:
        """Declare who handles these events."""

        def declare(handler: Handler) -> Handler:
            for event_class in event_classes:
                self.handlers[event_class] = handler
            return handler

        return declare


def handlers_of(processors: Sequence[Processor]) -> dict[type, tuple[Handler, ...]]:
    """All handlers of each event class."""
    found: dict[type, tuple[Handler, ...]] = {}
    for processor in processors:
        for event_class, handler in processor.handlers.items():
            found[event_class] = (*found.get(event_class, ()), handler)
    return found
