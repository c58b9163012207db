"""What was said before in a conversation, read from the log itself and kept at hand while it is talked in."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from domain.conversation import Conversation
from domain.event_log import EventLog
from domain.ids import shard_of
from domain.prompt import FORGOTTEN, Exchange
from domain.turn import Turn
from schemas.codec import EVENT_TYPES
from schemas.records import AnyRecord, Records

CHARS_MAX = 20_000_000  # kept in all
CONVERSATIONS_MAX = 5_000
MESSAGES_MAX = 1_100  # kept of one conversation: what `max_history_messages` may ask for, and the queue
_OF_CONVERSATIONS = frozenset(
    kind.event_class for kind in EVENT_TYPES.values() if kind.aggregate is Conversation
)
EVENTS_PER_MESSAGE = 2  # a message may bring a queueing event with it


class _Entry(NamedTuple):
    version: int
    turn_id: UUID
    answer: bool
    text: str


@dataclass(slots=True)
class _Tail:
    """The latest messages of a conversation, complete from `since` to `version` of its stream."""

    since: int
    version: int
    entries: deque[_Entry] = field(default_factory=lambda: deque(maxlen=MESSAGES_MAX))
    char_count: int = 0


@dataclass(frozen=True, slots=True)
class Past:
    """What a turn knows when it begins. Versions are those of the first and last message used, 0 for none."""

    exchanges: Sequence[Exchange]
    question: str

    @property
    def versions(self) -> tuple[int, int]:
        if not self.exchanges:
            return 0, 0
        return self.exchanges[0].asked_version, self.exchanges[-1].answered_version


NO_PAST = Past((), "")


class ConversationHistory:
    """The past of conversations; `observe` keeps it current with what this process commits."""

    def __init__(self, log: EventLog, records: Records) -> None:
        self._log, self._records = log, records
        self._tails: OrderedDict[UUID, _Tail] = OrderedDict()
        self._char_count = 0

    async def before(self, turn: Turn, messages_max: int) -> Past:
        """The answered turns before this one, oldest first, and its question."""
        assert turn.conversation_id is not None
        tail = self._tails.get(turn.conversation_id)
        needed = 0 if turn.stateless else messages_max
        version = turn.message_version
        if tail is None or tail.version < version or not _reaches(tail, version, needed):
            tail = await self._read(turn, needed)
        else:
            self._tails.move_to_end(turn.conversation_id)
        return _past(tail, version, needed)

    def at_hand(self, conversation_id: UUID, messages_max: int) -> tuple[Past, int] | None:
        """What a message sent now would know, if that is in memory, and the version it would have; its question is "".

        Others may have gone on with the conversation: the message's own version tells.
        """
        tail = self._tails.get(conversation_id)
        if tail is None or not _reaches(tail, tail.version + 1, messages_max):
            return None
        return _past(tail, tail.version + 1, messages_max, ""), tail.version + 1

    def observe(self, records: Sequence[AnyRecord]) -> None:
        """Follow conversations that are at hand; take in those that begin."""
        for record in records:
            kind = type(record.event)
            if kind not in _OF_CONVERSATIONS:
                continue
            tail = self._tails.get(record.stream_id)
            if kind is Conversation.Started:
                tail = self._tails[record.stream_id] = _Tail(1, 0)
            if tail is None:
                continue
            if record.stream_version != tail.version + 1:
                self._drop(record.stream_id)
                continue
            tail.version = record.stream_version
            self._char_count -= tail.char_count
            self._add(tail, _entry(record))
            self._char_count += tail.char_count
        while self._tails and (self._char_count > CHARS_MAX or len(self._tails) > CONVERSATIONS_MAX):
            self._drop(next(iter(self._tails)))

    def loaded(self, records: Sequence[AnyRecord]) -> None:
        """All events of a stream were read for another purpose: if it is a conversation, it is at hand now."""
        if type(records[0].event) is Conversation.Started:
            tail = self._tails.get(records[0].stream_id)
            if tail is None or tail.version < records[-1].stream_version:
                self._drop(records[0].stream_id)
                self.observe(records)

    async def _read(self, turn: Turn, needed: int) -> _Tail:
        assert turn.conversation_id is not None
        # The newest events may belong to later messages, which wait in the queue; they come on top.
        last = (needed + MESSAGES_MAX // 20) * EVENTS_PER_MESSAGE
        shard = shard_of(turn.owner_id)
        rows = await self._log.read_stream(shard, turn.conversation_id, last)
        while rows and rows[0].stream_version > turn.message_version:
            last *= 4
            rows = await self._log.read_stream(shard, turn.conversation_id, last)
        tail = _Tail(rows[0].stream_version if rows else 1, rows[-1].stream_version if rows else 0)
        for record in await self._records.open(rows):
            self._add(tail, _entry(record))
        self._drop(turn.conversation_id)
        self._char_count += tail.char_count
        self._tails[turn.conversation_id] = tail
        return tail

    def _add(self, tail: _Tail, entry: _Entry | None) -> None:
        if entry is None:
            return
        if len(tail.entries) == MESSAGES_MAX:
            tail.since = tail.entries[1].version
            tail.char_count -= len(tail.entries[0].text)
        tail.entries.append(entry)
        tail.char_count += len(entry.text)

    def _drop(self, conversation_id: UUID) -> None:
        tail = self._tails.pop(conversation_id, None)
        if tail is not None:
            self._char_count -= tail.char_count


def _reaches(tail: _Tail, message_version: int, needed: int) -> bool:
    """Whether the tail goes back far enough for a message."""
    if tail.since <= 1:
        return True
    earlier = sum(1 for entry in tail.entries if entry.version < message_version)
    return tail.since <= message_version and earlier >= needed


def _entry(record: AnyRecord) -> _Entry | None:
    event, kind = record.event, type(record.event)
    if kind is not Conversation.MessageSent and kind is not Conversation.AssistantReplied:
        return None
    answer = kind is Conversation.AssistantReplied
    return _Entry(record.stream_version, event.turn_id, answer, event.content or FORGOTTEN)


def _past(tail: _Tail, message_version: int, messages_max: int, question: str = FORGOTTEN) -> Past:
    exchanges = []
    answers = {entry.turn_id: entry for entry in tail.entries if entry.answer}
    for entry in tail.entries:
        if entry.answer:
            continue
        if entry.version == message_version:
            question = entry.text
        elif entry.version < message_version and (answer := answers.get(entry.turn_id)):
            exchanges.append(Exchange(entry.text, answer.text, entry.version, answer.version))
    wanted = messages_max // 2
    return Past(exchanges[-wanted:] if wanted else (), question)
