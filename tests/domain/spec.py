"""given(…).when(…).then(…) for aggregates.

Every `when` also proves two things that no test has to name: deciding on a fork leaves the original as it was, and
replaying the events from the first gives the same state as having lived through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, Generic, TypeVar

import pytest
from eventsourcing.domain import CanMutateAggregate

from domain.aggregate import Root
from domain.errors import Refusal

RootT = TypeVar("RootT", bound=Root)
Event = CanMutateAggregate[Any]
Step = Callable[[RootT], object]


def state_of(root: Root) -> dict[str, Any]:
    """Everything an aggregate knows, without the events that wait to be written."""
    return {name: value for name, value in vars(root).items() if name != "_pending_events"}


def replayed(events: Iterable[Event]) -> Any:
    """The aggregate that these events make."""
    root: Any = None
    for event in events:
        root = event.mutate(root)
    return root


def given(beginning: Callable[[], RootT] | RootT | Sequence[Event], *steps: Step[RootT]) -> Given[RootT]:
    """An aggregate from its first method call or from its events, after these steps."""
    if isinstance(beginning, Root):
        root, history = beginning, list(beginning.pending_events)
    elif callable(beginning):
        root = beginning()
        history = list(root.pending_events)
    else:
        root, history = replayed(beginning), list(beginning)
    root.pending_events.clear()
    for step in steps:
        step(root)
    history += root.collect_events()
    return Given(root, history)


class Given(Generic[RootT]):
    """An aggregate and the events that made it."""

    def __init__(self, root: RootT, history: Sequence[Event]) -> None:
        assert state_of(replayed(history)) == state_of(root)
        self.root, self.history = root, list(history)

    def when(self, *steps: Step[RootT]) -> When[RootT]:
        """Take the steps on a fork."""
        before = deepcopy(state_of(self.root))
        fork = self.root.fork()
        fork._pending_events = []
        result: object = None
        refusal: Refusal | None = None
        try:
            for step in steps:
                result = step(fork)
        except Refusal as no:
            refusal = no
        assert state_of(self.root) == before, "deciding on a fork has changed the original"
        events = list(fork.pending_events)
        assert state_of(replayed([*self.history, *events])) == state_of(fork)
        return When(fork, events, result, refusal)


class When(Generic[RootT]):
    """What came of it: `events` are new, `result` is what the last step returned."""

    def __init__(
        self, root: RootT, events: list[Any], result: object = None, refusal: Refusal | None = None
    ) -> None:
        self.root, self.events, self.result, self.refusal = root, events, result, refusal

    def then(self, *event_classes: type[Any], **state: object) -> When[RootT]:
        """Exactly these events happened, and the aggregate has these attributes now."""
        if self.refusal is not None:
            raise self.refusal
        assert [type(event) for event in self.events] == list(event_classes)
        assert {name: getattr(self.root, name) for name in state} == state
        return self

    def then_returned(self, result: object) -> When[RootT]:
        """The last step answered this."""
        assert self.result == result
        return self

    def then_refused(self, refusal: type[Refusal], **facts: object) -> When[RootT]:
        """The last step was refused, for these reasons."""
        if self.refusal is None:
            pytest.fail(f"not refused; {[type(event).__name__ for event in self.events]} happened")
        assert type(self.refusal) is refusal, self.refusal
        assert {name: self.refusal.facts[name] for name in facts} == facts
        return self
