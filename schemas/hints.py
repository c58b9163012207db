"""What processes tell each other after a commit, so that nobody has to wait for a broker or a poll to hear of it.

Nothing depends on a hint: whatever it sets off follows from records that come anyway.
"""

from __future__ import annotations

from base64 import b85decode, b85encode
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import msgspec

from domain.conversation import Conversation
from domain.turn import Turn
from schemas.records import AnyRecord

NAMED_MAX = 80  # turns in one hint, so that it fits into a notification of 8000 bytes
_AWAITED = (
    Turn.Accepted,
    Turn.ModelCallCompleted,
    Turn.ModelCallFailed,
    Turn.ToolCallRequested,
    Turn.ToolCalled,
    Turn.ToolCallOutcomeUnknown,
    *(Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled),
)


class Step(NamedTuple):
    """A turn that has something to do for a worker, as of this version of its stream."""

    turn_id: UUID
    tenant_id: UUID
    version: int


class Hint(NamedTuple):
    """That the log has grown.

    `heads`: where the shards that grew end now. `turns`: those of which whoever follows them wants to hear; None when they
    are too many to be named. `steps`: turns to be taken up, perhaps not all of them.
    """

    heads: Mapping[int, int]
    turns: frozenset[UUID] | None
    steps: tuple[Step, ...]


NOTHING_NEW = Hint({}, frozenset(), ())


class News:
    """What is to be told next. Commits that are told of together become one hint."""

    def __init__(self) -> None:
        self._heads: dict[int, int] = {}
        self._turns: set[UUID] = set()
        self._steps: list[Step] = []

    def add(self, records: Sequence[AnyRecord]) -> None:
        """These are committed."""
        for record in records:
            self._heads[record.shard] = record.position
            event = record.event
            if isinstance(event, _AWAITED):
                self._turns.add(record.stream_id)
                if isinstance(event, Turn.ToolCalled | Turn.ToolCallOutcomeUnknown) or (
                    isinstance(event, Turn.Accepted) and not event.queued and not event.invoked
                ):
                    self._steps.append(Step(record.stream_id, record.tenant_id, record.stream_version))
            elif isinstance(event, Conversation.TurnActivated):
                self._steps.append(Step(event.turn_id, record.tenant_id, 1))

    def take(self) -> Hint | None:
        """All of it, once."""
        if not self._heads:
            return None
        turns = frozenset(self._turns) if len(self._turns) <= NAMED_MAX else None
        hint = Hint(self._heads, turns, tuple(self._steps[:NAMED_MAX]))
        self._heads, self._turns, self._steps = {}, set(), []
        return hint


_encode = msgspec.msgpack.Encoder(uuid_format="bytes").encode
_decode = msgspec.msgpack.Decoder(Hint).decode


def written(hint: Hint) -> str:
    """A hint as the text of a notification."""
    return b85encode(_encode(hint)).decode("ascii")


def read(text: str) -> Hint | None:
    """The hint that `written` wrote; None for what anybody else may say."""
    try:
        return _decode(b85decode(text))
    except (ValueError, msgspec.MsgspecError):
        return None
