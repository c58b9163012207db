"""Turns are run: context, model, tools, model again, until there is an answer.

Reads `Turn.Accepted`, `Conversation.TurnActivated`, `Turn.ToolCalled` and what ends a turn; asks for `StartModelCall`,
`CompleteModelCall` and their kin. Safe to replay: what a turn needs next follows from its events alone, and the claim
is decided under the log's lock. Whoever accepts a message and knows the worker that will take it up claims the first
model call for it together with the message (`with_first_call`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256
from uuid import UUID

from commands.bus import LATEST
from commands.turn import (
    AbandonModelCall,
    CompleteModelCall,
    EndOverdueTurn,
    FailModelCall,
    FirstCall,
    ModelCallPlan,
    SendMessage,
    StartModelCall,
    fits,
)
from domain.agent import Agent
from domain.configuration import Settings
from domain.conversation import FIRST_MESSAGE_VERSION, Conversation
from domain.crash_points import crash_point
from domain.errors import Refusal
from domain.event_log import LogUnavailable
from domain.ids import TurnId, UserId, derived
from domain.ports import (
    Effect,
    Message,
    ModelCard,
    ModelErrorClass,
    ModelFault,
    ModelReply,
    ModelRequest,
    Tool,
    ToolRequest,
    ToolSpec,
)
from domain.prompt import digest_of, first_messages_of, messages_of
from domain.turn import (
    Answer,
    AskedTool,
    AskModel,
    Await,
    GiveUp,
    OpenCall,
    RunTools,
    Turn,
    call_of,
    next_action,
)
from schemas.codec import storable, storable_json
from schemas.hints import Step
from schemas.records import AnyRecord
from stream_processors.history import NO_PAST, Past
from stream_processors.processor import Processor, Work
from stream_processors.tool_calls import agent_of, run_tool

log_of = logging.getLogger(__name__)

agent_turns = Processor("agent_turns")


@agent_turns.on(Turn.Accepted)
async def accepted(record: AnyRecord, work: Work) -> None:
    if record.event.queued or record.event.invoked:
        return
    turn_id, tenant_id, version = TurnId(record.stream_id), UserId(record.tenant_id), record.stream_version
    if not work.taken_up.take((turn_id, version)):
        await step(turn_id, tenant_id, work, version)


@agent_turns.on(Conversation.TurnActivated)
async def activated(record: AnyRecord, work: Work) -> None:
    await step(record.event.turn_id, UserId(record.tenant_id), work)


@agent_turns.on(Turn.ToolCalled, Turn.ToolCallOutcomeUnknown)
async def tool_called(record: AnyRecord, work: Work) -> None:
    if not work.taken_up.take((record.stream_id, record.stream_version)):
        await step(TurnId(record.stream_id), UserId(record.tenant_id), work, record.stream_version)


@agent_turns.on(Turn.ModelCallFailed)
async def model_call_failed(record: AnyRecord, work: Work) -> None:
    if record.event.retry_at is not None:
        work.retry_at(record.event.retry_at)


@agent_turns.on(Turn.Cancelled, Turn.TimedOut)
async def ended_early(record: AnyRecord, work: Work) -> None:
    work.stop_turn(record.stream_id)


async def take_up(told: Step, work: Work) -> None:
    """Begin a step that was heard of before its record has come, which makes sure; at once if it can only be ours."""
    if told.worker == work.worker or not work.model_slots.locked():
        turn_id, tenant_id = TurnId(told.turn_id), UserId(told.tenant_id)
        if told.conversation_id is not None:
            await work.bus.have(tenant_id, (turn_id, told.conversation_id))
        await step(turn_id, tenant_id, work, told.version)
        if turn_id in work.running:
            work.taken_up.put((turn_id, told.version), True)


async def step(turn_id: TurnId, tenant_id: UserId, work: Work, version: int = 1) -> None:
    """Do what the turn needs next, as of `version` of its stream or later, if it is ours to do."""
    if turn_id in work.running:
        return
    try:
        turn = await work.bus.read(Turn, turn_id, tenant_id, version)
        now = work.clock()
        match next_action(turn, now):
            case AskModel(not_before=at) as action if at is None or at <= now:
                await _ask_model(turn, action, work)
            case RunTools(tool_call_ids):
                for tool_call_id in tool_call_ids:
                    await run_tool(turn_id, tool_call_id, tenant_id, work)
            case GiveUp() | Answer():
                ending = EndOverdueTurn(tenant_id=tenant_id, turn_id=turn_id)
                await work.ask(ending, derived(turn_id, "end_overdue", turn.version), turn_id)
            case Await() if turn.open_call and _waits_for_us(turn.open_call, work):
                await _ask_claimed(turn, turn.open_call, work)
            case _:
                pass  # somebody is at it, or it is over, or its time has not come
    except Refusal:
        pass  # somebody else was faster; what they did has its own records


async def abandon(turn_id: TurnId, tenant_id: UserId, lost_worker: str, work: Work) -> None:
    """Take the turn from a worker that is gone, or hopelessly late, and go on with it."""
    late = lost_worker == work.worker
    if late:
        work.stop(turn_id)
    error_class = ModelErrorClass.TIMEOUT if late else ModelErrorClass.WORKER_LOST
    command = AbandonModelCall(
        tenant_id=tenant_id, turn_id=turn_id, lost_worker=lost_worker, error_class=error_class
    )
    try:
        turn = await work.bus.read(Turn, turn_id, tenant_id, LATEST)
        await work.ask(command, derived(turn_id, "abandon", turn.version, work.worker), turn_id)
    except Refusal:
        pass  # it was not at a model call, or has just recorded its end
    await step(turn_id, tenant_id, work, LATEST)


@dataclass(frozen=True, slots=True)
class _Asking:
    """What a model call is made with."""

    model_id: int
    card: ModelCard | None
    settings: Settings
    past: Past
    messages: tuple[Message, ...]
    with_tools: bool
    tools: Mapping[str, Tool]

    def plan(self, work: Work, worker: str) -> ModelCallPlan:
        """The call as it is claimed for a worker, and recorded."""
        return ModelCallPlan(
            provider=self.card.provider if self.card else "none",
            model=self.card.name if self.card else f"model {self.model_id}",
            worker=worker,
            deadline_at=work.clock() + timedelta(seconds=work.model_timeout_s),
            with_tools=self.with_tools,
            history_versions=self.past.versions,
            history_count=len(self.past.exchanges) * 2,
            prompt_digest=digest_of(self.settings.system_prompt, self.messages),
            tools_offered=tuple(self.tools),
        )


async def with_first_call(command: SendMessage, work: Work, worker: str | None) -> SendMessage:
    """The message with its model call, for the worker that can go on with it at once: that saves a write and a wait.

    Nothing is claimed by this. What does not fit when the message is decided is run as any other turn.
    """
    if worker is None or work.model_slots.locked():
        return command
    try:
        agent = await work.bus.read(Agent, command.agent_id, command.tenant_id)
        config_version = agent.served_version(command.by_owner)
        _, settings = agent.settings_at(config_version)
        messages_max = 0 if command.stateless else _history_messages(settings)
        past, message_version = NO_PAST, FIRST_MESSAGE_VERSION
        if command.beginning != "new":
            at_hand = work.history.at_hand(command.conversation_id, messages_max)
            if at_hand is None:
                return command
            past, message_version = at_hand
        messages = first_messages_of(past.exchanges, command.content, messages_max)
        with_tools = settings.max_tool_iterations > 0
        asking = await _asking(agent, config_version, past, messages, with_tools, work)
    except (Refusal, LogUnavailable):
        return command  # whatever is wrong is said when it is decided
    first_call = FirstCall(
        plan=asking.plan(work, worker), config_version=config_version, message_version=message_version
    )
    if worker == work.worker:
        work.planned.put(command.turn_id, (first_call, asking))
    return replace(command, first_call=first_call)


async def _ask_model(turn: Turn, action: AskModel, work: Work) -> None:
    await work.model_slots.acquire()
    claimed = False
    try:
        with _beginning(call_of(turn.id, action.iteration), action.attempt, work):
            asking = await _asking_of(turn, action, work)
            plan = asking.plan(work, work.worker)
            start = StartModelCall(tenant_id=turn.owner_id, turn_id=turn.turn_id, action=action, plan=plan)
            command_id = derived(turn.id, "ask", action.iteration, action.attempt, work.worker)
            outcome = await work.persist(start, command_id, turn.id, turn.limits.deadline_at)
        claimed = not outcome.seen
        crash_point("turn.claimed")
    finally:
        if not claimed:
            work.model_slots.release()
    if claimed:
        _begin(turn, action, asking, min(plan.deadline_at, turn.limits.deadline_at), work)


def _waits_for_us(call: OpenCall, work: Work) -> bool:
    """Whether a call was claimed for this worker by somebody else, and not begun."""
    return call.worker == work.worker and (call.call_id, call.attempt) not in work.begun


@contextmanager
def _beginning(call_id: UUID, attempt: int, work: Work) -> Iterator[None]:
    """Have a call count as begun here, before anybody can see that it is claimed; not if the block fails."""
    work.begun.put((call_id, attempt), True)
    try:
        yield
    except BaseException:
        work.begun.take((call_id, attempt))
        raise


async def _ask_claimed(turn: Turn, call: OpenCall, work: Work) -> None:
    """Make the model call that was claimed for this worker when the message was accepted."""
    with _beginning(call.call_id, call.attempt, work):
        action = AskModel(call.iteration, call.attempt, turn.asked_with_tools, None)
        planned: tuple[FirstCall, _Asking] | None = work.planned.take(turn.id)
        if planned is not None and fits(planned[0], turn, action):
            asking = planned[1]
        else:  # planned elsewhere or for another try of the same message, or forgotten
            asking = await _asking_of(turn, action, work)
        await work.model_slots.acquire()
        crash_point("turn.claimed")
        _begin(turn, action, asking, call.deadline_at, work)


async def _asking_of(turn: Turn, action: AskModel, work: Work) -> _Asking:
    agent = await agent_of(turn, work)
    _, settings = agent.settings_at(turn.config_version)
    messages_max = _history_messages(settings)
    if turn.conversation_id is not None:
        # Needed for the claim, too; those that are looked up at the same time share a look at the log.
        await work.bus.read(Conversation, turn.conversation_id, turn.owner_id)
    past = await work.history.before(turn, messages_max)
    messages = messages_of(past.exchanges, past.question, turn, messages_max)
    return await _asking(agent, turn.config_version, past, messages, action.with_tools, work)


async def _asking(  # noqa: PLR0913 - what a call is made of
    agent: Agent, config_version: int, past: Past, messages: tuple[Message, ...], with_tools: bool, work: Work
) -> _Asking:
    model_id, settings = agent.settings_at(config_version)
    card = await work.models.resolve(model_id)
    tools = work.toolbox.offered(agent, settings) if with_tools and card and card.tools else {}
    return _Asking(model_id, card, settings, past, messages, with_tools, tools)


def _history_messages(settings: Settings) -> int:
    return settings.max_history_messages if settings.use_memory else 0


def _begin(turn: Turn, action: AskModel, asking: _Asking, deadline_at: datetime, work: Work) -> None:
    """Make a claimed call, in the background."""
    settings = asking.settings
    request = ModelRequest(
        model=asking.card.name if asking.card else "",
        system=settings.system_prompt,
        messages=asking.messages,
        tools=tuple(ToolSpec(tool.name, tool.description, tool.parameters) for tool in asking.tools.values()),
        max_output_tokens=settings.max_output_tokens,
        temperature=settings.temperature,
        timeout_s=max(0.001, (deadline_at - work.clock()).total_seconds()),
        idempotency_key=str(call_of(turn.id, action.iteration)),
    )
    work.spawn(turn.id, turn.id, _converse(turn, action, request, asking.tools, work))


async def _converse(
    turn: Turn, action: AskModel, request: ModelRequest, tools: Mapping[str, Tool], work: Work
) -> None:
    """Ask the model and record what came of it. Ours alone: the call was claimed."""
    began = time.monotonic()
    turn_id, call_id = turn.turn_id, call_of(turn.id, action.iteration)
    on_text = (
        partial(work.feed.token, turn_id, action.iteration, action.attempt) if turn.mode == "stream" else None
    )
    command: CompleteModelCall | FailModelCall
    try:
        reply = await work.models.complete(request.model, request, on_text)
        _check_said_something(reply, action)
        crash_point("model.answered")
        command = CompleteModelCall(
            tenant_id=turn.owner_id,
            turn_id=turn_id,
            call_id=call_id,
            attempt=action.attempt,
            text=storable(reply.text),
            finish_reason=reply.finish_reason,
            asked=tuple(
                asked_tool(request_, ordinal, tools) for ordinal, request_ in enumerate(reply.tool_requests)
            ),
            usage=reply.usage,
            latency_ms=int((time.monotonic() - began) * 1000),
            ttft_ms=reply.ttft_ms,
        )
    except ModelFault as fault:
        command = _failed(turn, action, fault)
    except Exception:
        # A mistake of an adapter, or an answer that nobody foresaw, is an attempt that failed.
        log_of.exception("asking model %s failed", request.model)
        sentence = "The model's answer could not be understood."
        command = _failed(turn, action, ModelFault(ModelErrorClass.GARBAGE, sentence))
    finally:
        work.model_slots.release()
        # What the recorded reply sets off may come to this worker at once.
        work.running.pop(turn_id, None)
    command_id = derived(turn_id, "asked", action.iteration, action.attempt, work.worker)
    try:
        await work.persist(command, command_id, turn_id, turn.limits.deadline_at)
        crash_point("turn.recorded")
    except Refusal:
        pass  # the turn was cancelled, timed out or taken over meanwhile


def _failed(turn: Turn, action: AskModel, fault: ModelFault) -> FailModelCall:
    return FailModelCall(
        tenant_id=turn.owner_id,
        turn_id=turn.turn_id,
        call_id=call_of(turn.id, action.iteration),
        attempt=action.attempt,
        error_class=fault.error_class,
        sentence=storable(str(fault)),
        retry_after_s=fault.retry_after_s,
    )


def _check_said_something(reply: ModelReply, action: AskModel) -> None:
    silent = not reply.text.strip() and not reply.tool_requests
    if silent and action.with_tools and reply.finish_reason == "stop":
        raise ModelFault(ModelErrorClass.GARBAGE, "The model answered with nothing.")


def asked_tool(request: ToolRequest, ordinal: int, tools: Mapping[str, Tool]) -> AskedTool:
    """What the model wants, checked against the tools it was offered."""
    name = storable(request.name)[:64]
    tool = tools.get(request.name)
    arguments = None if request.arguments is None else storable_json(request.arguments)
    refusal = None
    if tool is None:
        names = ", ".join(tools) or "none"
        refusal = f"There is no tool named {name!r}. Available tools: {names}."
    elif arguments is None:
        refusal = f"The arguments of {name!r} must be one JSON object."
    else:
        refusal = tool.validate(arguments)
    canonical = json.dumps(arguments if arguments is not None else request.raw, sort_keys=True)
    return AskedTool(
        storable(request.id) or f"call_{ordinal}",
        name,
        tool.kind if tool else "builtin",
        tool.effect if tool else Effect.UNSAFE,
        arguments or {},
        sha256(canonical.encode()).hexdigest(),
        refusal,
    )
