"""What nobody heard of, what a dead worker left, what waited for its time: all of it is found again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from adapters.memory.event_log import MemoryEventLog
from commands.agent import ChangeAgent
from domain.agent import Agent
from domain.event_log import Batch, CommandRow, LogUnavailable
from domain.ports import Effect, ModelErrorClass, ModelReply, ModelRequest, ToolContext, ToolResult
from domain.turn import OUTCOME_UNKNOWN, WORKERS_LOST_MAX, Turn
from stream_processors.agent_turns import agent_turns
from stream_processors.credit_debits import credit_debits
from stream_processors.tool_calls import tool_calls
from tests.commands.write_side import BY, rules
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import (
    CountedTool,
    ScriptedModels,
    Stage,
    fails,
    hangs,
    says,
    until,
    wants,
)

ANSWERED = ["Accepted", "ContextAssembled", "ModelCallStarted", "ModelCallCompleted", "Completed"]
LOST = ["ModelCallStarted", "ModelCallFailed"]


async def never(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
    await asyncio.Event().wait()
    raise AssertionError


def first_never(effect: Effect) -> CountedTool:
    """A tool that does not come back from its first run."""

    async def run(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        return ToolResult("done") if len(tool.runs) > 1 else await never(arguments, context)

    tool = CountedTool(run_once=run, effect=effect)
    return tool


async def is_asked(stage: Stage) -> bool:
    return stage.models.under_way > 0


async def has_run(tool: CountedTool) -> bool:
    return bool(tool.runs)


# --- lost records


async def test_a_turn_that_nobody_heard_of_is_taken_up(staged: Staged) -> None:
    stage = staged(ScriptedModels(wants(("lookup", {"q": 1}), ("lookup", {"q": 2}))), CountedTool())
    # No record reaches this worker: it lives from what is due alone.
    deaf = stage.worker().start(host=False)
    await stage.begin()
    told = await stage.ask()
    assert told.story[-1] == "Completed"
    assert [outcome for outcome, _ in told.tool_results] == ["succeeded", "succeeded"]
    await deaf.kill()
    stage.worker().start()  # charges it


async def test_a_message_sent_while_nobody_worked_is_answered_by_who_starts_next(staged: Staged) -> None:
    stage = staged()
    stage.worker().start(host=False, sweeper=False)
    await stage.begin()
    sent = [await stage.send() for _ in range(20)]
    await stage.workers[0].kill()
    stage.worker().start()
    for each in sent:
        assert (await stage.end_of(each.turn_id)).story == ANSWERED


# --- dead workers


async def dying(stage: Stage, name: str = "") -> None:
    """A worker that takes a message up and dies at it, and another one that lives."""
    stage.worker(name).start()
    stage.worker().start(host=False, sweeper=False)
    await stage.begin()


async def test_a_dead_workers_model_call_is_made_again_by_another(staged: Staged) -> None:
    stage = staged(ScriptedModels(hangs, says("Alive.")))
    await dying(stage)
    sent = await stage.send()
    await until(lambda: is_asked(stage), "the model call")
    await stage.workers[0].kill()
    stage.worker().start()
    told = await stage.end_of(sent.turn_id)
    assert told.story == ["Accepted", "ContextAssembled", *LOST, *ANSWERED[2:]]
    assert told.events(Turn.ModelCallFailed)[0].error_class is ModelErrorClass.WORKER_LOST
    assert list(stage.models.of_call().values()) == [2]
    assert told.charged == ["message"]


async def test_a_living_workers_model_call_is_left_alone(staged: Staged) -> None:
    release = asyncio.Event()

    async def waits(request: ModelRequest) -> ModelReply:
        await release.wait()
        return says("Slow but sure.")

    stage = staged(ScriptedModels(waits))
    for _ in range(3):
        stage.worker().start()
    await stage.begin()
    sent = await stage.send()
    await asyncio.sleep(1.0)  # more than twice what makes a silent worker a dead one
    release.set()
    assert (await stage.end_of(sent.turn_id)).story == ANSWERED
    assert len(stage.models.requests) == 1


@pytest.mark.parametrize("effect", [Effect.PURE, Effect.IDEMPOTENT])
async def test_a_dead_workers_tool_call_is_made_again_with_the_same_key(
    staged: Staged, effect: Effect
) -> None:
    tool = first_never(effect)
    stage = staged(ScriptedModels(wants(("lookup", {}))), tool)
    await dying(stage)
    sent = await stage.send()
    await until(lambda: has_run(tool), "the tool")
    await stage.workers[0].kill()
    stage.worker().start()
    told = await stage.end_of(sent.turn_id)
    assert [event.attempt for event in told.events(Turn.ToolCallStarted)] == [1, 2]
    assert len({context.idempotency_key for _, context in tool.runs}) == 1
    assert told.tool_results == [("succeeded", "done")]
    assert told.charged == ["message", "tool_call"]


async def test_a_dead_workers_tool_call_that_must_not_be_repeated_is_not(staged: Staged) -> None:
    tool = first_never(Effect.UNSAFE)
    stage = staged(ScriptedModels(wants(("lookup", {}))), tool)
    await dying(stage)
    sent = await stage.send()
    await until(lambda: has_run(tool), "the tool")
    await stage.workers[0].kill()
    stage.worker().start()
    told = await stage.end_of(sent.turn_id)
    assert len(tool.runs) == 1
    assert "ToolCallOutcomeUnknown" in told.story
    assert told.story[-1] == "Completed"
    assert [m.content for m in stage.models.requests[-1].messages if m.role == "tool"] == [OUTCOME_UNKNOWN]
    assert told.charged == ["message"]


async def test_an_earlier_life_of_the_same_slot_is_taken_over_at_once(
    staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_processors.sweeper.DEAD_AFTER_S", 3600.0)
    tool = first_never(Effect.PURE)
    stage = staged(ScriptedModels(wants(("lookup", {})), two=[hangs, says("Reborn.")]), tool)
    await dying(stage, "turns-1/first")
    sent = [await stage.send(), await stage.send("two")]
    await until(lambda: has_run(tool), "the tool")
    await until(lambda: is_asked(stage), "the model call")
    await stage.workers[0].kill()
    stage.worker("turns-1/second").start()
    async with asyncio.timeout(2):
        told = [await stage.end_of(each.turn_id) for each in sent]
    assert [each.story[-1] for each in told] == ["Completed", "Completed"]


async def test_crash_after_crash_does_not_use_up_the_providers_attempts(
    staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_processors.sweeper.DEAD_AFTER_S", 3600.0)
    stage = staged(ScriptedModels(*[hangs] * WORKERS_LOST_MAX, says("At last.")))
    stage.worker().start(host=False, sweeper=False)
    await stage.begin()
    sent = await stage.send()
    for life in range(WORKERS_LOST_MAX):
        worker = stage.worker(f"slot/{life}").start()
        await until(lambda: is_asked(stage), "the model call")
        await worker.kill()
    stage.worker("slot/last").start()
    told = await stage.end_of(sent.turn_id)
    assert told.story[-1] == "Completed"
    assert told.story.count("ModelCallFailed") == WORKERS_LOST_MAX


async def test_many_turns_survive_workers_that_die_again_and_again(staged: Staged) -> None:
    async def slow(request: ModelRequest) -> ModelReply:
        await asyncio.sleep(0.02)
        asked = sum(message.role == "tool" for message in request.messages)
        return says("Well.") if asked else wants(("lookup", {"q": "x"}))

    async def take_time(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        await asyncio.sleep(0.02)
        return ToolResult("ok")

    stage = staged(ScriptedModels(*[slow] * 10_000), CountedTool(run_once=take_time))
    stage.worker().start(host=False, sweeper=False)
    await stage.begin()
    sent = [await stage.send() for _ in range(30)]
    for _ in range(6):
        pair = [stage.worker().start(), stage.worker().start()]
        await asyncio.sleep(0.06)
        for worker in pair:
            await worker.kill()
    stage.worker().start()
    told = [await stage.end_of(each.turn_id) for each in sent]
    assert {each.story[-1] for each in told} == {"Completed"}
    assert {tuple(each.charged) for each in told} == {("message", "tool_call")}
    for each in told:
        # What was recorded was not asked for again.
        completed = [event.call_id for event in each.events(Turn.ModelCallCompleted)]
        assert len(completed) == len(set(completed)) == 2
        assert len(each.events(Turn.ToolCalled)) == 1


# --- several at once


async def test_two_workers_never_do_a_step_twice(staged: Staged) -> None:
    tool = CountedTool()
    stage = staged(ScriptedModels(), tool)
    for _ in range(2):
        stage.worker().start()
    await stage.begin()
    for number in range(20):
        stage.models.by_text[f"q{number}"] = ScriptedModels(
            wants(("lookup", {"q": number})), says("ok")
        ).steps
    sent = []
    for number in range(20):
        # Both are asked, as two processes behind a load balancer are.
        stage.workers.reverse()
        sent.append(await stage.send(f"q{number}"))
    told = [await stage.end_of(each.turn_id) for each in sent]
    assert {each.story[-1] for each in told} == {"Completed"}
    assert set(stage.models.of_call().values()) == {1}
    assert sorted(arguments["q"] for arguments, _ in tool.runs) == list(range(20))


async def test_a_step_is_taken_by_whoever_hears_of_it_not_by_who_took_the_last(staged: Staged) -> None:
    """As when records are shared out: one worker runs the tools, another one asks the model."""
    stage = staged(ScriptedModels(wants(("lookup", {"q": 1})), says("Found.")), CountedTool())
    turns = stage.worker(processors=(agent_turns,))
    tools = stage.worker(processors=(tool_calls, credit_debits))
    for worker in (turns, tools):
        worker.start(sweeper=False)
    await stage.begin()
    told = await stage.ask()
    (started, *_) = told.events(Turn.ToolCallStarted)
    assert started.worker == tools.work.worker
    assert {event.worker for event in told.events(Turn.ModelCallStarted)} == {turns.work.worker}


async def test_a_sweeper_is_not_misled_by_what_it_remembers(staged: Staged) -> None:
    failed = asyncio.Event()

    async def fails_late(request: ModelRequest) -> ModelReply:
        await failed.wait()
        raise fails(ModelErrorClass.OVERLOADED)

    stage = staged(ScriptedModels(fails_late, says("By the other one.")))
    first = stage.worker().start(sweeper=False)
    await stage.begin()
    sent = await stage.send()
    await until(lambda: is_asked(stage), "the model call")
    second = stage.worker()
    turn = await second.bus.read(Turn, sent.turn_id, sent.tenant_id)
    assert turn.open_call is not None
    failed.set()
    await until(lambda: nothing_under_way(stage), "the failure")
    second.start(host=False)
    told = await stage.end_of(sent.turn_id)
    assert [event.worker for event in told.events(Turn.ModelCallStarted)] == [
        first.work.worker,
        second.work.worker,
    ]


async def test_a_turn_runs_with_the_configuration_it_began_with(staged: Staged) -> None:
    stage = staged()
    gate = stage.worker().start(host=False, sweeper=False)
    await stage.begin(system_prompt="old")
    other = stage.worker().start()
    await other.bus.read(Agent, stage.owner.agent_id, stage.owner.tenant_id)
    change = {"configuration": {"system_prompt": "new"}}
    await gate.bus.execute(
        ChangeAgent(tenant_id=stage.owner.tenant_id, agent_id=stage.owner.agent_id, patch=change), by=BY
    )
    await stage.ask()
    assert stage.models.requests[0].system == "new"


async def nothing_under_way(stage: Stage) -> bool:
    return stage.models.under_way == 0


async def test_two_sweepers_take_lost_work_up_once(staged: Staged) -> None:
    stage = staged()
    stage.worker().start(host=False)
    stage.worker().start(host=False)
    await stage.begin()
    sent = [await stage.send() for _ in range(20)]
    for each in sent:
        assert (await stage.end_of(each.turn_id)).story == ANSWERED
    assert len(stage.models.requests) == 20
    stage.worker().start()


# --- its own late work


async def test_a_tool_that_takes_no_notice_of_being_stopped_does_not_stop_the_turn(staged: Staged) -> None:
    async def stubborn(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        while True:
            try:
                await asyncio.sleep(0.6)
                return ToolResult("too late")
            except asyncio.CancelledError:
                continue

    tool = CountedTool(run_once=stubborn, timeout_s=0.05, effect=Effect.UNSAFE)
    stage = await staged(ScriptedModels(wants(("lookup", {})), says("Without it.")), tool).begin()
    told = await stage.ask()
    assert told.story[-1] == "Completed"
    assert "ToolCallOutcomeUnknown" in told.story
    await asyncio.sleep(0.7)  # until it comes back, to nobody


class ForgetfulLog(MemoryEventLog):
    """Writes, and then does not answer; nor for a while after."""

    def __init__(self) -> None:
        super().__init__()
        self.forget = ""  # the type of command whose answer is lost next
        self.away_calls = 0

    async def append(self, batch: Batch) -> datetime:
        self._check_away()
        at = await super().append(batch)
        if self.forget and any(command.type == self.forget for command in batch.commands):
            self.forget, self.away_calls = "", 3
            raise LogUnavailable("cut")
        return at

    async def commands(self, ids: Any) -> dict[Any, CommandRow]:
        self._check_away()
        return await super().commands(ids)

    async def has_forgotten(self) -> bool:
        """Whether the answer that was to be lost is."""
        return self.forget == ""

    def _check_away(self) -> None:
        if self.away_calls:
            self.away_calls -= 1
            raise LogUnavailable("away")


@pytest.mark.parametrize(
    "command", ["StartModelCall", "CompleteModelCall", "StartToolCall", "CompleteToolCall", "SettleHold"]
)
async def test_a_step_whose_fate_was_unknown_is_gone_on_with(staged: Staged, command: str) -> None:
    tool = CountedTool(effect=Effect.UNSAFE)
    stage = staged(ScriptedModels(wants(("lookup", {})), says("Found.")), tool)
    stage.log = log = ForgetfulLog()
    await stage.begin()
    log.forget = command
    async with asyncio.timeout(4):
        told = await stage.ask()
    assert told.story == [
        *("Accepted", "ContextAssembled", "ModelCallStarted", "ModelCallCompleted", "ToolCallRequested"),
        *("ToolCallStarted", "ToolCalled", "ModelCallStarted", "ModelCallCompleted", "Completed"),
    ]
    await until(log.has_forgotten, "the lost answer")  # a settlement follows the end of its turn
    assert (len(stage.models.requests), len(tool.runs)) == (2, 1)


async def test_a_turn_whose_worker_left_it_ends_at_its_deadline(staged: Staged) -> None:
    stage = staged(ScriptedModels(*[hangs] * 5))
    await stage.begin(rules(turn_deadline_s=0.4))
    sent = await stage.send()
    await until(lambda: is_asked(stage), "the model call")
    stage.worker().start()
    await stage.workers[0].kill()
    told = await stage.end_of(sent.turn_id)
    assert (told.story[-1], told.end.charged_ncr) == ("TimedOut", 0)
