"""The past kept at hand is that of the log, and has a limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from adapters.memory.event_log import MemoryEventLog
from commands.bus import Bus
from commands.turn import CancelTurn
from domain.conversation import Conversation
from domain.ids import ConversationId
from domain.turn import Turn
from schemas.records import AnyRecord
from stream_processors.history import ConversationHistory, Past
from tests.commands.write_side import BY, Owner, memory_records, rules, signed_up
from tests.stream_processors.stage import ScriptedModels, Stage


class Talk:
    """A conversation on a log, and a history that may or may not have followed it."""

    def __init__(self) -> None:
        self.log, self.records = MemoryEventLog(), memory_records()
        self.bus = Bus(self.log, self.records, rules())
        self.history = self.fresh()
        self.owner: Owner
        self.conversation_id = ConversationId(uuid4())

    def fresh(self) -> ConversationHistory:
        return ConversationHistory(self.log, self.records)

    async def say(self, content: str, conversation_id: ConversationId | None = None) -> Turn:
        command = self.owner.message(
            content,
            conversation_id=conversation_id or self.conversation_id,
            beginning="named",
            name="thread",
        )
        await self.bus.execute(command, by=BY)
        return await self.bus.read(Turn, command.turn_id, self.owner.tenant_id)


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    talk = Talk()
    talk.owner = await signed_up(talk.bus)
    yield talk


def texts(past: Past) -> list[Any]:
    return [*((exchange.asked, exchange.answered) for exchange in past.exchanges), past.question]


async def test_what_is_at_hand_and_what_is_read_are_the_same() -> None:
    stage = await Stage(ScriptedModels()).begin()
    await stage.talk(*(f"question {n}" for n in range(12)))
    await stage.idle()
    (worker,) = stage.workers
    turn: Any = None
    for record in (await stage.told(stage.sent[-1])).records:
        turn = record.event.mutate(turn)
    for needed in (0, 1, 2, 5, 100):
        at_hand = await worker.history.before(turn, needed)
        read = await ConversationHistory(stage.log, stage.records).before(turn, needed)
        assert texts(at_hand) == texts(read)
        assert at_hand.versions == read.versions
    await worker.kill()


async def test_a_conversation_that_others_continued_is_read_again(talk: Talk) -> None:
    talk.bus.on_commit = talk.history.observe
    first = await talk.say("one")
    assert texts(await talk.history.before(first, 10)) == ["one"]
    other = Bus(talk.log, talk.records, rules())
    await other.execute(CancelTurn(tenant_id=talk.owner.tenant_id, turn_id=first.turn_id), by=BY)
    second = await talk.say("two")
    assert texts(await talk.history.before(second, 10)) == ["two"]


async def test_what_is_kept_is_counted_once(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_processors.history.MESSAGES_MAX", 40)
    talk.bus.on_commit = talk.history.observe
    for number in range(30):
        conversation_id = ConversationId(uuid4())
        turn = await talk.say("x" * 100, conversation_id)
        if number % 2:
            talk.history._drop(conversation_id)
        await talk.history.before(turn, 10)
        kept = sum(len(e.text) for tail in talk.history._tails.values() for e in tail.entries)
        assert talk.history._char_count == kept == 100 * (number + 1)


async def test_long_conversations_push_old_ones_out(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_processors.history.CHARS_MAX", 1_000)
    talk.bus.on_commit = talk.history.observe
    turns = [await talk.say("x" * 300, ConversationId(uuid4())) for _ in range(10)]
    assert len(talk.history._tails) == 3
    assert talk.history._char_count == 900
    # What was pushed out is read when it is wanted.
    assert texts(await talk.history.before(turns[0], 10)) == ["x" * 300]


async def test_erased_text_is_named_as_such(talk: Talk) -> None:
    turn = await talk.say("secret")
    await talk.records._keys.destroy(talk.owner.tenant_id)
    assert texts(await talk.fresh().before(turn, 10)) == ["[erased]"]


async def test_a_conversation_that_was_read_to_decide_on_it_need_not_be_read_again(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await talk.say("one"), await talk.say("two")
    there, history = Bus(talk.log, talk.records, talk.bus.rules), talk.fresh()
    there.on_loaded = history.loaded
    await there.read(Turn, second.turn_id, talk.owner.tenant_id)
    await there.read(Conversation, talk.conversation_id, talk.owner.tenant_id)
    expected = [texts(await talk.fresh().before(turn, 10)) for turn in (first, second)]
    with monkeypatch.context() as broken:
        broken.delattr(MemoryEventLog, "read_stream")
        assert [texts(await history.before(turn, 10)) for turn in (first, second)] == expected


async def test_what_was_read_before_never_replaces_what_is_known_since(talk: Talk) -> None:
    told: list[list[AnyRecord]] = []
    await talk.say("one")
    there = Bus(talk.log, talk.records, talk.bus.rules)
    there.on_loaded = lambda records: told.append([*records])
    await there.read(Conversation, talk.conversation_id, talk.owner.tenant_id)
    history = talk.fresh()
    talk.bus.on_commit = history.observe
    (records,) = told
    history.loaded(records)
    turn = await talk.say("two")
    history.loaded(records)
    past = await history.before(turn, 10)
    assert past.question == "two"
    assert history._tails[talk.conversation_id].version == turn.message_version + 1
    assert history._char_count == sum(tail.char_count for tail in history._tails.values()) == len("onetwo")
