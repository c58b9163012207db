"""Commands, their handlers, and what a handler may touch.

A handler is a plain function `(command, write) -> result`: it decides on aggregates in memory and does no I/O, so the
bus can run it again on fresher state, or together with its neighbours in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, TypeVar, cast
from uuid import UUID

from eventsourcing.domain import AggregateEvent

from domain.aggregate import Root
from domain.credit_account import CreditAccount
from domain.errors import NotFound, Refusal
from domain.event_log import DueChange, DueKind
from domain.ids import CommandId, UserId
from domain.plans import DEFAULT_PLANS, Limits
from domain.prices import RateCard, rate_card_at

Result = dict[str, Any]
Events = list[AggregateEvent]
AggregateT = TypeVar("AggregateT", bound=Root)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something asked of the system on behalf of a tenant: the user who owns, and pays for, what it touches."""

    tenant_id: UserId

    def reads(self) -> tuple[UUID, ...]:
        """Streams the handler will want; naming them here saves round trips, leaving some out costs only those."""
        return ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an accepted command. `seen`: it had been served before, this is what it gave then."""

    result: Result
    shard: int
    position: int
    seen: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """What operators set once for all commands."""

    plans: Mapping[str, Limits] = field(default_factory=lambda: DEFAULT_PLANS)
    free_credits_ncr: int = 200_000_000_000
    turn_deadline_s: float = 300.0


class NotLoaded(Exception):
    """A handler asked for a stream that is not in memory; the bus loads it and runs the handler again."""

    def __init__(self, stream_id: UUID) -> None:
        super().__init__(stream_id)
        self.stream_id = stream_id


class WriteSide:
    """What a handler sees: aggregates of its tenant, the clock, the rules. One for each run of a handler."""

    def __init__(
        self,
        known: Callable[[UUID], Root | None],
        rules: Rules,
        now: datetime,
        command_id: CommandId,
        actor: str,
        shard: int,
        tenant_id: UserId,
    ) -> None:
        self._known = known
        self.rules, self.now, self.command_id, self.actor = rules, now, command_id, actor
        self._shard, self._tenant_id = shard, tenant_id
        self.touched: dict[int, Root] = {}  # by the number of its id
        self.due_changes: dict[int, DueChange] = {}

    def find(self, aggregate_class: type[AggregateT], id: UUID) -> AggregateT | None:
        """The aggregate, to decide on; None when its stream does not exist or holds something else."""
        found = self.touched.get(id.int)
        if found is None:
            known = self._known(id)
            if known is None:
                return None
            found = self.touched[id.int] = known.fork()
        return found if isinstance(found, aggregate_class) else None

    def look(self, aggregate_class: type[AggregateT], id: UUID) -> AggregateT:
        """The aggregate as it is, only to look at: cheaper than `get`, and nothing may be decided on it.

        Raises:
            NotFound: no such thing of this tenant.
        """
        found = self.touched.get(id.int) or self._known(id)
        if not isinstance(found, aggregate_class):
            raise NotFound(noun_of(aggregate_class))
        return found

    def get(self, aggregate_class: type[AggregateT], id: UUID) -> AggregateT:
        """The aggregate, to decide on.

        Raises:
            NotFound: no such thing of this tenant.
        """
        found = self.find(aggregate_class, id)
        if found is None:
            raise NotFound(noun_of(aggregate_class))
        return found

    def add(self, aggregate: AggregateT) -> AggregateT:
        """Take a new aggregate in; its stream must not exist."""
        self.touched[aggregate.id.int] = aggregate
        return aggregate

    def due(self, kind: DueKind, id: UUID, stream_id: UUID, at: datetime, claimed_by: str = "") -> None:
        """Have somebody look after `id` at that time, even if nobody hears of this command's events."""
        self.due_changes[id.int] = DueChange(
            self._shard, kind, id, stream_id, self._tenant_id, at, claimed_by
        )

    def done(self, kind: DueKind, id: UUID, stream_id: UUID) -> None:
        """Nobody needs to look after `id` any more."""
        self.due_changes[id.int] = DueChange(self._shard, kind, id, stream_id, self._tenant_id, None, "")

    def new_events(self) -> list[AggregateEvent]:
        """What was decided, aggregate by aggregate in the order in which they were touched."""
        return [event for root in self.touched.values() for event in cast(Events, root.pending_events)]

    def limits_of(self, account: CreditAccount) -> Limits:
        """The daily limits of the account's plan."""
        return self.rules.plans[account.plan]

    @property
    def prices(self) -> RateCard:
        """The rate card in force now."""
        return rate_card_at(self.now)


Handler = Callable[[Any, WriteSide], Result | None]
HandlerT = TypeVar("HandlerT", bound=Callable[..., Result | None])
HANDLERS: dict[type[Command], Handler] = {}


def handles(command_class: type[Command]) -> Callable[[HandlerT], HandlerT]:
    """Declare the handler of a command."""

    def declare(handler: HandlerT) -> HandlerT:
        if command_class in HANDLERS:
            raise ValueError(f"two handlers for {command_class.__name__}")
        HANDLERS[command_class] = cast(Handler, handler)
        return handler

    return declare


class IdempotencyKeyReused(Refusal):
    """The command id was used before for something else."""

    code: ClassVar[str] = "idempotency_key_reused"


class RefusedBefore(Refusal):
    """The command was refused before in a way that asking again cannot change; this is that refusal."""

    def __init__(self, code: str, sentence: str, facts: Mapping[str, Any]) -> None:
        super().__init__(sentence, **facts)
        self.code = code  # type: ignore[misc]


def noun_of(aggregate_class: type[Root]) -> str:
    """What people call it: "credit account" for CreditAccount."""
    words = "".join(
        f" {letter.lower()}" if letter.isupper() else letter for letter in aggregate_class.__name__
    )
    return words.strip()
