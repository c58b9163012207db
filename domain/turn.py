"""One question and everything done to answer it: a bounded story that ends exactly once.

What happens next is decided by `next_action`, a pure function of the turn's events; nothing replays code, so a deploy
never breaks a running turn. `…Started` events are both the fence (the slower of two workers loses) and the claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any, Literal
from uuid import UUID

from domain.aggregate import PERSONAL, Created, PersonalText, Root
from domain.conversation import Channel
from domain.credit_account import ChargeLine
from domain.errors import Conflict, NotYours
from domain.ids import AgentId, CallId, ConversationId, HoldId, MessageId, ToolCallId, TurnId, UserId, derived
from domain.ports import Effect, FinishReason, ModelErrorClass, TokenUsage, ToolKind
from domain.prices import TOOL_CALL, rate_card

ATTEMPTS_MAX = 4  # of one model call, by errors that may pass
WORKERS_LOST_MAX = 10  # of one model call: crashes are not the provider's fault
TOOL_CALLS_MAX = 50
SAME_CALLS_MAX = 3  # the same tool with the same arguments: a loop
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
GRACE_S = 5.0  # what a worker gets beyond its own time limit before the step is taken from it

Mode = Literal["sync", "async", "stream"]
ToolOutcome = Literal["succeeded", "failed", "timed_out", "refused", "unknown"]
PASSING = frozenset(
    {
        ModelErrorClass.RATE_LIMITED,
        ModelErrorClass.OVERLOADED,
        ModelErrorClass.TIMEOUT,
        ModelErrorClass.UNREACHABLE,
        ModelErrorClass.GARBAGE,
        ModelErrorClass.WORKER_LOST,
    }
)
SILENCE = {  # what stands for an answer when the model ended without a word
    "tool_loop": "I stopped because the same tool was asked for again and again with the same arguments.",
    "max_iterations": "I used up the tool calls allowed for one message before I could answer.",
    "content_filter": "The model's provider withheld the answer.",
    "length": "The model reached its output limit before it could answer.",
}
NOTHING_SAID = "The model gave no answer."


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """Bounds of one turn; `deadline_at` is when it ends whatever happens."""

    iterations: int
    tool_calls: int
    deadline_at: datetime


@dataclass(frozen=True, slots=True)
class AskedTool:
    """A tool request of the model as the worker understood it. `refusal` says why it cannot run, if so."""

    model_ref: str
    tool: str
    kind: ToolKind
    effect: Effect
    arguments: Mapping[str, Any]
    arguments_digest: str
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A model call under way."""

    call_id: CallId
    iteration: int
    attempt: int
    worker: str
    deadline_at: datetime


@dataclass(frozen=True, slots=True)
class Said:
    """What the model said in one iteration, and which tool calls followed."""

    iteration: int
    text: str | None
    finish_reason: FinishReason
    tool_call_ids: tuple[ToolCallId, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call and how far it is."""

    tool_call_id: ToolCallId
    iteration: int
    tool: str
    kind: ToolKind
    effect: Effect
    model_ref: str
    arguments: Mapping[str, Any] | None
    arguments_digest: str
    price_ncr: int
    status: Literal["requested", "awaiting_approval", "started", "ended"] = "requested"
    attempt: int = 0
    worker: str = ""
    deadline_at: datetime | None = None
    outcome: ToolOutcome | None = None
    result: str | None = None


# --- what may happen next ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskModel:
    """Call the model, not before `not_before`; without tools when it must answer now."""

    iteration: int
    attempt: int
    with_tools: bool
    not_before: datetime | None


@dataclass(frozen=True, slots=True)
class RunTools:
    """Start these tool calls; they do not wait for each other."""

    tool_call_ids: tuple[ToolCallId, ...]


@dataclass(frozen=True, slots=True)
class Await:
    """Somebody is at it, or has to decide; look again at `until`."""

    until: datetime


@dataclass(frozen=True, slots=True)
class Answer:
    """The model has spoken: end the turn with this text."""

    text: str
    finish: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End without an answer."""

    outcome: Literal["failed", "timed_out"]
    error_code: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Over:
    """The turn has ended."""


Action = AskModel | RunTools | Await | Answer | GiveUp | Over


def next_action(turn: Turn, now: datetime) -> Action:  # noqa: PLR0911  (a decision table reads best flat)
    """What a worker should do for this turn now. Pure; `now` is the caller's clock."""
    if turn.outcome is not None:
        return Over()
    if now >= turn.limits.deadline_at:
        return GiveUp("timed_out", "turn_timeout", "The answer took longer than the time limit of a turn.")
    if turn.open_call is not None:
        return Await(turn.open_call.deadline_at)
    if turn.failure is not None:
        return turn.failure
    unfinished = [call for call in turn.tool_calls.values() if call.status != "ended"]
    if unfinished:
        ready = tuple(call.tool_call_id for call in unfinished if call.status == "requested")
        return RunTools(ready) if ready else Await(_latest(unfinished, turn.limits.deadline_at))
    said = turn.said[-1] if turn.said else None
    if turn.invoked and turn.tool_calls:
        return Answer("", "invoked")
    if said is None or said.tool_call_ids:
        with_tools = turn.tools_left
        return AskModel(
            turn.iteration + (1 if turn.attempt == 0 else 0), turn.attempt + 1, with_tools, turn.retry_at
        )
    finish = _finish_of(turn, said)
    return Answer(said.text or SILENCE.get(finish, NOTHING_SAID), finish)


def backoff_s(attempt: int, retry_after_s: float | None) -> float:
    """Seconds to wait before the attempt after `attempt`; a provider's Retry-After wins over our doubling."""
    return (
        retry_after_s
        if retry_after_s is not None
        else min(BACKOFF_FIRST_S * 2 ** (attempt - 1), BACKOFF_MAX_S)
    )


@lru_cache(4_096)
def call_of(turn_id: UUID, iteration: int) -> CallId:
    """The id of a model call; also the provider's idempotency key, the same on every attempt."""
    return CallId(derived(turn_id, "call", iteration))


def tool_call_of(turn_id: UUID, iteration: int, ordinal: int) -> ToolCallId:
    """The id of a tool call; also its idempotency key, the same on every attempt."""
    return ToolCallId(derived(turn_id, "tool", iteration, ordinal))


def _latest(calls: Sequence[ToolCall], deadline_at: datetime) -> datetime:
    return max((call.deadline_at or deadline_at for call in calls), default=deadline_at)


def _finish_of(turn: Turn, said: Said) -> str:
    if turn.loop_found:
        return "tool_loop"
    if not turn.tools_left and turn.tool_calls:
        return "max_iterations"
    return {"length": "length", "content_filter": "content_filter"}.get(said.finish_reason, "answered")


# --- the aggregate --------------------------------------------------------------------------------------------------


class Turn(Root):
    """From an accepted message to its answer, its failure or its cancellation."""

    TOPIC = "Turn"

    class Accepted(Root.Event, Created):
        TOPIC = "Turn.Accepted"
        owner_id: UserId
        conversation_id: ConversationId | None
        agent_id: AgentId
        config_version: int
        message_id: MessageId | None
        message_version: int
        channel: Channel
        mode: Mode
        actor: str
        meter: str
        rate_card_id: str
        hold_id: HoldId
        limits: TurnLimits
        stateless: bool
        invoked: bool
        queued: bool
        accepted_at: datetime
        callback: bool = False  # whether somebody is to be told of the end, see domain.callback

    class ContextAssembled(Root.Event):
        TOPIC = "Turn.ContextAssembled"
        history_from: int
        history_to: int
        history_count: int
        prompt_digest: str
        tools_offered: tuple[str, ...]

        def apply(self, aggregate: Turn) -> None:
            aggregate.assembled = True

    class ModelCallStarted(Root.Event):
        TOPIC = "Turn.ModelCallStarted"
        call_id: CallId
        iteration: int
        attempt: int
        provider: str
        model: str
        with_tools: bool
        worker: str
        deadline_at: datetime

        def apply(self, aggregate: Turn) -> None:
            aggregate.open_call = OpenCall(
                self.call_id, self.iteration, self.attempt, self.worker, self.deadline_at
            )
            aggregate.iteration, aggregate.attempt, aggregate.retry_at = self.iteration, self.attempt, None
            aggregate.asked_with_tools = self.with_tools

    class ModelCallCompleted(Root.Event):
        TOPIC = "Turn.ModelCallCompleted"
        call_id: CallId
        iteration: int
        attempt: int
        finish_reason: FinishReason
        output: PersonalText
        tool_call_ids: tuple[ToolCallId, ...]
        usage: TokenUsage
        latency_ms: int
        ttft_ms: int | None

        def apply(self, aggregate: Turn) -> None:
            said = Said(self.iteration, self.output, self.finish_reason, self.tool_call_ids)
            aggregate.said = [*aggregate.said, said]
            aggregate.usage = added(aggregate.usage, self.usage)
            aggregate.open_call, aggregate.attempt, aggregate.workers_lost = None, 0, 0

    class ModelCallFailed(Root.Event):
        TOPIC = "Turn.ModelCallFailed"
        call_id: CallId
        iteration: int
        attempt: int
        error_class: ModelErrorClass
        sentence: str
        retry_at: datetime | None

        def apply(self, aggregate: Turn) -> None:
            aggregate.open_call, aggregate.retry_at = None, self.retry_at
            if self.error_class is ModelErrorClass.WORKER_LOST:
                aggregate.workers_lost += 1
            if self.retry_at is None:
                aggregate.failure = GiveUp("failed", f"model_{self.error_class.value}", self.sentence)

    class ToolCallRequested(Root.Event):
        TOPIC = "Turn.ToolCallRequested"
        tool_call_id: ToolCallId
        iteration: int
        ordinal: int
        tool: str
        kind: ToolKind
        effect: Effect
        model_ref: str
        args: Annotated[dict[str, Any] | None, PERSONAL]
        args_digest: str
        approval_required: bool
        price_ncr: int
        owner_id: UserId

        def apply(self, aggregate: Turn) -> None:
            status: Literal["requested", "awaiting_approval"] = (
                "awaiting_approval" if self.approval_required else "requested"
            )
            call = ToolCall(
                self.tool_call_id,
                self.iteration,
                self.tool,
                self.kind,
                self.effect,
                self.model_ref,
                self.args,
                self.args_digest,
                self.price_ncr,
                status,
            )
            aggregate.tool_calls[self.tool_call_id] = call

    class ToolCallStarted(Root.Event):
        TOPIC = "Turn.ToolCallStarted"
        tool_call_id: ToolCallId
        attempt: int
        worker: str
        deadline_at: datetime

        def apply(self, aggregate: Turn) -> None:
            aggregate._set(
                self.tool_call_id,
                status="started",
                attempt=self.attempt,
                worker=self.worker,
                deadline_at=self.deadline_at,
            )

    class ToolCalled(Root.Event):
        TOPIC = "Turn.ToolCalled"
        tool_call_id: ToolCallId
        attempt: int
        outcome: ToolOutcome
        result: PersonalText
        latency_ms: int
        units: dict[str, int]
        error_class: str | None
        refusal_code: str | None

        def apply(self, aggregate: Turn) -> None:
            aggregate._set(self.tool_call_id, status="ended", outcome=self.outcome, result=self.result)
            aggregate.loop_found = aggregate.loop_found or self.refusal_code == "tool_loop"

    class ToolCallOutcomeUnknown(Root.Event):
        """The worker died while a call was under way that must not be repeated blindly."""

        TOPIC = "Turn.ToolCallOutcomeUnknown"
        tool_call_id: ToolCallId
        attempt: int
        worker: str

        def apply(self, aggregate: Turn) -> None:
            aggregate._set(self.tool_call_id, status="ended", outcome="unknown", result=OUTCOME_UNKNOWN)

    class CancellationRequested(Root.Event):
        TOPIC = "Turn.CancellationRequested"
        by: str
        reason: str

    class Ended(Root.Event):
        """Shared by the four ends: what is charged, and for whom."""

        TOPIC = "Turn.Ended"
        owner_id: UserId
        conversation_id: ConversationId | None
        agent_id: AgentId
        hold_id: HoldId
        actor: str
        lines: tuple[ChargeLine, ...]
        charged_ncr: int
        iterations: int
        tool_call_count: int
        usage: TokenUsage
        ended_at: datetime

        def apply(self, aggregate: Turn) -> None:
            aggregate.outcome = OUTCOMES[self.TOPIC]
            aggregate.open_call = None
            aggregate.charged_ncr = self.charged_ncr

    class Completed(Ended):
        TOPIC = "Turn.Completed"
        answer_message_id: MessageId | None
        finish: str
        from_cache: bool

    class Failed(Ended):
        TOPIC = "Turn.Failed"
        error_code: str
        sentence: str

    class TimedOut(Ended):
        TOPIC = "Turn.TimedOut"
        error_code: str
        sentence: str

    class Cancelled(Ended):
        TOPIC = "Turn.Cancelled"
        error_code: str
        sentence: str

    def __init__(
        self,
        owner_id: UserId,
        conversation_id: ConversationId | None,
        agent_id: AgentId,
        config_version: int,
        message_version: int,
        mode: Mode,
        actor: str,
        meter: str,
        rate_card_id: str,
        hold_id: HoldId,
        limits: TurnLimits,
        stateless: bool,
        invoked: bool,
        callback: bool = False,
    ) -> None:
        self.owner_id = owner_id
        self.conversation_id = conversation_id
        self.agent_id = agent_id
        self.config_version = config_version
        self.message_version = message_version
        self.mode = mode
        self.actor = actor
        self.meter = meter
        self.rate_card_id = rate_card_id
        self.hold_id = hold_id
        self.limits = limits
        self.stateless = stateless
        self.invoked = invoked
        self.callback = callback
        self.assembled = False
        self.iteration = 0
        self.attempt = 0
        self.workers_lost = 0
        self.retry_at: datetime | None = None
        self.open_call: OpenCall | None = None
        self.asked_with_tools = True
        self.said: list[Said] = []
        self.tool_calls: dict[ToolCallId, ToolCall] = {}
        self.loop_found = False
        self.failure: GiveUp | None = None
        self.usage = TokenUsage(0, 0)
        self.charged_ncr = 0
        self.outcome: str | None = None

    @property
    def turn_id(self) -> TurnId:
        return TurnId(self.id)

    @property
    def tools_left(self) -> bool:
        """Whether the next model call may still ask for tools, or must answer."""
        return not self.loop_found and len([s for s in self.said if s.tool_call_ids]) < self.limits.iterations

    # --- model calls

    def start_model_call(
        self, action: AskModel, provider: str, model: str, worker: str, deadline_at: datetime, now: datetime
    ) -> CallId:
        """Claim the model call for a worker.

        Raises:
            NotYours: this is not what the turn needs now; somebody else was faster.
        """
        current = next_action(self, now)
        if not isinstance(current, AskModel) or (current.iteration, current.attempt) != (
            action.iteration,
            action.attempt,
        ):
            raise NotYours("The turn does not wait for this model call.")
        call_id = call_of(self.id, action.iteration)
        self.trigger_event(
            self.ModelCallStarted,
            call_id=call_id,
            iteration=action.iteration,
            attempt=action.attempt,
            provider=provider,
            model=model,
            with_tools=current.with_tools,
            worker=worker,
            deadline_at=deadline_at,
        )
        return call_id

    def complete_model_call(
        self,
        call_id: CallId,
        attempt: int,
        text: str,
        finish_reason: FinishReason,
        asked: Sequence[AskedTool],
        usage: TokenUsage,
        latency_ms: int,
        ttft_ms: int | None,
    ) -> None:
        """Record what the model said; its tool requests become tool calls, unless it had been told to answer."""
        self._check_open(call_id, attempt)
        iteration = self.iteration
        wanted = asked if self.asked_with_tools and not self.loop_found else ()
        self.trigger_event(
            self.ModelCallCompleted,
            call_id=call_id,
            iteration=iteration,
            attempt=attempt,
            finish_reason=finish_reason,
            output=text,
            tool_call_ids=tuple(tool_call_of(self.id, iteration, n) for n in range(len(wanted))),
            usage=usage,
            latency_ms=latency_ms,
            ttft_ms=ttft_ms,
        )
        for ordinal, request in enumerate(wanted):
            self.request_tool(iteration, ordinal, request)

    def fail_model_call(
        self,
        call_id: CallId,
        attempt: int,
        error_class: ModelErrorClass,
        sentence: str,
        retry_after_s: float | None,
        now: datetime,
    ) -> None:
        """Record that an attempt gave no reply, and when to try again, if at all."""
        self._check_open(call_id, attempt)
        lost = error_class is ModelErrorClass.WORKER_LOST
        tries_left = (
            self.workers_lost < WORKERS_LOST_MAX if lost else attempt - self.workers_lost < ATTEMPTS_MAX
        )
        wait_s = 0.0 if lost else backoff_s(attempt - self.workers_lost, retry_after_s)
        left_s = (self.limits.deadline_at - now).total_seconds()
        # Compared as numbers: a provider may name a wait that no calendar holds.
        again = error_class in PASSING and tries_left and wait_s < left_s
        retry_at = now + timedelta(seconds=wait_s) if again else None
        self.trigger_event(
            self.ModelCallFailed,
            call_id=call_id,
            iteration=self.iteration,
            attempt=attempt,
            error_class=error_class,
            sentence=sentence,
            retry_at=retry_at,
        )

    # --- tools

    def request_tool(self, iteration: int, ordinal: int, asked: AskedTool) -> ToolCallId:
        """Note that a tool is wanted; what cannot or must not run is answered at once, without charge."""
        tool_call_id = tool_call_of(self.id, iteration, ordinal)
        same = [call for call in self.tool_calls.values() if self._is_same(call, asked)]
        count = len(self.tool_calls)
        self.trigger_event(
            self.ToolCallRequested,
            tool_call_id=tool_call_id,
            iteration=iteration,
            ordinal=ordinal,
            tool=asked.tool,
            kind=asked.kind,
            effect=asked.effect,
            model_ref=asked.model_ref,
            args=dict(asked.arguments),
            args_digest=asked.arguments_digest,
            approval_required=False,
            price_ncr=rate_card(self.rate_card_id).price_ncr(TOOL_CALL),
            owner_id=self.owner_id,
        )
        if len(same) + 1 >= SAME_CALLS_MAX:
            sentence = f"The tool {asked.tool!r} was already called with the same arguments; answer with what you have."
            self.refuse_tool(tool_call_id, sentence, "tool_loop")
        elif asked.refusal is not None:
            self.refuse_tool(tool_call_id, asked.refusal, "invalid_request")
        elif count >= self.limits.tool_calls:
            self.refuse_tool(
                tool_call_id, f"A turn runs at most {self.limits.tool_calls} tools.", "too_many_tool_calls"
            )
        return tool_call_id

    def start_tool(self, tool_call_id: ToolCallId, worker: str, deadline_at: datetime) -> int:
        """Claim a tool call for a worker and return the number of the attempt.

        Raises:
            NotYours: the call is not waiting to be run.
        """
        call = self.tool_calls.get(tool_call_id)
        if self.outcome is not None or call is None or call.status != "requested":
            raise NotYours("The tool call does not wait to be run.")
        attempt = call.attempt + 1
        self.trigger_event(
            self.ToolCallStarted,
            tool_call_id=tool_call_id,
            attempt=attempt,
            worker=worker,
            deadline_at=deadline_at,
        )
        return attempt

    def retake_tool(
        self, tool_call_id: ToolCallId, lost_worker: str, worker: str, deadline_at: datetime
    ) -> int | None:
        """Take a call over from a dead worker. None when it must not be repeated: then its outcome is unknown."""
        call = self.tool_calls.get(tool_call_id)
        if self.outcome is not None or call is None or call.status != "started" or call.worker != lost_worker:
            raise NotYours("The tool call is not held by that worker.")
        if call.effect is Effect.UNSAFE:
            self.trigger_event(
                self.ToolCallOutcomeUnknown,
                tool_call_id=tool_call_id,
                attempt=call.attempt,
                worker=lost_worker,
            )
            return None
        self.trigger_event(
            self.ToolCallStarted,
            tool_call_id=tool_call_id,
            attempt=call.attempt + 1,
            worker=worker,
            deadline_at=deadline_at,
        )
        return call.attempt + 1

    def end_tool(
        self,
        tool_call_id: ToolCallId,
        attempt: int,
        outcome: ToolOutcome,
        result: str,
        latency_ms: int,
        units: Mapping[str, int],
        error_class: str | None,
    ) -> None:
        """Record what a tool gave.

        Raises:
            NotYours: the call is not under way in this attempt (it was taken over, or the turn is over).
        """
        call = self.tool_calls.get(tool_call_id)
        if self.outcome is not None or call is None or (call.status, call.attempt) != ("started", attempt):
            raise NotYours("The tool call is not under way in this attempt.")
        self._tool_called(tool_call_id, attempt, outcome, result, latency_ms, units, error_class, None)

    def refuse_tool(self, tool_call_id: ToolCallId, sentence: str, code: str) -> None:
        """Answer a waiting tool call with a refusal; it never ran and is never charged."""
        call = self.tool_calls.get(tool_call_id)
        if self.outcome is not None or call is None or call.status != "requested":
            raise NotYours("The tool call does not wait to be run.")
        self._tool_called(tool_call_id, 0, "refused", sentence, 0, {}, code, code)

    # --- the end

    def answer(self, message_id: MessageId | None, finish: str, now: datetime) -> None:
        """The turn has its answer: the message and every successful tool call are charged."""
        message = () if self.invoked else (self._line(self.meter, None),)
        self._end(
            self.Completed,
            (*message, *self._tool_lines()),
            now,
            answer_message_id=message_id,
            finish=finish,
            from_cache=False,
        )

    def give_up(self, why: GiveUp, now: datetime) -> None:
        """No answer: nothing is charged."""
        event_class = self.TimedOut if why.outcome == "timed_out" else self.Failed
        self._end(event_class, (), now, error_code=why.error_code, sentence=why.sentence)

    def cancel(self, by: str, reason: str, now: datetime) -> None:
        """Somebody does not want the answer any more: what ran is charged, the message is not.

        Raises:
            Conflict: the turn has ended.
        """
        if self.outcome is not None:
            raise Conflict(f"The request has already ended: {self.outcome}.", outcome=self.outcome)
        self.trigger_event(self.CancellationRequested, by=by, reason=reason)
        sentence = "The request was cancelled."
        self._end(self.Cancelled, self._tool_lines(), now, error_code="cancelled", sentence=sentence)

    # --- inside

    def _check_open(self, call_id: CallId, attempt: int) -> None:
        call = self.open_call
        if self.outcome is not None or call is None or (call.call_id, call.attempt) != (call_id, attempt):
            raise NotYours("The model call is not under way in this attempt.")

    def _is_same(self, call: ToolCall, asked: AskedTool) -> bool:
        return (call.tool, call.arguments_digest) == (asked.tool, asked.arguments_digest)

    def _set(self, tool_call_id: ToolCallId, **changes: Any) -> None:
        self.tool_calls[tool_call_id] = replace(self.tool_calls[tool_call_id], **changes)

    def _tool_called(
        self,
        tool_call_id: ToolCallId,
        attempt: int,
        outcome: ToolOutcome,
        result: str,
        latency_ms: int,
        units: Mapping[str, int],
        error_class: str | None,
        refusal_code: str | None,
    ) -> None:
        self.trigger_event(
            self.ToolCalled,
            tool_call_id=tool_call_id,
            attempt=attempt,
            outcome=outcome,
            result=result,
            latency_ms=latency_ms,
            units=dict(units),
            error_class=error_class,
            refusal_code=refusal_code,
        )

    def _line(self, meter: str, tool: str | None) -> ChargeLine:
        return ChargeLine(meter, 1, rate_card(self.rate_card_id).price_ncr(meter), self.rate_card_id, tool)

    def _tool_lines(self) -> tuple[ChargeLine, ...]:
        succeeded = [call for call in self.tool_calls.values() if call.outcome == "succeeded"]
        return tuple(self._line(TOOL_CALL, call.tool) for call in succeeded)

    def _end(
        self, event_class: type[Ended], lines: Sequence[ChargeLine], now: datetime, **facts: Any
    ) -> None:
        if self.outcome is not None:
            raise NotYours("The turn has ended.")
        self.trigger_event(
            event_class,
            owner_id=self.owner_id,
            conversation_id=self.conversation_id,
            agent_id=self.agent_id,
            hold_id=self.hold_id,
            actor=self.actor,
            lines=tuple(lines),
            charged_ncr=sum(line.amount_ncr for line in lines),
            iterations=len(self.said),
            tool_call_count=len(self.tool_calls),
            usage=self.usage,
            ended_at=now,
            **facts,
        )


OUTCOMES = {
    "Turn.Completed": "completed",
    "Turn.Failed": "failed",
    "Turn.TimedOut": "timed_out",
    "Turn.Cancelled": "cancelled",
}
OUTCOME_UNKNOWN = (
    "It is not known whether this tool call took effect: the connection to it was lost. It was not repeated."
)


def added(one: TokenUsage, other: TokenUsage) -> TokenUsage:
    """The tokens of both; estimated as soon as one of them is."""
    return TokenUsage(
        one.input + other.input,
        one.output + other.output,
        one.cache_read + other.cache_read,
        one.cache_write + other.cache_write,
        "estimated" if "estimated" in (one.source, other.source) else "provider",
    )
