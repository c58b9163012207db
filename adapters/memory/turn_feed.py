"""Turns followed within one process: the worker, the log's commits and the waiting requests all live in it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

from domain.conversation import Conversation
from domain.ids import TurnId
from domain.turn import Turn
from schemas.codec import EVENT_TYPES
from schemas.records import AnyRecord
from schemas.turn_feed import Token

PARTIALS_MAX = 10_000  # texts under way that are kept for whoever reconnects
PARTIAL_CHARS_MAX = 1_000_000


_OF_TURNS = frozenset(kind.event_class for kind in EVENT_TYPES.values() if kind.aggregate is Turn)
_ENDS = frozenset({Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled})
_SETTLING = _ENDS | {
    Turn.ModelCallCompleted,
    Turn.ModelCallFailed,
}  # after which a text under way is none any more
_LAST = _ENDS | {Conversation.AssistantReplied}


class MemoryFollower:
    """Implements `Follower`."""

    def __init__(self, partial: Token | None) -> None:
        self.partial = partial
        self._items: deque[AnyRecord | Token] = deque()
        self._news = asyncio.Event()
        self._records: list[AnyRecord] = []
        self._ended: asyncio.Future[list[AnyRecord]] = asyncio.get_running_loop().create_future()

    async def next(self, timeout_s: float) -> AnyRecord | Token | None:
        if not self._items:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                return None
        return self._items.popleft()

    async def end(self, timeout_s: float) -> list[AnyRecord] | None:
        done, _ = await asyncio.wait((self._ended,), timeout=timeout_s)
        return self._ended.result() if done else None

    def take(self, item: AnyRecord | Token) -> None:
        """Somebody published something about the turn."""
        self._items.append(item)
        self._news.set()
        if isinstance(item, Token):
            return
        self._records.append(item)
        if is_last(item) and not self._ended.done():
            self._ended.set_result(self._records)


class MemoryTurnFeed:
    """Implements `TurnFeed`."""

    def __init__(self) -> None:
        self._followers: dict[
            int, list[MemoryFollower]
        ] = {}  # by the number of the turn's id, as is the next
        self._partials: dict[int, Token] = {}

    @contextmanager
    def follow(self, turn_id: TurnId) -> Iterator[MemoryFollower]:
        number = turn_id.int
        follower = MemoryFollower(self._partials.get(number))
        self._followers.setdefault(number, []).append(follower)
        try:
            yield follower
        finally:
            left = self._followers[number]
            left.remove(follower)
            if not left:
                del self._followers[number]

    def token(self, turn_id: TurnId, iteration: int, attempt: int, text: str) -> None:
        before = self._partials.get(turn_id.int)
        same = before is not None and (before.iteration, before.attempt) == (iteration, attempt)
        self.pass_on(Token(turn_id, iteration, attempt, len(before.text) if same and before else 0, text))

    def pass_on(self, token: Token) -> None:
        """Keep a piece of text for whoever reconnects, if all before it is at hand, and give it to the followers."""
        before = self._partials.get(token.turn_id.int)
        same = before is not None and before[1:3] == token[1:3]
        written = before.text if same and before else ""
        room = same or len(self._partials) < PARTIALS_MAX
        if token.start == len(written) < PARTIAL_CHARS_MAX and room:
            self._partials[token.turn_id.int] = token._replace(start=0, text=written + token.text)
        elif not same:
            self._partials.pop(token.turn_id.int, None)
        for follower in self._followers.get(token.turn_id.int, ()):
            follower.take(token)

    def is_followed(self, turn_id: UUID) -> bool:
        """Whether somebody waits for the turn."""
        return turn_id.int in self._followers

    def publish(self, records: Sequence[AnyRecord]) -> None:
        """Tell followers of what was committed."""
        for record in records:
            turn_id = turn_of(record)
            if turn_id is None:
                continue
            if self._partials and type(record.event) in _SETTLING:
                self._partials.pop(turn_id.int, None)
            for follower in self._followers.get(turn_id.int, ()):
                follower.take(record)


def turn_of(record: AnyRecord) -> UUID | None:
    """The turn that a record is about, if it says something to whoever waits for it."""
    kind = type(record.event)
    if kind in _OF_TURNS:
        return record.stream_id
    if kind is Conversation.AssistantReplied or kind is Conversation.TurnActivated:
        turn_id: UUID = record.event.turn_id
        return turn_id
    return None


def is_last(record: AnyRecord) -> bool:
    """Whether nothing more comes about this turn that its user would wait for."""
    if type(record.event) is Turn.Completed:
        return record.event.conversation_id is None  # otherwise the answer follows in the same commit
    return type(record.event) in _LAST
