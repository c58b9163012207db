"""The built-in model: it quotes, runs tools on request, and says what it is."""

from __future__ import annotations

import pytest

from adapters.chat_models.limits import REPLY_TEXT_BYTES_MAX
from adapters.chat_models.offline import NOTICE, Offline
from domain.ports import Message, ModelReply, ModelRequest, ToolRequest, ToolSpec

CLOCK = ToolSpec("clock", "Tell the time.", {"type": "object"})
SYSTEM = """You are the assistant of a shop.
The Pro plan costs 20.50 dollars a month. Refunds take five days.
[1] handbook.pdf
Every employee has 30 vacation days a year."""


async def answer(
    *messages: Message | str, tools: tuple[ToolSpec, ...] = (CLOCK,), system: str = SYSTEM
) -> ModelReply:
    told = tuple(Message("user", message) if isinstance(message, str) else message for message in messages)
    return await Offline().complete(
        ModelRequest("offline", system, told, tools, idempotency_key="turn 1 call 1")
    )


async def test_a_greeting_is_returned_and_says_how_to_connect_a_model():
    for greeting in ("hello", "Hi there!", "Good morning", "who are you?"):
        reply = await answer(greeting)
        assert reply.text.startswith("Hello!")
        assert NOTICE in reply.text and "`clock`" in reply.text


@pytest.mark.parametrize(
    "wish",
    [
        '/tool clock {"zone": "UTC"}',
        'use the tool clock with {"zone": "UTC"}',
        'Please use tool `clock` with arguments: {"zone": "UTC"}, and tell me.',
        'run the tool "clock" {"zone": "UTC"}',
    ],
)
async def test_a_tool_runs_when_asked_for_in_so_many_words(wish: str):
    reply = await answer(wish)
    assert (reply.text, reply.finish_reason) == ("", "tool_calls")
    assert [(asked.name, asked.arguments) for asked in reply.tool_requests] == [("clock", {"zone": "UTC"})]


async def test_several_tools_run_at_once_and_arguments_may_be_left_out():
    reply = await answer('/tool clock {"zone": "UTC"}\n/tool clock')
    assert [asked.arguments for asked in reply.tool_requests] == [{"zone": "UTC"}, {}]
    assert len({asked.id for asked in reply.tool_requests}) == 2


async def test_a_tool_that_is_not_offered_or_has_broken_arguments_does_not_run():
    for wish, said in (("/tool no_such {}", "not offered"), ('/tool clock {"zone": ', "not a JSON object")):
        reply = await answer(wish)
        assert reply.tool_requests == () and said in reply.text


async def test_tool_results_are_quoted_with_their_names():
    asked = (ToolRequest("a", "clock", {}), ToolRequest("b", "calendar", {}))
    reply = await answer(
        "/tool clock",
        Message("assistant", "", tool_requests=asked),
        Message("tool", "It is noon.\nOr later.", tool_call_id="a"),
        Message("tool", "", tool_call_id="b"),
    )
    assert "The tool `clock` answered:\n> It is noon.\n> Or later." in reply.text
    assert "The tool `calendar` answered with nothing." in reply.text


async def test_a_question_is_answered_with_the_sentence_that_has_its_words_and_its_place():
    assert (
        "“The Pro plan costs 20.50 dollars a month.” (system prompt)"
        in (await answer("What does the Pro plan cost?")).text
    )
    vacation = await answer("How many vacation days do employees have?")
    assert "“Every employee has 30 vacation days a year.” (system prompt, [1])" in vacation.text
    assert "Refunds" not in vacation.text


async def test_earlier_messages_are_quoted_and_its_own_answers_are_not():
    told = await answer("My dog is called Rex.")
    reply = await answer("My dog is called Rex.", Message("assistant", told.text), "How is my dog called?")
    assert "“My dog is called Rex.” (message 1, user)" in reply.text
    assert "message 2" not in reply.text


async def test_what_nothing_says_is_not_made_up():
    reply = await answer("Who won the football match?")
    assert "I cannot answer this" in reply.text and NOTICE in reply.text


async def test_the_same_prompt_always_has_the_same_answer():
    assert await answer("What does the Pro plan cost?") == await answer("What does the Pro plan cost?")


async def test_large_prompts_are_answered_within_the_limits():
    system = "The plan costs ten dollars. " * 100_000
    reply = await answer(
        "What does the plan cost in dollars?", "x " * 100_000, "What does the plan cost?", system=system
    )
    assert len(reply.text.encode()) < REPLY_TEXT_BYTES_MAX
    results = tuple(Message("tool", "y" * 1_000_000, tool_call_id=str(n)) for n in range(64))
    quoted = await answer("/tool clock", Message("assistant", ""), *results)
    assert len(quoted.text.encode()) < REPLY_TEXT_BYTES_MAX
