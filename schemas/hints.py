"""What processes tell each other after a commit, so that nobody has to wait for a broker or a poll to hear of it.

A hint brings what was committed along where that fits, so that whoever goes on with it need not read it. Nothing depends
on a hint: whatever it sets off follows from records that come anyway, and what did not come is read from the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from domain.conversation import Conversation
from domain.event_log import StoredEvent
from domain.turn import Turn
from schemas.records import AnyRecord

BYTES_MAX = 5_950  # of a hint, so that it fits into a notification of 7999 bytes as base64, sealed
NAMED_MAX = 80  # turns in one hint, so that it fits without rows
STEPS_MAX = 40  # likewise
ROWS_BYTES_MAX = 32_000  # of rows that may fit: a quarter is left of them when they are compressed
ROW_BYTES = 300  # what a row takes besides its two parts, and the naming of its turn
FASTEST = 1  # of zstd's levels
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
    """A turn that has something to do, as of this version of its stream: for `worker`, or for any when that is "".

    `conversation_id`: what else whoever begins it will look up, if that is known.
    """

    turn_id: UUID
    tenant_id: UUID
    version: int
    worker: str = ""
    conversation_id: UUID | None = None


class Serving(NamedTuple):
    """That a worker takes up the turns of these shards."""

    worker: str
    shards: tuple[int, ...]


class Hint(NamedTuple):
    """That the log has grown.

    `heads`: where the shards that grew end now. `turns`: those of which whoever follows them wants to hear; None when they
    are too many to be named. `steps`: turns to be taken up, perhaps not all of them. `rows`: what was committed, in
    order, if it fits; else none. `serving`: who says it, if it is a worker.
    """

    heads: Mapping[int, int]
    turns: frozenset[UUID] | None
    steps: tuple[Step, ...]
    rows: tuple[StoredEvent, ...] = ()
    serving: Serving | None = None


NOTHING_NEW = Hint({}, frozenset(), ())


class News:
    """What is to be told next. Commits that are told of together become one hint."""

    def __init__(self) -> None:
        self._heads: dict[int, int] = {}
        self._turns: set[UUID] = set()
        self._steps: list[Step] = []
        self._rows: list[StoredEvent] = []
        self._rows_bytes = 0

    def add(self, records: Sequence[AnyRecord], rows: Sequence[StoredEvent] = ()) -> None:
        """These are committed; with their `rows`, if whoever hears of them shall have those."""
        for record in records:
            self._heads[record.shard] = record.position
            event = record.event
            if isinstance(event, _AWAITED):
                self._turns.add(record.stream_id)
                step = Step(record.stream_id, record.tenant_id, record.stream_version)
                if isinstance(event, Turn.ToolCalled | Turn.ToolCallOutcomeUnknown):
                    self._steps.append(step)
                elif isinstance(event, Turn.Accepted) and not event.queued and not event.invoked:
                    self._steps.append(step._replace(conversation_id=event.conversation_id))
            elif isinstance(event, Turn.ModelCallStarted):
                if self._steps and self._steps[-1].turn_id == record.stream_id:
                    self._steps[-1] = self._steps[-1]._replace(worker=event.worker)
            elif isinstance(event, Conversation.TurnActivated):
                self._steps.append(Step(event.turn_id, record.tenant_id, 1, "", record.stream_id))
        self._rows_bytes += sum(ROW_BYTES + len(row.payload) + len(row.personal or b"") for row in rows)
        if self._rows_bytes <= ROWS_BYTES_MAX:
            self._rows += rows

    def take(self) -> Hint | None:
        """All of it, once."""
        if not self._heads:
            return None
        turns = frozenset(self._turns) if len(self._turns) <= NAMED_MAX else None
        # Some of many would save nobody the look at the log, which costs the less for each the more there are.
        rows = tuple(self._rows) if self._rows_bytes <= ROWS_BYTES_MAX else ()
        hint = Hint(self._heads, turns, tuple(self._steps[:STEPS_MAX]), rows)
        self._heads, self._turns, self._steps, self._rows, self._rows_bytes = {}, set(), [], [], 0
        return hint


_encode = msgspec.msgpack.Encoder(uuid_format="bytes").encode
_decode = msgspec.msgpack.Decoder(Hint).decode
_MAGIC = b"\x28\xb5\x2f\xfd"  # how zstd begins (RFC 8878 §3.1.1), and no hint in msgpack does


def written(hint: Hint) -> bytes:
    """A hint as it is sent: compressed if it must be to fit, and without its rows when they do not fit even so."""
    body = _encode(hint)
    if len(body) > BYTES_MAX:
        body = bytes(_cramjam().zstd.compress(body, FASTEST))
    return body if len(body) <= BYTES_MAX or not hint.rows else written(hint._replace(rows=()))


def read(body: bytes) -> Hint | None:
    """The hint that `written` wrote; None for what anybody else may say."""
    try:
        return _decode(_decompressed(body) if body.startswith(_MAGIC) else body)
    except (ValueError, msgspec.MsgspecError):
        return None


def _decompressed(body: bytes) -> bytes:
    try:
        return bytes(_cramjam().zstd.decompress(body))
    except _cramjam().DecompressionError as damaged:
        raise ValueError(str(damaged)) from damaged


@cache
def _cramjam() -> Any:
    # It takes 2 MB, and a process that is alone has nobody to tell anything.
    import cramjam

    return cramjam
