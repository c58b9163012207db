"""Turns are run to their end, whatever the model does."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from adapters.memory.turn_feed import MemoryFollower
from commands.turn import CancelTurn
from domain.errors import ConversationBusy
from domain.ids import ConversationId
from domain.money import ncr
from domain.ports import ModelErrorClass, ModelReply, ModelRequest, TokenUsage
from domain.turn import ATTEMPTS_MAX, NOTHING_SAID, SILENCE, Turn
from schemas.turn_feed import Token
from tests.commands.write_side import AGENT_NCR, BY, CREDITS, TURN_NCR, rules
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import (
    ANSWER,
    CountedTool,
    ScriptedModels,
    Stage,
    Told,
    fails,
    hangs,
    replies,
    says,
    until,
    wants,
)

ANSWERED = ["Accepted", "ContextAssembled", "ModelCallStarted", "ModelCallCompleted", "Completed"]
TRY = ["ModelCallStarted", "ModelCallFailed"]


async def answer_of(stage: Stage, told: Told) -> str:
    """What the conversation got to read."""
    conversation_id = told.records[0].event.conversation_id
    return replies(await stage.happened(), conversation_id)[-1]


async def test_a_message_is_answered_and_charged_once(staged: Staged) -> None:
    stage = await staged().begin(system_prompt="Be brief.", temperature=0.5, max_output_tokens=99)
    told = await stage.ask("Is it so?")
    assert told.story == ANSWERED
    assert told.charged == ["message"]
    assert await answer_of(stage, told) == ANSWER
    (request,) = stage.models.requests
    assert (request.system, request.messages[-1].content) == ("Be brief.", "Is it so?")
    assert (request.temperature, request.max_output_tokens) == (0.5, 99)
    await stage.idle()
    assert (await stage.account()).available_ncr == ncr(str(CREDITS)) - AGENT_NCR - TURN_NCR


async def test_what_was_sent_to_the_model_is_recorded_without_its_text(staged: Staged) -> None:
    stage = await staged(CountedTool("lookup")).begin()
    first, second = await stage.talk("one", "two")
    (context,) = second.events(Turn.ContextAssembled)
    assert (context.history_count, context.tools_offered) == (2, ("lookup",))
    assert (context.history_from, context.history_to) == (2, 3)
    assert context.prompt_digest != first.events(Turn.ContextAssembled)[0].prompt_digest
    (call,) = second.events(Turn.ModelCallStarted)
    assert (call.provider, call.model, call.iteration, call.attempt) == ("peer", "peer:script", 1, 1)
    assert second.end.usage == TokenUsage(10, 5)


# --- the model's failures


async def test_a_failure_that_passes_is_tried_again_with_the_same_key(staged: Staged) -> None:
    stage = await staged(ScriptedModels(fails(ModelErrorClass.OVERLOADED), says("Back."))).begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY, *ANSWERED[2:]]
    assert await answer_of(stage, told) == "Back."
    assert list(stage.models.of_call().values()) == [2]
    assert told.charged == ["message"]


async def test_a_provider_that_says_when_is_asked_then(staged: Staged) -> None:
    wait_s = 0.3
    stage = await staged(ScriptedModels(fails(ModelErrorClass.RATE_LIMITED, wait_s))).begin()
    told = await stage.ask()
    failed, started = told.events(Turn.ModelCallFailed)[0], told.events(Turn.ModelCallStarted)[1]
    times = {record.event: record.recorded_at for record in told.records if record.event in (failed, started)}
    waited_s = (times[started] - times[failed]).total_seconds()
    assert wait_s <= waited_s < wait_s + 0.2
    assert told.story[-1] == "Completed"


@pytest.mark.parametrize(
    "error_class", [ModelErrorClass.OVERLOADED, ModelErrorClass.UNREACHABLE, ModelErrorClass.GARBAGE]
)
async def test_when_all_attempts_fail_the_turn_fails_and_costs_nothing(
    staged: Staged, error_class: ModelErrorClass
) -> None:
    stage = await staged(ScriptedModels(*[fails(error_class)] * 10)).begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY * ATTEMPTS_MAX, "Failed"]
    assert (told.end.error_code, told.end.lines) == (f"model_{error_class}", ())
    assert told.end.sentence == f"It failed: {error_class}."
    assert len(stage.models.requests) == ATTEMPTS_MAX


@pytest.mark.parametrize(
    "error_class",
    [
        ModelErrorClass.REFUSED,
        ModelErrorClass.UNAUTHORIZED,
        ModelErrorClass.CONTEXT_TOO_LONG,
        ModelErrorClass.UNKNOWN_MODEL,
        ModelErrorClass.TOO_LARGE,
    ],
)
async def test_a_failure_that_stays_is_not_tried_again(staged: Staged, error_class: ModelErrorClass) -> None:
    stage = await staged(ScriptedModels(fails(error_class))).begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY, "Failed"]
    assert told.end.charged_ncr == 0


async def test_a_model_that_cannot_be_reached_fails_the_turn(staged: Staged) -> None:
    models = ScriptedModels(fails(ModelErrorClass.UNKNOWN_MODEL))
    models.card = None
    stage = await staged(models, CountedTool()).begin()
    told = await stage.ask()
    assert told.story[-1] == "Failed"
    assert told.events(Turn.ContextAssembled)[0].tools_offered == ()


async def test_an_empty_answer_is_tried_again(staged: Staged) -> None:
    stage = await staged(ScriptedModels(says(""), says("  \n"), says("Words."))).begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY * 2, *ANSWERED[2:]]
    assert [event.error_class for event in told.events(Turn.ModelCallFailed)] == [ModelErrorClass.GARBAGE] * 2


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [("content_filter", SILENCE["content_filter"]), ("length", SILENCE["length"])],
)
async def test_a_model_that_was_stopped_before_a_word_is_spoken_for(
    staged: Staged, reason: Any, sentence: str
) -> None:
    stage = await staged(ScriptedModels(ModelReply("", (), reason))).begin()
    told = await stage.ask()
    assert (told.end.finish, await answer_of(stage, told)) == (reason, sentence)


@pytest.mark.parametrize("text", ["a\0b", "half an emoji \ud83d"])
async def test_text_that_cannot_be_stored_as_it_is_is_mended(staged: Staged, text: str) -> None:
    stage = await staged(ScriptedModels(says(text), says(text))).begin()
    told = await stage.ask()
    answer = await answer_of(stage, told)
    assert answer in ("a\ufffdb", "half an emoji ?", "half an emoji \ufffd")
    assert len(stage.models.requests) == 1


async def test_a_bug_in_an_adapter_is_a_failed_attempt(
    staged: Staged, caplog: pytest.LogCaptureFixture
) -> None:
    async def stumbles(request: ModelRequest) -> ModelReply:
        raise ZeroDivisionError("a bug")

    stage = await staged(ScriptedModels(stumbles, says("Mended."))).begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY, *ANSWERED[2:]]
    (failed,) = told.events(Turn.ModelCallFailed)
    assert (failed.error_class, "a bug" in failed.sentence) == (ModelErrorClass.GARBAGE, False)
    assert "ZeroDivisionError" in caplog.text


async def test_a_model_that_takes_no_notice_of_time_is_left_and_asked_again(staged: Staged) -> None:
    stage = staged(ScriptedModels(hangs, says("Awake.")))
    stage.worker(model_timeout_s=0.2).start()
    await stage.begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY, *ANSWERED[2:]]
    assert told.events(Turn.ModelCallFailed)[0].error_class is ModelErrorClass.TIMEOUT
    assert stage.models.under_way == 0


async def test_a_turn_ends_at_its_deadline_whatever_the_model_does(staged: Staged) -> None:
    stage = await staged(ScriptedModels(hangs)).begin(rules(turn_deadline_s=0.5))
    began = datetime.now(UTC)
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY, "TimedOut"]
    assert (told.end.error_code, told.end.charged_ncr) == ("turn_timeout", 0)
    assert (told.end.ended_at - began).total_seconds() < 1.2
    await until(lambda: nothing_under_way(stage), "the model call's end")


async def test_a_wait_beyond_the_deadline_is_not_begun(staged: Staged) -> None:
    stage = await staged(ScriptedModels(fails(ModelErrorClass.RATE_LIMITED, 1e12))).begin()
    told = await stage.ask()
    assert told.story == ["Accepted", "ContextAssembled", *TRY, "Failed"]
    assert told.end.error_code == "model_rate_limited"


async def nothing_under_way(stage: Stage) -> bool:
    return stage.models.under_way == 0


# --- cancelling


async def test_cancelling_ends_the_model_call_and_costs_nothing(staged: Staged) -> None:
    stage = await staged(ScriptedModels(hangs)).begin()
    sent = await stage.send()
    await until(lambda: is_asked(stage), "the model call")
    await stage.bus.execute(CancelTurn(tenant_id=sent.tenant_id, turn_id=sent.turn_id, reason="bored"), by=BY)
    told = await stage.end_of(sent.turn_id)
    assert told.story == [
        "Accepted",
        "ContextAssembled",
        "ModelCallStarted",
        "CancellationRequested",
        "Cancelled",
    ]
    assert told.end.charged_ncr == 0
    await until(lambda: nothing_under_way(stage), "the model call's end")
    assert stage.workers[0].work.model_slots._value == 256


async def is_asked(stage: Stage) -> bool:
    return stage.models.under_way > 0


async def test_cancelling_charges_the_tools_that_ran(staged: Staged) -> None:
    tool = CountedTool()
    stage = await staged(ScriptedModels(wants(("lookup", {"q": "x"})), hangs), tool).begin()
    sent = await stage.send()
    await until(lambda: has_run_and_asked(stage, tool), "the second model call")
    await stage.bus.execute(CancelTurn(tenant_id=sent.tenant_id, turn_id=sent.turn_id), by=BY)
    told = await stage.end_of(sent.turn_id)
    assert (told.story[-1], told.charged) == ("Cancelled", ["tool_call"])


async def has_run_and_asked(stage: Stage, tool: CountedTool) -> bool:
    return len(tool.runs) == 1 and len(stage.models.requests) == 2 and stage.models.under_way == 1


# --- conversations


async def test_messages_of_a_conversation_are_answered_in_order(staged: Staged) -> None:
    release = asyncio.Event()

    async def waits(request: ModelRequest) -> ModelReply:
        await release.wait()
        return says("first")

    models = ScriptedModels(one=[waits], two=[says("second")], three=[says("third")])
    stage = await staged(models).begin()
    conversation_id = stage.owner.message().conversation_id
    sent = [
        await stage.send(content, conversation_id=conversation_id, beginning="named", name="thread")
        for content in ("one", "two", "three")
    ]
    await until(lambda: is_asked(stage), "the first call")
    assert [(await stage.told(each.turn_id)).story for each in sent[1:]] == [["Accepted"]] * 2
    release.set()
    await asyncio.gather(*(stage.end_of(each.turn_id) for each in sent))
    assert stage.models.most_under_way == 1
    texts = replies(await stage.happened(), conversation_id)
    assert texts == ["one", "two", "three", "first", "second", "third"]
    # Each question saw the answers to those before it.
    assert [len(request.messages) for request in stage.models.requests] == [1, 3, 5]


async def test_a_busy_conversation_may_be_asked_to_refuse(staged: Staged) -> None:
    stage = await staged(ScriptedModels(one=[hangs])).begin(rules(turn_deadline_s=0.6))
    first = await stage.send("one")
    with pytest.raises(ConversationBusy):
        await stage.bus.execute(
            stage.owner.message(
                conversation_id=first.conversation_id, beginning="existing", when_busy="reject"
            ),
            by=BY,
        )


async def test_conversations_do_not_wait_for_each_other(staged: Staged) -> None:
    stage = await staged(ScriptedModels(slow=[hangs] * 20)).begin(rules(turn_deadline_s=1.5))
    for _ in range(20):
        await stage.send("slow")
    async with asyncio.timeout(1.0):
        assert (await stage.ask("quick")).story == ANSWERED


async def test_a_queued_turn_whose_time_is_up_leaves_the_queue(staged: Staged) -> None:
    stage = await staged(ScriptedModels(one=[hangs], three=[says("at last")])).begin(
        rules(turn_deadline_s=0.5)
    )
    conversation_id = stage.owner.message().conversation_id
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    first = await stage.send("one", **named)
    second = await stage.send("two", **named)
    ends = [await stage.end_of(each.turn_id) for each in (first, second)]
    assert [told.story[-1] for told in ends] == ["TimedOut", "TimedOut"]
    assert (await stage.ask("three", **named)).story == ANSWERED


async def test_a_cancelled_turn_makes_room_for_the_next(staged: Staged) -> None:
    stage = await staged(ScriptedModels(one=[hangs])).begin()
    conversation_id = stage.owner.message().conversation_id
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    first, second, third = [await stage.send(content, **named) for content in ("one", "two", "three")]
    for sent in (second, first):
        await stage.bus.execute(CancelTurn(tenant_id=sent.tenant_id, turn_id=sent.turn_id), by=BY)
    assert (await stage.end_of(third.turn_id)).story == ANSWERED
    assert (await stage.told(second.turn_id)).story == ["Accepted", "CancellationRequested", "Cancelled"]


async def test_a_message_may_take_the_place_of_the_one_that_is_being_answered(staged: Staged) -> None:
    stage = await staged(ScriptedModels(one=[hangs], now=[says("at once")], two=[says("later")])).begin()
    conversation_id = stage.owner.message().conversation_id
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    first, second = [await stage.send(content, **named) for content in ("one", "two")]
    await until(lambda: is_asked(stage), "the first call")
    urgent = await stage.send("now", when_busy="interrupt", **named)
    assert (await stage.end_of(urgent.turn_id)).story == ANSWERED
    assert (await stage.end_of(second.turn_id)).story == ANSWERED
    cut = await stage.told(first.turn_id)
    assert (cut.story[-1], cut.charged) == ("Cancelled", [])
    assert replies(await stage.happened(), conversation_id) == ["one", "two", "now", "at once", "later"]


# --- the past


async def test_a_question_is_asked_with_its_past(staged: Staged) -> None:
    stage = await staged().begin()
    await stage.talk("one", "two", "three")
    assert [m.content for m in stage.models.requests[-1].messages] == ["one", ANSWER, "two", ANSWER, "three"]


async def test_an_agent_may_be_told_to_forget(staged: Staged) -> None:
    stage = await staged().begin(use_memory=False)
    await stage.talk("one", "two")
    assert [m.content for m in stage.models.requests[-1].messages] == ["two"]


@pytest.mark.parametrize(("messages_max", "kept"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (50, 4)])
async def test_the_past_has_a_limit(staged: Staged, messages_max: int, kept: int) -> None:
    stage = await staged().begin(max_history_messages=messages_max)
    await stage.talk("a", "b", "c", "d", "e")
    asked = [m.content for m in stage.models.requests[-1].messages if m.role == "user"]
    assert asked == [*"abcd"[4 - kept :], "e"]


async def test_a_stateless_question_has_no_past(staged: Staged) -> None:
    stage = await staged().begin()
    await stage.talk("one", "two", stateless=True)
    assert [m.content for m in stage.models.requests[-1].messages] == ["two"]


async def test_a_turn_without_an_answer_is_not_part_of_the_past(staged: Staged) -> None:
    stage = await staged(ScriptedModels(two=[fails(ModelErrorClass.REFUSED)])).begin()
    told = await stage.talk("one", "two", "three")
    assert [each.story[-1] for each in told] == ["Completed", "Failed", "Completed"]
    assert [m.content for m in stage.models.requests[-1].messages] == ["one", ANSWER, "three"]


async def test_a_worker_that_never_saw_the_conversation_reads_its_past(staged: Staged) -> None:
    stage = await staged().begin()
    conversation_id = ConversationId(stage.owner.message().conversation_id)
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    for content in ("one", "two", "three"):
        await stage.ask(content, **named)
    await stage.idle()
    await stage.workers[0].kill()
    fresh = stage.worker().start()
    stage.workers.reverse()
    assert fresh.history._tails == {}
    await stage.ask("four", **named)
    asked = [m.content for m in stage.models.requests[-1].messages if m.role == "user"]
    assert asked == ["one", "two", "three", "four"]


# --- being followed


async def test_who_follows_a_stream_gets_text_and_records_in_order(staged: Staged) -> None:
    stage = await staged().begin()
    command = stage.owner.message(mode="stream")
    stage.sent.append(command.turn_id)
    with stage.workers[0].feed.follow(command.turn_id) as follower:
        await stage.bus.execute(command, by=BY)
        heard = await followed(follower)
    kinds = [type(item).__name__ if isinstance(item, Token) else item.type for item in heard]
    assert kinds == [
        "Turn.Accepted",
        "Turn.ContextAssembled",
        "Turn.ModelCallStarted",
        "Token",
        "Turn.ModelCallCompleted",
        "Turn.Completed",
        "Conversation.AssistantReplied",
    ] or kinds[-2:] == ["Conversation.AssistantReplied", "Turn.Completed"]
    (token,) = [item for item in heard if isinstance(item, Token)]
    assert (token.start, token.text) == (0, ANSWER)


async def followed(follower: MemoryFollower) -> list[Any]:
    heard: list[Any] = []
    while not {"Turn.Completed", "Conversation.AssistantReplied"} <= {getattr(i, "type", "") for i in heard}:
        item = await follower.next(5.0)
        assert item is not None
        heard.append(item)
    return heard


async def test_nothing_said_is_never_an_empty_answer(staged: Staged) -> None:
    # With no tool calls left to make, an empty answer cannot be asked for again with hope.
    stage = await staged(ScriptedModels(says(""))).begin(max_tool_iterations=0)
    told = await stage.ask()
    assert await answer_of(stage, told) == NOTHING_SAID
