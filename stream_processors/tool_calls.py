"""Tool calls are run, each on its own; a slow tool keeps nobody else waiting.

Reads `Turn.ToolCallRequested`; asks for `StartToolCall`, `CompleteToolCall` or `RefuseToolCall`. Safe to replay: a call
is claimed under the log's lock, and one whose effect must not be repeated is never run again by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import timedelta

from commands.bus import LATEST
from commands.turn import CompleteToolCall, RefuseToolCall, RetakeToolCall, StartToolCall
from domain.agent import Agent
from domain.crash_points import crash_point
from domain.errors import InsufficientCredits, PlanLimitExceeded, Refusal
from domain.ids import ToolCallId, TurnId, UserId, derived
from domain.ports import Tool, ToolContext, ToolFailed
from domain.turn import ToolCall, ToolOutcome, Turn
from schemas.codec import storable
from schemas.records import AnyRecord
from stream_processors.processor import Processor, Work

log_of = logging.getLogger(__name__)

RESULT_CHARS_MAX = 64_000  # of a tool's text that reaches the log and the model

tool_calls = Processor("tool_calls")


@tool_calls.on(Turn.ToolCallRequested)
async def requested(record: AnyRecord, work: Work) -> None:
    if not record.event.approval_required:
        turn_id, tenant_id = TurnId(record.stream_id), UserId(record.tenant_id)
        await run_tool(turn_id, record.event.tool_call_id, tenant_id, work, record.stream_version)


async def run_tool(
    turn_id: TurnId, tool_call_id: ToolCallId, tenant_id: UserId, work: Work, version: int = 1
) -> None:
    """Run a tool call that waits as of `version` of the turn's stream or later, if nobody else has taken it."""
    if tool_call_id in work.running:
        return
    try:
        turn = await work.bus.read(Turn, turn_id, tenant_id, version)
        call = turn.tool_calls.get(tool_call_id)
        if turn.outcome is not None or call is None or call.status != "requested":
            return
        tool = await _tool_of(turn, call, work)
        if tool is None:
            await _refuse(
                turn, call, f"The tool {call.tool!r} is not available any more.", "tool_unavailable", work
            )
            return
        await _start(turn, call, tool, work)
    except Refusal:
        pass  # somebody else was faster, or the turn is over


async def retake_tool(
    turn_id: TurnId, tool_call_id: ToolCallId, tenant_id: UserId, lost_worker: str, work: Work
) -> None:
    """Take a tool call over from a worker that is gone, or hopelessly late."""
    if lost_worker == work.worker:
        work.stop(tool_call_id)
    try:
        turn = await work.bus.read(Turn, turn_id, tenant_id, LATEST)
        call = turn.tool_calls.get(tool_call_id)
        tool = await _tool_of(turn, call, work) if call is not None else None
        if call is None or call.status == "ended":
            return None
        if call.status == "requested":
            return await run_tool(turn_id, tool_call_id, tenant_id, work, LATEST)
        command = RetakeToolCall(
            tenant_id=tenant_id,
            turn_id=turn_id,
            tool_call_id=tool_call_id,
            lost_worker=lost_worker,
            worker=work.worker,
            deadline_at=work.clock() + timedelta(seconds=tool.timeout_s if tool else 0.0),
        )
        command_id = derived(tool_call_id, "retake", call.attempt, lost_worker, work.worker)
        outcome = await work.persist(command, command_id, turn_id, turn.limits.deadline_at)
        attempt = outcome.result.get("attempt")
        if attempt is not None and not outcome.seen:
            await work.tool_slots.acquire()
            work.spawn(tool_call_id, turn.id, _run(turn, call, tool, int(attempt), work))
    except Refusal:
        pass  # it ended meanwhile


async def _start(turn: Turn, call: ToolCall, tool: Tool, work: Work) -> None:
    await work.tool_slots.acquire()
    claimed = False
    command = StartToolCall(
        tenant_id=turn.owner_id,
        turn_id=turn.turn_id,
        tool_call_id=call.tool_call_id,
        worker=work.worker,
        deadline_at=work.clock() + timedelta(seconds=tool.timeout_s),
    )
    command_id = derived(call.tool_call_id, "start", call.attempt, work.worker)
    attempt = 0
    try:
        outcome = await work.persist(command, command_id, turn.id, turn.limits.deadline_at)
        attempt, claimed = int(outcome.result["attempt"]), not outcome.seen
        crash_point("tool.claimed")
    except InsufficientCredits:
        sentence = "There are not enough credits left to run this tool."
        await _refuse(turn, call, sentence, "insufficient_credits", work)
    except PlanLimitExceeded as refusal:
        await _refuse(turn, call, str(refusal), refusal.code, work)
    finally:
        if not claimed:
            work.tool_slots.release()
    if claimed:
        work.spawn(call.tool_call_id, turn.id, _run(turn, call, tool, attempt, work))


async def _run(turn: Turn, call: ToolCall, tool: Tool | None, attempt: int, work: Work) -> None:
    """Run the tool and record what came of it. Ours alone: the call was claimed."""
    began = time.monotonic()
    units: dict[str, int] = {}
    outcome: ToolOutcome = "failed"
    error_class: str | None = None
    try:
        if tool is None:
            raise ToolFailed(f"The tool {call.tool!r} is not available any more.", "tool_unavailable")
        context = ToolContext(
            turn.owner_id, turn.agent_id, str(call.tool_call_id), str(call.tool_call_id), tool.timeout_s
        )
        async with asyncio.timeout(tool.timeout_s):
            result = await tool.run(dict(call.arguments or {}), context)
        outcome, text, units = "succeeded", result.text, dict(result.units)
    except TimeoutError:
        assert tool is not None
        outcome, error_class = "timed_out", "timeout"
        text = f"The tool {call.tool!r} took longer than {tool.timeout_s:g} seconds."
    except ToolFailed as failure:
        error_class, text = failure.error_class, str(failure)
    except Exception as bug:
        # A tool's mistake is the tool's answer: the turn goes on.
        log_of.exception("tool %s failed", call.tool)
        error_class, text = "tool_bug", f"The tool {call.tool!r} failed unexpectedly ({type(bug).__name__})."
    finally:
        work.tool_slots.release()
    crash_point("tool.ran")
    command = CompleteToolCall(
        tenant_id=turn.owner_id,
        turn_id=turn.turn_id,
        tool_call_id=call.tool_call_id,
        attempt=attempt,
        outcome=outcome,
        text=storable(text[:RESULT_CHARS_MAX]),
        latency_ms=int((time.monotonic() - began) * 1000),
        units=units,
        error_class=error_class and storable(error_class),
    )
    work.running.pop(call.tool_call_id, None)
    try:
        command_id = derived(call.tool_call_id, "ended", attempt, work.worker)
        await work.persist(command, command_id, turn.id, turn.limits.deadline_at)
        crash_point("tool.recorded")
    except Refusal:
        pass  # the turn was cancelled, timed out or taken over meanwhile


async def agent_of(turn: Turn, work: Work) -> Agent:
    """The agent, with the configuration that the turn began with."""
    agent = await work.bus.read(Agent, turn.agent_id, turn.owner_id)
    if agent.config_version < turn.config_version:
        # Another process has changed it since it was read here.
        agent = await work.bus.read(Agent, turn.agent_id, turn.owner_id, LATEST)
    return agent


async def _tool_of(turn: Turn, call: ToolCall, work: Work) -> Tool | None:
    agent = await agent_of(turn, work)
    _, settings = agent.settings_at(turn.config_version)
    return work.toolbox.offered(agent, settings).get(call.tool)


async def _refuse(turn: Turn, call: ToolCall, sentence: str, code: str, work: Work) -> None:
    command = RefuseToolCall(
        tenant_id=turn.owner_id,
        turn_id=turn.turn_id,
        tool_call_id=call.tool_call_id,
        sentence=sentence,
        refusal_code=code,
    )
    await work.ask(command, derived(call.tool_call_id, "refuse", code), turn.id)
