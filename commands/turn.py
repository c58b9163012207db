"""What may be asked about turns: by people (send, invoke, cancel) and by the workers that run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from commands.command import Command, Result, WriteSide, handles
from domain.agent import Agent
from domain.callback import Callback, callback_of
from domain.conversation import Channel, Conversation, WhenBusy
from domain.credit_account import CreditAccount
from domain.errors import NotFound, NotYours
from domain.ids import (
    AgentId,
    CallId,
    ConversationId,
    MessageId,
    ToolCallId,
    TurnId,
    account_of,
    derived,
    hold_of,
)
from domain.ports import FinishReason, ModelErrorClass, TokenUsage
from domain.prices import TOOL_CALL
from domain.turn import (
    GRACE_S,
    TOOL_CALLS_MAX,
    Answer,
    AskedTool,
    AskModel,
    GiveUp,
    Mode,
    RunTools,
    ToolOutcome,
    Turn,
    TurnLimits,
    next_action,
)

PICKUP_S = 3.0  # a record reaches a worker at once; after this the sweeper looks itself
HOLD_MARGIN_S = 3600.0  # a hold outlives its turn's deadline by this much
GRACE = timedelta(seconds=GRACE_S)
PICKUP = timedelta(seconds=PICKUP_S)

INTERRUPTED = "Another message of the conversation took its place."

Beginning = Literal["new", "named", "existing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCallPlan:
    """How a worker is going to ask the model, with what, and for how long."""

    provider: str
    model: str
    worker: str
    deadline_at: datetime
    with_tools: bool
    history_versions: tuple[int, int]
    history_count: int
    prompt_digest: str
    tools_offered: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCall:
    """The first model call of a turn, planned before its message is accepted.

    It fits only a message that is answered with this configuration and has this version of the conversation's stream.
    """

    plan: ModelCallPlan
    config_version: int
    message_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendMessage(Command):
    """Ask an agent something. The caller picks `turn_id`, so resending is harmless.

    `beginning` says whether the conversation is new, must exist, or is started on first use of its name. With
    `first_call` the model call is claimed together with the message, for the worker that planned it, if it still fits.
    """

    turn_id: TurnId
    conversation_id: ConversationId
    beginning: Beginning
    name: str | None
    agent_id: AgentId
    content: str
    channel: Channel
    mode: Mode
    meter: str
    by_owner: bool
    stateless: bool = False
    when_busy: WhenBusy = "queue"
    callback_url: str | None = None
    first_call: FirstCall | None = None

    def reads(self) -> tuple[UUID, ...]:
        streams: tuple[UUID, ...] = (self.agent_id, account_of(self.tenant_id))
        return streams if self.beginning == "new" else (*streams, self.conversation_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class InvokeTool(Command):
    """Run one tool of an agent without a model."""

    turn_id: TurnId
    agent_id: AgentId
    asked: AskedTool
    mode: Mode
    by_owner: bool

    def reads(self) -> tuple[UUID, ...]:
        return self.agent_id, account_of(self.tenant_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfTurn(Command):
    """Something asked about one turn."""

    turn_id: TurnId

    def reads(self) -> tuple[UUID, ...]:
        return (self.turn_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTurn(_OfTurn):
    """The answer is not wanted any more."""

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModelCall(_OfTurn):
    """Claim the next model call of a turn. What it is asked with is recorded with the first call only."""

    action: AskModel
    plan: ModelCallPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteModelCall(_OfTurn):
    """The model answered."""

    call_id: CallId
    attempt: int
    text: str
    finish_reason: FinishReason
    asked: Sequence[AskedTool]
    usage: TokenUsage
    latency_ms: int
    ttft_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailModelCall(_OfTurn):
    """The model gave no reply."""

    call_id: CallId
    attempt: int
    error_class: ModelErrorClass
    sentence: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonModelCall(_OfTurn):
    """The worker that asked the model is gone, or stuck far beyond its own time limit."""

    lost_worker: str
    error_class: ModelErrorClass


@dataclass(frozen=True, slots=True, kw_only=True)
class StartToolCall(_OfTurn):
    """Claim a tool call; the hold grows by its price in the same transaction."""

    tool_call_id: ToolCallId
    worker: str
    deadline_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RetakeToolCall(_OfTurn):
    """Take a tool call over from a worker that is gone."""

    tool_call_id: ToolCallId
    lost_worker: str
    worker: str
    deadline_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseToolCall(_OfTurn):
    """Answer a tool call without running it."""

    tool_call_id: ToolCallId
    sentence: str
    refusal_code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteToolCall(_OfTurn):
    """A tool gave its result, or failed to."""

    tool_call_id: ToolCallId
    attempt: int
    outcome: ToolOutcome
    text: str
    latency_ms: int
    units: Mapping[str, int]
    error_class: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOverdueTurn(_OfTurn):
    """Its time is up, or it failed for good: end it, whatever it waits for."""


# --- by people -------------------------------------------------------------------------------------------------


@handles(SendMessage)
def send_message(command: SendMessage, write: WriteSide) -> Result:
    agent = write.look(Agent, command.agent_id)
    agent.check_can_answer(command.by_owner)
    conversation = _conversation(command, write)
    config_version = agent.served_version(command.by_owner)
    _, settings = agent.settings_at(config_version)
    limits = TurnLimits(settings.max_tool_iterations, TOOL_CALLS_MAX, _deadline(write))
    message_id = MessageId(derived(command.turn_id, "asked"))
    if command.when_busy == "interrupt":
        _interrupt(conversation, write)
    active = conversation.accept(command.turn_id, message_id, command.content, command.when_busy, write.now)
    message_version = conversation.version if active else conversation.version - 1
    turn = _accept(
        write,
        command.turn_id,
        agent,
        config_version,
        limits,
        command.meter,
        command.mode,
        conversation_id=command.conversation_id,
        message_id=message_id,
        message_version=message_version,
        channel=command.channel,
        stateless=command.stateless,
        invoked=False,
        queued=not active,
        callback=command.callback_url is not None,
    )
    if command.callback_url is not None:
        _request_callback(command, agent, command.callback_url, write)
    first_call, action = command.first_call, next_action(turn, write.now)
    if active and first_call and isinstance(action, AskModel) and fits(first_call, turn, action):
        _start_model_call(turn, action, first_call.plan, write)
    else:
        at = write.now + PICKUP if active else limits.deadline_at
        write.due("turn", command.turn_id, command.turn_id, at)
    return {"queued": not active, "accepted_at": write.now.isoformat()}


@handles(InvokeTool)
def invoke_tool(command: InvokeTool, write: WriteSide) -> Result:
    agent = write.look(Agent, command.agent_id)
    agent.check_can_answer(command.by_owner)
    turn = _accept(
        write,
        command.turn_id,
        agent,
        agent.served_version(command.by_owner),
        TurnLimits(1, 1, _deadline(write)),
        TOOL_CALL,
        command.mode,
        conversation_id=None,
        message_id=None,
        message_version=0,
        channel="api",
        stateless=True,
        invoked=True,
        queued=False,
    )
    turn.request_tool(1, 0, command.asked)
    _go_on(turn, write)
    return {"accepted_at": write.now.isoformat()}


@handles(CancelTurn)
def cancel_turn(command: CancelTurn, write: WriteSide) -> Result:
    turn = write.get(Turn, command.turn_id)
    turn.cancel(write.actor, command.reason, write.now)
    _leave_conversation(turn, write)
    return {"status": "cancelled"}


# --- by the workers ----------------------------------------------------------------------------------------------


@handles(StartModelCall)
def start_model_call(command: StartModelCall, write: WriteSide) -> Result:
    turn = write.get(Turn, command.turn_id)
    if turn.conversation_id is not None:
        conversation = write.look(Conversation, turn.conversation_id)
        if conversation.active_turn != turn.id:
            raise NotYours("Another turn of the conversation comes first.")
    call_id = _start_model_call(turn, command.action, command.plan, write)
    return {"call_id": str(call_id)}


@handles(CompleteModelCall)
def complete_model_call(command: CompleteModelCall, write: WriteSide) -> None:
    turn = write.get(Turn, command.turn_id)
    turn.complete_model_call(
        command.call_id,
        command.attempt,
        command.text,
        command.finish_reason,
        command.asked,
        command.usage,
        command.latency_ms,
        command.ttft_ms,
    )
    _go_on(turn, write)


@handles(FailModelCall)
def fail_model_call(command: FailModelCall, write: WriteSide) -> None:
    turn = write.get(Turn, command.turn_id)
    turn.fail_model_call(
        command.call_id,
        command.attempt,
        command.error_class,
        command.sentence,
        command.retry_after_s,
        write.now,
    )
    _go_on(turn, write)


@handles(AbandonModelCall)
def abandon_model_call(command: AbandonModelCall, write: WriteSide) -> None:
    turn = write.get(Turn, command.turn_id)
    call = turn.open_call
    if turn.outcome is not None or call is None or call.worker != command.lost_worker:
        raise NotYours("The model call is not held by that worker.")
    sentence = "The process that asked the model went away before it had an answer."
    turn.fail_model_call(call.call_id, call.attempt, command.error_class, sentence, None, write.now)
    _go_on(turn, write)


@handles(StartToolCall)
def start_tool_call(command: StartToolCall, write: WriteSide) -> Result:
    turn = write.get(Turn, command.turn_id)
    call = turn.tool_calls.get(command.tool_call_id)
    attempt = turn.start_tool(command.tool_call_id, command.worker, command.deadline_at)
    if not turn.invoked and call is not None:  # an invocation's hold was taken when it was accepted
        account = write.get(CreditAccount, account_of(turn.owner_id))
        limits = write.limits_of(account)
        account.extend(turn.hold_id, call.tool_call_id, call.price_ncr, TOOL_CALL, write.now, limits)
    write.due("tool_call", command.tool_call_id, turn.id, command.deadline_at + GRACE, command.worker)
    return {"attempt": attempt}


@handles(RetakeToolCall)
def retake_tool_call(command: RetakeToolCall, write: WriteSide) -> Result:
    turn = write.get(Turn, command.turn_id)
    attempt = turn.retake_tool(command.tool_call_id, command.lost_worker, command.worker, command.deadline_at)
    if attempt is None:
        write.done("tool_call", command.tool_call_id, turn.id)
        _go_on(turn, write)
    else:
        write.due("tool_call", command.tool_call_id, turn.id, command.deadline_at + GRACE, command.worker)
    return {"attempt": attempt}


@handles(RefuseToolCall)
def refuse_tool_call(command: RefuseToolCall, write: WriteSide) -> None:
    turn = write.get(Turn, command.turn_id)
    turn.refuse_tool(command.tool_call_id, command.sentence, command.refusal_code)
    write.done("tool_call", command.tool_call_id, turn.id)
    _go_on(turn, write)


@handles(CompleteToolCall)
def complete_tool_call(command: CompleteToolCall, write: WriteSide) -> None:
    turn = write.get(Turn, command.turn_id)
    turn.end_tool(
        command.tool_call_id,
        command.attempt,
        command.outcome,
        command.text,
        command.latency_ms,
        command.units,
        command.error_class,
    )
    write.done("tool_call", command.tool_call_id, turn.id)
    _go_on(turn, write)


@handles(EndOverdueTurn)
def end_overdue_turn(command: EndOverdueTurn, write: WriteSide) -> None:
    turn = write.get(Turn, command.turn_id)
    if not isinstance(next_action(turn, write.now), GiveUp | Answer):
        raise NotYours("The turn is not over.")
    _go_on(turn, write)


def cancel_unless_over(turn_id: TurnId, reason: str, write: WriteSide) -> None:
    """Cancel a turn of the command's tenant, if there is one of this id that is not over."""
    turn = write.find(Turn, turn_id)
    if turn is not None and turn.outcome is None:
        turn.cancel(write.actor, reason, write.now)
        _leave_conversation(turn, write)


# --- shared --------------------------------------------------------------------------------------------------------


def fits(first_call: FirstCall, turn: Turn, action: AskModel) -> bool:
    """Whether the turn has come out as its first call was planned for."""
    return (
        first_call.config_version == turn.config_version
        and first_call.message_version == turn.message_version
        and first_call.plan.with_tools == action.with_tools
    )


def _start_model_call(turn: Turn, action: AskModel, plan: ModelCallPlan, write: WriteSide) -> CallId:
    if not turn.assembled:
        turn.trigger_event(
            Turn.ContextAssembled,
            history_from=plan.history_versions[0],
            history_to=plan.history_versions[1],
            history_count=plan.history_count,
            prompt_digest=plan.prompt_digest,
            tools_offered=plan.tools_offered,
        )
    deadline_at = min(plan.deadline_at, turn.limits.deadline_at)
    call_id = turn.start_model_call(action, plan.provider, plan.model, plan.worker, deadline_at, write.now)
    write.due("turn", turn.id, turn.id, deadline_at + GRACE, plan.worker)
    return call_id


def _go_on(turn: Turn, write: WriteSide) -> None:
    """After a step: end the turn, or note who has to look at it next and when."""
    action = next_action(turn, write.now)
    match action:
        case Answer():
            _answer(turn, action, write)
        case GiveUp():
            turn.give_up(action, write.now)
            _leave_conversation(turn, write)
        case RunTools(tool_call_ids):
            write.due("turn", turn.id, turn.id, turn.limits.deadline_at)
            for tool_call_id in tool_call_ids:
                write.due("tool_call", tool_call_id, turn.id, write.now + PICKUP)
        case AskModel(not_before=at):
            write.due("turn", turn.id, turn.id, at if at and at > write.now else write.now + PICKUP)
        case _:
            # Tools of the turn are still under way; they have due rows of their own.
            pass


def _answer(turn: Turn, action: Answer, write: WriteSide) -> None:
    message_id = None
    if turn.conversation_id is not None:
        message_id = MessageId(derived(turn.id, "answered"))
        conversation = write.get(Conversation, turn.conversation_id)
        following = conversation.reply(
            turn.turn_id, message_id, action.text, tuple(turn.tool_calls), write.now
        )
        _wake(following, write)
    turn.answer(message_id, action.finish, write.now)
    _forget(turn, write)


def _leave_conversation(turn: Turn, write: WriteSide) -> None:
    """A turn that ended without an answer makes room for the next."""
    if turn.conversation_id is not None:
        conversation = write.get(Conversation, turn.conversation_id)
        _wake(conversation.close(turn.turn_id, turn.outcome or ""), write)
    _forget(turn, write)


def _interrupt(conversation: Conversation, write: WriteSide) -> None:
    """End the turn that is running: what ran of it is charged, its message is not."""
    turn_id = conversation.interrupt()
    if turn_id is not None:
        turn = write.get(Turn, turn_id)
        turn.cancel(write.actor, INTERRUPTED, write.now)
        _forget(turn, write)


def _wake(turn_id: TurnId | None, write: WriteSide) -> None:
    if turn_id is not None:
        write.due("turn", turn_id, turn_id, write.now + PICKUP)


def _forget(turn: Turn, write: WriteSide) -> None:
    write.done("turn", turn.id, turn.id)
    for call in turn.tool_calls.values():
        write.done("tool_call", call.tool_call_id, turn.id)
    if turn.callback:
        callback = write.get(Callback, callback_of(turn.id))
        callback.queue(write.now)
        write.due("callback", callback.id, callback.id, write.now + PICKUP)


def _request_callback(command: SendMessage, agent: Agent, url: str, write: WriteSide) -> None:
    callback = Callback.request(command.turn_id, agent.owner_id, agent.agent_id, url, write.actor, write.now)
    write.add(callback)


def _accept(
    write: WriteSide,
    turn_id: TurnId,
    agent: Agent,
    config_version: int,
    limits: TurnLimits,
    meter: str,
    mode: Mode,
    **facts: object,
) -> Turn:
    """Take a turn on: its hold first, so that what cannot be paid never starts."""
    account = write.get(CreditAccount, account_of(agent.owner_id))
    card, hold_id = write.prices, hold_of(turn_id)
    lifetime = timedelta(seconds=write.rules.turn_deadline_s + HOLD_MARGIN_S)
    account.hold(hold_id, card.price_ncr(meter), meter, write.now, lifetime, write.limits_of(account))
    turn = Turn.begin(
        Turn.Accepted,
        turn_id,
        owner_id=agent.owner_id,
        agent_id=agent.agent_id,
        config_version=config_version,
        mode=mode,
        actor=write.actor,
        meter=meter,
        rate_card_id=card.rate_card_id,
        hold_id=hold_id,
        limits=limits,
        accepted_at=write.now,
        **facts,
    )
    return write.add(turn)


def _conversation(command: SendMessage, write: WriteSide) -> Conversation:
    if command.beginning != "new":
        conversation = write.find(Conversation, command.conversation_id)
        if conversation is not None:
            conversation.check_agent(command.agent_id)
            return conversation
        if command.beginning == "existing":
            raise NotFound("conversation")
    started = Conversation.start(
        command.conversation_id,
        command.tenant_id,
        command.agent_id,
        command.channel,
        write.actor,
        command.name,
        write.now,
    )
    return write.add(started)


def _deadline(write: WriteSide) -> datetime:
    return write.now + timedelta(seconds=write.rules.turn_deadline_s)
