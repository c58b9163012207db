"""Turns followed within one process: the worker, the log's commits and the waiting requests all live in it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from uuid import UUID

from domain.conversation import Conversation
from domain.ids import TurnId
from domain.turn import Turn
from schemas.codec import EVENT_TYPES
from schemas.records import AnyRecord, Record
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
    """Implements `Follower`; hears of the turn while it is entered. One task at a time waits on it."""

    def __init__(self, feed: MemoryTurnFeed, turn_id: TurnId) -> None:
        self.partial: Token | None = None
        self._feed, self._number = feed, turn_id.int
        self._items: deque[AnyRecord | Token] = deque()
        self._records: list[AnyRecord] = []
        self._is_over = False
        self._waiting: asyncio.Future[None] | None = None
        self._waits_for_end = False

    def __enter__(self) -> MemoryFollower:
        self.partial = self._feed.partials.get(self._number)
        self._feed.followers.setdefault(self._number, []).append(self)
        return self

    def __exit__(self, *failure: object) -> None:
        followers = self._feed.followers[self._number]
        followers.remove(self)
        if not followers:
            del self._feed.followers[self._number]

    async def next(self, timeout_s: float) -> AnyRecord | Token | None:
        if not self._items:
            self._waits_for_end = False
            await self._wait(timeout_s)
        return self._items.popleft() if self._items else None

    async def end(self, timeout_s: float) -> list[AnyRecord] | None:
        if not self._is_over:
            self._waits_for_end = True
            await self._wait(timeout_s)
        return self._records if self._is_over else None

    def take(self, item: AnyRecord | Token) -> None:
        """Somebody published something about the turn."""
        self._items.append(item)
        if isinstance(item, Record):
            self._records.append(item)
            self._is_over = self._is_over or is_last(item)
        if self._waiting is not None and (self._is_over or not self._waits_for_end):
            _wake(self._waiting)

    async def _wait(self, timeout_s: float) -> None:
        # A timer and a future: `asyncio.timeout` and `asyncio.wait` cost several times that, and every chat waits here.
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        timer = loop.call_later(timeout_s, _wake, self._waiting)
        try:
            await self._waiting
        finally:
            timer.cancel()
            self._waiting = None


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class MemoryTurnFeed:
    """Implements `TurnFeed`. Its followers and the texts under way are kept by the number of the turn's id."""

    def __init__(self) -> None:
        self.followers: dict[int, list[MemoryFollower]] = {}
        self.partials: dict[int, Token] = {}

    def follow(self, turn_id: TurnId) -> MemoryFollower:
        return MemoryFollower(self, turn_id)

    def token(self, turn_id: TurnId, iteration: int, attempt: int, text: str) -> None:
        before = self.partials.get(turn_id.int)
        same = before is not None and (before.iteration, before.attempt) == (iteration, attempt)
        self.pass_on(Token(turn_id, iteration, attempt, len(before.text) if same and before else 0, text))

    def pass_on(self, token: Token) -> None:
        """Keep a piece of text for whoever reconnects, if all before it is at hand, and give it to the followers."""
        before = self.partials.get(token.turn_id.int)
        same = before is not None and before[1:3] == token[1:3]
        written = before.text if same and before else ""
        room = same or len(self.partials) < PARTIALS_MAX
        if token.start == len(written) < PARTIAL_CHARS_MAX and room:
            self.partials[token.turn_id.int] = token._replace(start=0, text=written + token.text)
        elif not same:
            self.partials.pop(token.turn_id.int, None)
        for follower in self.followers.get(token.turn_id.int, ()):
            follower.take(token)

    def is_followed(self, turn_id: UUID) -> bool:
        """Whether somebody waits for the turn."""
        return turn_id.int in self.followers

    def publish(self, records: Sequence[AnyRecord]) -> None:
        """Tell followers of what was committed."""
        for record in records:
            turn_id = turn_of(record)
            if turn_id is None:
                continue
            if self.partials and type(record.event) in _SETTLING:
                self.partials.pop(turn_id.int, None)
            for follower in self.followers.get(turn_id.int, ()):
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
