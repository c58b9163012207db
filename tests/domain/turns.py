"""Steps in the life of a turn, for tests."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

from domain.ids import AgentId, ConversationId, MessageId, TurnId, UserId, hold_of
from domain.ports import Effect, FinishReason, ModelErrorClass, TokenUsage
from domain.prices import MESSAGE
from domain.turn import (
    AskedTool,
    AskModel,
    GiveUp,
    ToolOutcome,
    Turn,
    TurnLimits,
    next_action,
    tool_call_of,
)

Step = Callable[[Turn], object]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
DEADLINE = NOON + timedelta(minutes=5)
SECOND = timedelta(seconds=1)
CALL_ENDS = NOON + timedelta(seconds=60)
TURN = TurnId(UUID(int=1))
WORKER, OTHER_WORKER = "turns-1/a", "turns-2/a"
ANSWER_ID = MessageId(UUID(int=2))
USAGE = TokenUsage(10, 5)


def accepted(
    iterations: int = 10, tool_calls: int = 50, invoked: bool = False, meter: str = MESSAGE
) -> Callable[[], Turn]:
    """A turn that was just taken on."""
    return lambda: Turn.begin(
        Turn.Accepted,
        TURN,
        owner_id=UserId(UUID(int=3)),
        conversation_id=None if invoked else ConversationId(UUID(int=4)),
        agent_id=AgentId(UUID(int=5)),
        config_version=1,
        message_id=None if invoked else MessageId(UUID(int=6)),
        message_version=2,
        channel="api",
        mode="async",
        actor="user:3",
        meter=meter,
        rate_card_id="rc-1",
        hold_id=hold_of(TURN),
        limits=TurnLimits(iterations, tool_calls, DEADLINE),
        stateless=False,
        invoked=invoked,
        queued=False,
        accepted_at=NOON,
    )


def asked(worker: str = WORKER, now: datetime = NOON, deadline_at: datetime = CALL_ENDS) -> Step:
    """A worker claims the model call that the turn needs now."""

    def step(turn: Turn) -> object:
        action = next_action(turn, now)
        assert isinstance(action, AskModel), action
        return turn.start_model_call(action, "offline", "extractive", worker, deadline_at, now)

    return step


def wants(
    tool: str = "web_search",
    query: str = "q",
    effect: Effect = Effect.PURE,
    refusal: str | None = None,
) -> AskedTool:
    """A tool request of the model; the same query has the same digest."""
    return AskedTool(f"ref-{tool}-{query}", tool, "builtin", effect, {"query": query}, query, refusal)


def said(text: str = "", *tools: AskedTool, finish: FinishReason = "stop", usage: TokenUsage = USAGE) -> Step:
    """The model answers the open call."""

    def step(turn: Turn) -> None:
        call = turn.open_call
        assert call is not None
        turn.complete_model_call(call.call_id, call.attempt, text, finish, tools, usage, 7, None)

    return step


def model_failed(
    error_class: ModelErrorClass, retry_after_s: float | None = None, now: datetime = NOON
) -> Step:
    """The open call gives no reply."""

    def step(turn: Turn) -> None:
        call = turn.open_call
        assert call is not None
        turn.fail_model_call(call.call_id, call.attempt, error_class, "No reply.", retry_after_s, now)

    return step


def tool_started(
    ordinal: int = 0, iteration: int = 1, worker: str = WORKER, deadline_at: datetime = CALL_ENDS
) -> Step:
    """A worker claims a tool call."""
    return lambda turn: turn.start_tool(tool_call_of(TURN, iteration, ordinal), worker, deadline_at)


def tool_retaken(lost_worker: str = WORKER, worker: str = OTHER_WORKER) -> Step:
    """Another worker takes the first tool call over."""
    return lambda turn: turn.retake_tool(tool_call_of(TURN, 1, 0), lost_worker, worker, CALL_ENDS)


def tool_ended(
    outcome: ToolOutcome = "succeeded", ordinal: int = 0, iteration: int = 1, attempt: int = 1
) -> Step:
    """A tool call ends."""
    return lambda turn: turn.end_tool(
        tool_call_of(TURN, iteration, ordinal), attempt, outcome, outcome, 5, {}, None
    )


def ran(outcome: ToolOutcome = "succeeded", ordinal: int = 0, iteration: int = 1) -> Step:
    """A tool call starts and ends."""

    def step(turn: Turn) -> None:
        tool_started(ordinal, iteration)(turn)
        tool_ended(outcome, ordinal, iteration)(turn)

    return step


def answered(finish: str = "answered") -> Step:
    """The turn has its answer."""
    return lambda turn: turn.answer(ANSWER_ID, finish, NOON)


def gave_up(why: GiveUp) -> Step:
    """The turn ends without one."""
    return lambda turn: turn.give_up(why, NOON)


def cancelled(turn: Turn) -> None:
    """Somebody cancels the turn."""
    turn.cancel("user:3", "changed my mind", NOON)


def action_of(turn: Turn, now: datetime = NOON) -> object:
    """What the turn needs now."""
    return next_action(turn, now)
