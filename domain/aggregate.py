"""What every aggregate shares: the library's event machinery, and forks.

A public method decides (may refuse, runs once); an event's `apply` changes state (runs on every replay: no checks,
no clock, no randomness). Event classes are written out rather than derived from method signatures, so that their
fields are typed wherever records are handled (docs/adr/0003).
"""

from __future__ import annotations

from typing import Annotated, Any, Self
from uuid import UUID

from eventsourcing.domain import AggregateCreated, AggregateEvent, BaseAggregate

PERSONAL = "personal"
PersonalText = Annotated[str | None, PERSONAL]
"""Text about a person: sealed under the key of its subject, None once that key is destroyed."""


class Root(BaseAggregate[UUID]):
    """An aggregate whose state is replaced, never mutated in depth: nested values are treated as immutable."""

    class Event(AggregateEvent):
        """A fact about the aggregate. Fields are added with defaults or as a new version with an upcaster."""

        class_version = 1

    @classmethod
    def begin(cls, created: type[AggregateCreated], id: UUID, **facts: Any) -> Self:
        """A new aggregate with the given id and its first event pending."""
        return cls._create(created, id=id, **facts)

    def trigger_event(self, event_class: type[Any], **facts: Any) -> None:
        """Record a fact and apply it.

        As the library's own, without looking up the event's topic anew each time: every class that can be triggered
        here is declared in its aggregate, which registers it once.
        """
        event = event_class(
            originator_id=self._id,
            originator_version=self._version + 1,
            timestamp=event_class.create_timestamp(),
            **facts,
        )
        event.mutate(self)
        self._pending_events.append(event)

    def fork(self) -> Self:
        """A copy to decide on: its containers are copied one level deep, its pending events are its own."""
        twin = object.__new__(type(self))
        state = twin.__dict__
        for name, value in self.__dict__.items():
            state[name] = value.copy() if type(value) in (dict, list, set) else value
        twin._pending_events = []  # what the original has decided is the original's to record
        return twin


Created = AggregateCreated
