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
from schemas.records import AnyRecord
from schemas.turn_feed import Token

PARTIALS_MAX = 10_000  # texts under way that are kept for whoever reconnects
PARTIAL_CHARS_MAX = 1_000_000


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
        self._followers: dict[UUID, list[MemoryFollower]] = {}
        self._partials: dict[UUID, Token] = {}

    @contextmanager
    def follow(self, turn_id: TurnId) -> Iterator[MemoryFollower]:
        follower = MemoryFollower(self._partials.get(turn_id))
        self._followers.setdefault(turn_id, []).append(follower)
        try:
            yield follower
        finally:
            left = self._followers[turn_id]
            left.remove(follower)
            if not left:
                del self._followers[turn_id]

    def token(self, turn_id: TurnId, iteration: int, attempt: int, text: str) -> None:
        before = self._partials.get(turn_id)
        same = before is not None and (before.iteration, before.attempt) == (iteration, attempt)
        self.pass_on(Token(turn_id, iteration, attempt, len(before.text) if same and before else 0, text))

    def pass_on(self, token: Token) -> None:
        """Keep a piece of text for whoever reconnects, if all before it is at hand, and give it to the followers."""
        before = self._partials.get(token.turn_id)
        same = before is not None and before[1:3] == token[1:3]
        written = before.text if same and before else ""
        room = same or len(self._partials) < PARTIALS_MAX
        if token.start == len(written) < PARTIAL_CHARS_MAX and room:
            self._partials[TurnId(token.turn_id)] = token._replace(start=0, text=written + token.text)
        elif not same:
            self._partials.pop(token.turn_id, None)
        for follower in self._followers.get(token.turn_id, ()):
            follower.take(token)

    def is_followed(self, turn_id: UUID) -> bool:
        """Whether somebody waits for the turn."""
        return turn_id in self._followers

    def publish(self, records: Sequence[AnyRecord]) -> None:
        """Tell followers of what was committed."""
        for record in records:
            turn_id = turn_of(record)
            if turn_id is None:
                continue
            if isinstance(record.event, Turn.ModelCallCompleted | Turn.ModelCallFailed | Turn.Ended):
                self._partials.pop(turn_id, None)
            for follower in self._followers.get(turn_id, ()):
                follower.take(record)


def turn_of(record: AnyRecord) -> UUID | None:
    """The turn that a record is about, if it says something to whoever waits for it."""
    match record.event:
        case Turn.Event():
            return record.stream_id
        case Conversation.AssistantReplied(turn_id=turn_id) | Conversation.TurnActivated(turn_id=turn_id):
            return turn_id
        case _:
            return None


def is_last(record: AnyRecord) -> bool:
    """Whether nothing more comes about this turn that its user would wait for."""
    event = record.event
    if isinstance(event, Turn.Completed):
        return event.conversation_id is None  # otherwise the answer follows in the same commit
    return isinstance(event, Turn.Ended | Conversation.AssistantReplied)
