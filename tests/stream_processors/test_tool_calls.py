"""Tools are run, refused, charged and told to the model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import pytest

from commands.turn import CancelTurn, InvokeTool
from domain.ids import TurnId
from domain.money import ncr
from domain.plans import UNLIMITED
from domain.ports import Effect, ToolContext, ToolFailed, ToolResult
from domain.turn import SILENCE, AskedTool, Turn
from tests.commands.write_side import AGENT_NCR, BY, TURN_NCR, rules
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import CountedTool, ScriptedModels, Stage, says, until, wants

TOOL_NCR = ncr("0.15")
ONE_TOOL = [
    *("Accepted", "ContextAssembled", "ModelCallStarted", "ModelCallCompleted", "ToolCallRequested"),
    *("ToolCallStarted", "ToolCalled", "ModelCallStarted", "ModelCallCompleted", "Completed"),
]


async def never(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
    await asyncio.Event().wait()
    raise AssertionError


def tool_messages(stage: Stage) -> list[str]:
    return [m.content for m in stage.models.requests[-1].messages if m.role == "tool"]


async def test_a_tools_result_is_told_to_the_model_and_charged(staged: Staged) -> None:
    tool = CountedTool()
    stage = await staged(ScriptedModels(wants(("lookup", {"q": "x"})), says("Found.")), tool).begin()
    told = await stage.ask()
    assert told.story == ONE_TOOL
    assert told.charged == ["message", "tool_call"]
    assert told.end.charged_ncr == TURN_NCR + TOOL_NCR
    assert tool_messages(stage) == ["echo {'q': 'x'}"]
    ((arguments, context),) = tool.runs
    (called,) = told.events(Turn.ToolCalled)
    assert arguments == {"q": "x"}
    assert context.idempotency_key == context.tool_call_id == str(called.tool_call_id)
    assert (context.tenant_id, context.agent_id) == (stage.owner.tenant_id, stage.owner.agent_id)
    # The request and its result are told in the model's own references.
    assistant, answer = stage.models.requests[-1].messages[-2:]
    assert assistant.tool_requests[0].id == answer.tool_call_id == "ref_0"


async def test_tools_are_run_in_rounds_until_the_model_answers(staged: Staged) -> None:
    steps = [wants(("lookup", {"q": str(n)})) for n in range(4)]
    tool = CountedTool()
    stage = await staged(ScriptedModels(*steps, says("Enough.")), tool).begin()
    told = await stage.ask()
    assert (told.end.iterations, told.end.tool_call_count) == (5, 4)
    assert told.charged == ["message", *["tool_call"] * 4]
    assert len(set(stage.models.of_call())) == 5


async def test_tools_asked_for_together_run_together(staged: Staged) -> None:
    everybody = asyncio.Barrier(3)

    async def meet(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        async with asyncio.timeout(2), everybody:
            return ToolResult(f"met {arguments['q']}")

    tool = CountedTool(run_once=meet)
    stage = await staged(ScriptedModels(wants(*(("lookup", {"q": n}) for n in range(3)))), tool).begin()
    told = await stage.ask()
    assert tool_messages(stage) == ["met 0", "met 1", "met 2"]
    assert told.story.count("ModelCallStarted") == 2


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (("no_such_tool", {}), "There is no tool named 'no_such_tool'. Available tools: lookup."),
        (("lookup", None), "The arguments of 'lookup' must be one JSON object."),
        (("lookup", {"q": "bad"}), "The field 'q' must not be 'bad'."),
    ],
)
async def test_what_cannot_run_is_told_to_the_model_and_not_charged(
    staged: Staged, request_: Any, sentence: str
) -> None:
    tool = CountedTool()
    stage = await staged(ScriptedModels(wants(request_), says("I see.")), tool).begin()
    told = await stage.ask()
    assert told.tool_results == [("refused", sentence)]
    assert tool_messages(stage) == [sentence]
    assert (told.charged, tool.runs) == (["message"], [])


async def test_arguments_that_cannot_be_stored_as_they_are_are_no_dead_end(staged: Staged) -> None:
    tool = CountedTool()
    step = wants(("lookup", {"q": "half \ud83d", "nul": "\0"}))
    stage = await staged(ScriptedModels(step, step, says("Well.")), tool).begin()
    told = await stage.ask()
    assert told.story[-1] == "Completed"


@pytest.mark.parametrize("name", ["lookup\0", "half \ud83d", "x" * 5_000, ""])
async def test_odd_names_of_tools_are_no_dead_end(staged: Staged, name: str) -> None:
    stage = await staged(ScriptedModels(wants((name, {})), says("Well.")), CountedTool()).begin()
    told = await stage.ask()
    assert told.story[-1] == "Completed"
    assert told.tool_results[0][0] == "refused"


async def test_a_tool_that_fails_tells_the_model_why_and_costs_nothing(staged: Staged) -> None:
    async def fail(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        raise ToolFailed("The page does not exist.", "not_found")

    tool = CountedTool(run_once=fail)
    stage = await staged(ScriptedModels(wants(("lookup", {}))), tool).begin()
    told = await stage.ask()
    assert told.tool_results == [("failed", "The page does not exist.")]
    assert told.events(Turn.ToolCalled)[0].error_class == "not_found"
    assert tool_messages(stage) == ["The page does not exist."]
    assert told.charged == ["message"]


async def test_a_tools_bug_is_the_tools_answer(staged: Staged, caplog: pytest.LogCaptureFixture) -> None:
    async def stumble(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        raise KeyError("a secret")

    stage = await staged(ScriptedModels(wants(("lookup", {}))), CountedTool(run_once=stumble)).begin()
    told = await stage.ask()
    assert told.tool_results == [("failed", "The tool 'lookup' failed unexpectedly (KeyError).")]


async def test_a_tool_has_a_time_limit(staged: Staged) -> None:
    tool = CountedTool(run_once=never, timeout_s=0.1)
    stage = await staged(ScriptedModels(wants(("lookup", {}))), tool).begin()
    told = await stage.ask()
    assert told.tool_results == [("timed_out", "The tool 'lookup' took longer than 0.1 seconds.")]
    assert told.charged == ["message"]


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d", "x" * 200_000])
async def test_any_text_of_a_tool_reaches_the_model(staged: Staged, text: str) -> None:
    async def give(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        return ToolResult(text)

    stage = await staged(ScriptedModels(wants(("lookup", {}))), CountedTool(run_once=give)).begin()
    told = await stage.ask()
    assert told.story == ONE_TOOL
    (result,) = tool_messages(stage)
    assert "\0" not in result
    assert 0 < len(result) <= 64_000


# --- credits and limits


async def test_a_tool_that_cannot_be_paid_is_told_to_the_model(staged: Staged) -> None:
    tool = CountedTool()
    step = wants(("lookup", {"q": 1}), ("lookup", {"q": 2}))
    stage = await staged(ScriptedModels(step), tool).begin(rules(AGENT_NCR + TURN_NCR + TOOL_NCR))
    told = await stage.ask()
    sentence = "There are not enough credits left to run this tool."
    assert sorted(told.tool_results) == [("refused", sentence), ("succeeded", "echo {'q': 1}")] or (
        sorted(told.tool_results) == [("refused", sentence), ("succeeded", "echo {'q': 2}")]
    )
    assert (told.story[-1], told.charged) == ("Completed", ["message", "tool_call"])
    assert len(tool.runs) == 1
    await stage.idle()
    assert (await stage.account()).available_ncr == 0


async def test_a_tool_beyond_the_plans_limit_is_told_to_the_model(staged: Staged) -> None:
    plan = {"free": {**UNLIMITED, "tool_call": 1}}
    tool = CountedTool()
    steps = [wants(("lookup", {"q": n})) for n in range(2)]
    stage = await staged(ScriptedModels(*steps), tool).begin(rules(plans=plan))
    told = await stage.ask()
    assert [outcome for outcome, _ in told.tool_results] == ["succeeded", "refused"]
    assert told.events(Turn.ToolCalled)[1].refusal_code == "plan_limit_exceeded"


async def test_the_same_call_again_and_again_ends_the_tools(staged: Staged) -> None:
    tool = CountedTool()
    stage = await staged(ScriptedModels(*[wants(("lookup", {"q": "x"}))] * 9), tool).begin()
    told = await stage.ask()
    assert [outcome for outcome, _ in told.tool_results] == ["succeeded", "succeeded", "refused"]
    assert told.end.finish == "tool_loop"
    assert (stage.models.requests[-1].tools, told.events(Turn.ModelCallStarted)[-1].with_tools) == ((), False)
    assert len(tool.runs) == 2


async def test_after_the_last_round_the_model_must_answer(staged: Staged) -> None:
    steps = [wants(("lookup", {"q": n})) for n in range(9)]
    stage = await staged(ScriptedModels(*steps), CountedTool()).begin(max_tool_iterations=2)
    told = await stage.ask()
    assert (told.end.finish, told.end.iterations, told.end.tool_call_count) == ("max_iterations", 3, 2)
    assert told.records[0].event.limits.iterations == 2
    # It asked for a tool nevertheless and said nothing.
    assert SILENCE["max_iterations"] in [
        r.event.content for r in await stage.happened() if hasattr(r.event, "content")
    ]


async def test_the_last_answer_is_asked_for_without_tools(staged: Staged) -> None:
    steps = [wants(("lookup", {"q": 0})), says("So be it.")]
    stage = await staged(ScriptedModels(*steps), CountedTool()).begin(max_tool_iterations=1)
    await stage.ask()
    assert [bool(request.tools) for request in stage.models.requests] == [True, False]


# --- which tools


@pytest.mark.parametrize(
    ("configuration", "offered"),
    [
        ({}, {"a", "b", "c"}),
        ({"enabled_tools": ["a", "zzz"]}, {"a"}),
        ({"disabled_tools": ["a"]}, {"b", "c"}),
        ({"enabled_tools": ["a"], "disabled_tools": ["a"]}, {"a"}),
        ({"enabled_tools": [], "disabled_tools": ["c"]}, {"a", "b"}),
        ({"tools_enabled": False}, set()),
        ({"tools_enabled": False, "enabled_tools": ["a"]}, set()),
    ],
)
async def test_an_agent_is_offered_what_its_configuration_allows(
    staged: Staged, configuration: dict[str, Any], offered: set[str]
) -> None:
    tools = [CountedTool(name) for name in "abc"]
    stage = await staged(ScriptedModels(wants(("a", {}))), *tools).begin(**configuration)
    told = await stage.ask()
    assert {tool.name for tool in stage.models.requests[0].tools} == offered
    assert len(tools[0].runs) == (1 if "a" in offered else 0)
    assert told.story[-1] == "Completed"


async def test_a_tool_that_is_gone_when_it_is_to_run_is_told_to_the_model(staged: Staged) -> None:
    async def vanish(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        del stage.tools.tools["other"]
        return ToolResult("gone")

    tools = CountedTool(run_once=vanish), CountedTool("other")
    stage = await staged(ScriptedModels(wants(("lookup", {})), wants(("other", {}))), *tools).begin()
    told = await stage.ask()
    assert told.story[-1] == "Completed"
    assert told.tool_results[1][0] == "refused"


# --- cancelling


async def test_cancelling_ends_the_tool(staged: Staged) -> None:
    ended = asyncio.Event()

    async def wait(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        try:
            return await never(arguments, context)
        finally:
            ended.set()

    tool = CountedTool(run_once=wait)
    stage = await staged(ScriptedModels(wants(("lookup", {}))), tool).begin()
    sent = await stage.send()
    await until(lambda: has_run(tool), "the tool")
    await stage.bus.execute(CancelTurn(tenant_id=sent.tenant_id, turn_id=sent.turn_id), by=BY)
    told = await stage.end_of(sent.turn_id)
    async with asyncio.timeout(2):
        await ended.wait()
    assert (told.story[-1], told.charged) == ("Cancelled", [])


async def has_run(tool: CountedTool) -> bool:
    return bool(tool.runs)


# --- without a model


def asked(tool: str = "lookup", refusal: str | None = None, effect: Effect = Effect.PURE) -> AskedTool:
    return AskedTool("ref", tool, "builtin", effect, {"q": "x"}, "digest", refusal)


async def invoked(stage: Stage, what: AskedTool) -> TurnId:
    turn_id = TurnId(uuid4())
    command = InvokeTool(
        tenant_id=stage.owner.tenant_id,
        turn_id=turn_id,
        agent_id=stage.owner.agent_id,
        asked=what,
        mode="sync",
        by_owner=True,
    )
    await stage.bus.execute(command, by=BY)
    stage.sent.append(turn_id)
    return turn_id


async def test_a_tool_may_be_run_without_a_model(staged: Staged) -> None:
    stage = await staged(CountedTool()).begin()
    told = await stage.end_of(await invoked(stage, asked()))
    assert told.story == ["Accepted", "ToolCallRequested", "ToolCallStarted", "ToolCalled", "Completed"]
    assert (told.charged, stage.models.requests) == (["tool_call"], [])


async def test_a_tool_that_fails_without_a_model_costs_nothing(staged: Staged) -> None:
    async def fail(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        raise ToolFailed("No.")

    stage = await staged(CountedTool(run_once=fail)).begin()
    told = await stage.end_of(await invoked(stage, asked()))
    assert (told.tool_results, told.charged) == ([("failed", "No.")], [])


async def test_a_tool_refused_without_a_model_ends_at_once(staged: Staged) -> None:
    stage = staged(CountedTool())
    # Nobody hears of it, and nobody needs to.
    stage.worker().start(host=False, sweeper=False)
    await stage.begin()
    told = await stage.told(await invoked(stage, asked(refusal="The field 'q' is missing.")))
    assert told.story == ["Accepted", "ToolCallRequested", "ToolCalled", "Completed"]
    assert stage.log.waiting == 0
    stage.worker().start()
