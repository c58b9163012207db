"""What every aggregate shares: the library's event machinery, and forks.

A public method decides (may refuse, runs once); an event's `apply` changes state (runs on every replay: no checks,
no clock, no randomness). Event classes are written out rather than derived from method signatures, so that their
fields are typed wherever records are handled (docs/adr/0003).
"""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar
from uuid import UUID

from eventsourcing.domain import AggregateCreated, AggregateEvent, BaseAggregate

EventT = TypeVar("EventT", bound=AggregateEvent)

PERSONAL = "personal"
PersonalText = Annotated[str | None, PERSONAL]
"""Text about a person: sealed under the key of its subject, None once that key is destroyed."""


class Root(BaseAggregate[UUID]):
    """An aggregate whose state is replaced, never mutated in depth: nested values are treated as immutable."""

    TOPIC: ClassVar[str]

    class Event(AggregateEvent):
        """A fact about the aggregate. Fields are added with defaults or as a new version with an upcaster."""

        class_version = 1

    if not TYPE_CHECKING:
        # As the library's own, but read without a Python call each: there are dozens in every command.
        version = property(attrgetter("_version"), BaseAggregate.version.fset)
        pending_events = property(attrgetter("_pending_events"))

    @classmethod
    def begin(cls, created: type[AggregateCreated], id: UUID, **facts: Any) -> Self:
        """A new aggregate with the given id and its first event pending."""
        envelope = {
            "originator_topic": cls.TOPIC,
            "originator_id": id,
            "originator_version": cls.INITIAL_VERSION,
            "timestamp": datetime.now(UTC),
        }
        event = _made(created, envelope, facts)
        root = event.mutate(None)
        assert isinstance(root, cls)
        root._pending_events.append(event)
        return root

    def trigger_event(self, event_class: type[AggregateEvent], **facts: Any) -> None:  # type: ignore[override]
        """Record a fact and apply it.

        As the library's own, for events only, without looking up the event's topic anew each time (every class that
        can be triggered here is declared in its aggregate, which registers it once) and without proving that it is the
        next event of this very aggregate, which it is.
        """
        version, now = self._version + 1, datetime.now(UTC)
        envelope = {"originator_id": self._id, "originator_version": version, "timestamp": now}
        event = _made(event_class, envelope, facts)
        event.apply(self)
        self._version, self._modified_on = version, now
        self._pending_events.append(event)

    def fork(self) -> Self:
        """A copy to decide on: its containers are copied one level deep, its pending events are its own."""
        twin = object.__new__(type(self))
        state = twin.__dict__
        state.update(self.__dict__)
        for name, value in self.__dict__.items():
            if type(value) in _COPIED:
                state[name] = value.copy()
        twin._pending_events = []  # what the original has decided is the original's to record
        return twin


_COPIED = frozenset({dict, list, set})
_ENVELOPE = {"originator_topic", "originator_id", "originator_version", "timestamp"}


def _made(event_class: type[EventT], envelope: dict[str, Any], facts: dict[str, Any]) -> EventT:
    if facts.keys() != _facts_of(event_class):
        return event_class(**envelope, **facts)
    # What the event's `__init__` would do, which sets the fields of a frozen dataclass one by one.
    event = object.__new__(event_class)
    event.__dict__.update(envelope, **facts)
    return event


@cache
def _facts_of(event_class: type[AggregateEvent]) -> frozenset[str]:
    """The names of all fields of an event but the envelope's."""
    return frozenset({field.name for field in fields(event_class)} - _ENVELOPE)


Created = AggregateCreated
