"""The story of one turn, told from its events: what happened when, what it cost, and what was odd about it.

`Teller` is fed the records of the turn, its conversation and its credit account in the order of their positions; it
reads nothing and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from domain.callback import Callback
from domain.conversation import Conversation
from domain.credit_account import ChargeLine, CreditAccount
from domain.ids import hold_of
from domain.money import credits
from domain.ports import ModelErrorClass, TokenUsage
from domain.turn import OUTCOMES, Turn
from oshaani.cli.show import plain
from schemas.records import AnyRecord

EXCERPT_CHARS_MAX = 80  # of personal text, unless all of it is asked for
SLOW_QUEUE_S = 1.0
FORGOTTEN = "(erased)"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened. `odd`: a support engineer should look at it."""

    at: datetime
    type: str
    text: str
    odd: bool


@dataclass(slots=True)
class Money:
    """What was set aside, charged and given back for the turn, in nano-credits."""

    held_ncr: int = 0
    extended_ncr: int = 0
    lines: tuple[ChargeLine, ...] = ()
    charged_ncr: int = 0
    released_ncr: int = 0
    uncollected_ncr: int = 0
    balance_after_ncr: int | None = None
    settled_at: datetime | None = None
    end: str | None = None  # settled | released | expired | charged late


@dataclass(slots=True)
class Teller:
    """A turn's story so far."""

    turn_id: UUID
    personal: bool
    accepted: Turn.Accepted | None = None
    accepted_at: datetime | None = None
    message: str | None = None
    answer: str | None = None
    context: Turn.ContextAssembled | None = None
    model: str | None = None
    ended: Turn.Ended | None = None
    ended_at: datetime | None = None
    money: Money = field(default_factory=Money)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tools: dict[UUID, str] = field(default_factory=dict)

    def tell(self, records: Iterable[AnyRecord]) -> Teller:
        """Go on with records; those of other turns are passed over."""
        for record in records:
            told = _TOLD.get(type(record.event))
            if told is not None and self._is_ours(record):
                text, note = told(self, record.event, record)
                self.steps.append(Step(record.recorded_at, record.type, text, note is not None))
                if note:
                    self.notes.append(note)
        return self

    def conclude(self, now: datetime) -> Teller:
        """Add what only shows when all is told: work or money that is overdue."""
        if self.accepted is not None and self.ended is None:
            deadline_at = self.accepted.limits.deadline_at
            late = now > deadline_at
            self.notes.append(
                f"it should have ended by {deadline_at:%Y-%m-%d %H:%M:%SZ}: no worker looks after it"
                if late
                else f"it is still running and ends by {deadline_at:%Y-%m-%d %H:%M:%SZ} at the latest"
            )
        elif self.ended is not None and self.money.end is None:
            self.notes.append("it has ended and its hold is not settled yet")
        if self.ended is not None and self.ended.usage.source == "estimated":
            self.notes.append("tokens are estimated: the provider did not count them")
        return self

    @property
    def status(self) -> str:
        """How the turn ended; "running" or "queued" before that."""
        if self.ended is not None:
            return OUTCOMES[type(self.ended).TOPIC]
        begun = any(step.type.startswith("Turn.ModelCall") for step in self.steps)
        return "running" if begun or not (self.accepted and self.accepted.queued) else "queued"

    def excerpt(self, text: str | None) -> str:
        """Personal text as far as it may be seen."""
        if text is None:
            return FORGOTTEN
        return plain(text, None if self.personal else EXCERPT_CHARS_MAX)

    def _is_ours(self, record: AnyRecord) -> bool:
        event = record.event
        if isinstance(record.event, Conversation.Event):
            return bool(getattr(event, "turn_id", None) == self.turn_id)
        if isinstance(record.event, CreditAccount.Event):
            low = isinstance(event, CreditAccount.LowBalanceCrossed)
            return low or bool(getattr(event, "hold_id", None) == hold_of(self.turn_id))
        return self.turn_id in (record.stream_id, getattr(event, "turn_id", None))


# What is said of an event, and the note it deserves if it is odd.
Told = tuple[str, str | None]
_TOLD: dict[type, Callable[[Teller, Any, AnyRecord], Told]] = {}


def _tells(*event_classes: type) -> Callable[[Callable[..., Told]], Callable[..., Told]]:
    def declare(told: Callable[..., Told]) -> Callable[..., Told]:
        _TOLD.update(dict.fromkeys(event_classes, told))
        return told

    return declare


# --- the conversation -----------------------------------------------------------------------------------------------


@_tells(Conversation.MessageSent)
def _message_sent(story: Teller, event: Conversation.MessageSent, record: AnyRecord) -> Told:
    story.message = event.content
    return f"message received: {story.excerpt(event.content)!r}", None


@_tells(Conversation.TurnQueued)
def _queued(story: Teller, event: Conversation.TurnQueued, record: AnyRecord) -> Told:
    return "waits: an earlier message of the conversation is being answered", None


@_tells(Conversation.TurnActivated)
def _activated(story: Teller, event: Conversation.TurnActivated, record: AnyRecord) -> Told:
    waited_s = (record.recorded_at - story.accepted_at).total_seconds() if story.accepted_at else 0.0
    note = f"it waited {waited_s:.1f} s for earlier messages of its conversation"
    return "its turn in the conversation has come", note if waited_s > SLOW_QUEUE_S else None


@_tells(Conversation.AssistantReplied)
def _replied(story: Teller, event: Conversation.AssistantReplied, record: AnyRecord) -> Told:
    story.answer = event.content
    return f"answer given: {story.excerpt(event.content)!r}", None


@_tells(Conversation.TurnClosed)
def _closed(story: Teller, event: Conversation.TurnClosed, record: AnyRecord) -> Told:
    return f"left the conversation without an answer: {event.outcome}", None


# --- the turn ---------------------------------------------------------------------------------------------------------


@_tells(Turn.Accepted)
def _accepted(story: Teller, event: Turn.Accepted, record: AnyRecord) -> Told:
    story.accepted, story.accepted_at = event, record.recorded_at
    limits = event.limits
    return (
        f"accepted: at most {limits.iterations} rounds of tools, {limits.tool_calls} tool calls, "
        f"{(limits.deadline_at - event.accepted_at).total_seconds():.0f} s"
    ), None


@_tells(Turn.ContextAssembled)
def _assembled(story: Teller, event: Turn.ContextAssembled, record: AnyRecord) -> Told:
    story.context = event
    tools = ", ".join(event.tools_offered) or "no tools"
    return (
        f"context: {event.history_count} earlier messages; offered {tools}; prompt {event.prompt_digest[:12]}",
        None,
    )


@_tells(Turn.ModelCallStarted)
def _model_asked(story: Teller, event: Turn.ModelCallStarted, record: AnyRecord) -> Told:
    story.model = event.model
    must = "" if event.with_tools else ", told to answer without tools"
    return f"{_call(event)} asked {event.model}{must} (worker {event.worker})", None


@_tells(Turn.ModelCallCompleted)
def _model_answered(story: Teller, event: Turn.ModelCallCompleted, record: AnyRecord) -> Told:
    first = f", first token after {event.ttft_ms} ms" if event.ttft_ms is not None else ""
    wants = f", wants {len(event.tool_call_ids)} tool calls" if event.tool_call_ids else ""
    text = (
        f"{_call(event)} answered in {event.latency_ms} ms{first}: {event.finish_reason}{wants}; "
        f"{tokens(event.usage)}: {story.excerpt(event.output)!r}"
    )
    cut = event.finish_reason in ("length", "content_filter")
    return text, f"{_call(event)} was cut short: {event.finish_reason}" if cut else None


@_tells(Turn.ModelCallFailed)
def _model_failed(story: Teller, event: Turn.ModelCallFailed, record: AnyRecord) -> Told:
    if event.retry_at is None:
        then = "not tried again"
    else:
        then = f"tried again after {max(0.0, (event.retry_at - record.recorded_at).total_seconds()):.1f} s"
    lost = event.error_class is ModelErrorClass.WORKER_LOST
    why = (
        "its worker died and another took over"
        if lost
        else f"{event.error_class.value}: {plain(event.sentence)}"
    )
    return (
        f"{_call(event)} failed: {why}; {then}",
        f"{_call(event)} failed ({event.error_class.value}); {then}",
    )


@_tells(Turn.ToolCallRequested)
def _tool_requested(story: Teller, event: Turn.ToolCallRequested, record: AnyRecord) -> Told:
    story.tools[event.tool_call_id] = f"{event.tool} {event.iteration}.{event.ordinal + 1}"
    args = story.excerpt(None if event.args is None else str(event.args))
    return (
        f"tool {story.tools[event.tool_call_id]} wanted ({event.kind}, {event.effect.value}), "
        f"arguments {event.args_digest[:12]}: {args}"
    ), None


@_tells(Turn.ToolCallStarted)
def _tool_started(story: Teller, event: Turn.ToolCallStarted, record: AnyRecord) -> Told:
    tool = story.tools.get(event.tool_call_id, "?")
    note = f"tool {tool} was taken over from a dead worker and run again" if event.attempt > 1 else None
    return f"tool {tool} started, attempt {event.attempt} (worker {event.worker})", note


@_tells(Turn.ToolCalled)
def _tool_called(story: Teller, event: Turn.ToolCalled, record: AnyRecord) -> Told:
    tool = story.tools.get(event.tool_call_id, "?")
    why = event.refusal_code or event.error_class
    text = f"tool {tool} {event.outcome} after {event.latency_ms} ms{f' ({why})' if why else ''}"
    if event.units:
        text += "; " + ", ".join(f"{count} {meter}" for meter, count in event.units.items())
    odd = event.outcome != "succeeded"
    note = f"tool {tool} {event.outcome}{f' ({why})' if why else ''}: not charged" if odd else None
    return f"{text}: {story.excerpt(event.result)!r}", note


@_tells(Turn.ToolCallOutcomeUnknown)
def _tool_unknown(story: Teller, event: Turn.ToolCallOutcomeUnknown, record: AnyRecord) -> Told:
    tool = story.tools.get(event.tool_call_id, "?")
    note = f"whether tool {tool} took effect is unknown: its worker {event.worker} died; not repeated, not charged"
    return f"tool {tool}: outcome unknown, worker {event.worker} died", note


@_tells(Turn.CancellationRequested)
def _cancelling(story: Teller, event: Turn.CancellationRequested, record: AnyRecord) -> Told:
    reason = f": {story.excerpt(event.reason)!r}" if event.reason else ""
    return f"cancellation asked for by {event.by}{reason}", f"cancelled by {event.by}"


@_tells(Turn.Completed)
def _completed(story: Teller, event: Turn.Completed, record: AnyRecord) -> Told:
    story.ended, story.ended_at = event, record.recorded_at
    odd = event.finish not in ("answered", "invoked")
    return (
        f"completed ({event.finish}) after {event.iterations} model calls and {event.tool_call_count} tool calls",
        f"the answer is not the model's free choice: {event.finish}" if odd else None,
    )


@_tells(Turn.Failed, Turn.TimedOut, Turn.Cancelled)
def _gave_up(story: Teller, event: Turn.Failed | Turn.TimedOut | Turn.Cancelled, record: AnyRecord) -> Told:
    story.ended, story.ended_at = event, record.recorded_at
    outcome = OUTCOMES[record.type].replace("_", " ")
    uncharged = "the message is not charged" if event.lines else "nothing is charged"
    return f"{outcome} ({event.error_code}): {plain(event.sentence)}", f"{outcome}, so {uncharged}"


# --- the callback -----------------------------------------------------------------------------------------------------


@_tells(Callback.Requested)
def _callback_requested(story: Teller, event: Callback.Requested, record: AnyRecord) -> Told:
    # Paths and queries carry tokens.
    whole = story.personal or event.url is None
    where = story.excerpt(event.url) if whole else urlsplit(event.url or "").netloc
    return f"the end is to be told to {where}", None


@_tells(Callback.AttemptStarted)
def _callback_started(story: Teller, event: Callback.AttemptStarted, record: AnyRecord) -> Told:
    return f"callback attempt {event.attempt} by {event.worker}", None


@_tells(Callback.Delivered)
def _callback_delivered(story: Teller, event: Callback.Delivered, record: AnyRecord) -> Told:
    return f"callback delivered: HTTP {event.status_code} after {event.latency_ms} ms", None


@_tells(Callback.AttemptFailed)
def _callback_failed(story: Teller, event: Callback.AttemptFailed, record: AnyRecord) -> Told:
    again = f"; again at {event.retry_at:%Y-%m-%d %H:%M:%SZ}" if event.retry_at else ""
    text = f"callback attempt {event.attempt} failed ({event.reason}) after {event.latency_ms} ms{again}"
    return text, f"callback attempt {event.attempt} failed: {event.reason}"


@_tells(Callback.GivenUp)
def _callback_given_up(story: Teller, event: Callback.GivenUp, record: AnyRecord) -> Told:
    note = f"its caller was never told of the end: {event.reason}"
    return f"callback given up after {event.attempts} attempts ({event.reason})", note


# --- the money ------------------------------------------------------------------------------------------------------


@_tells(CreditAccount.CreditsHeld)
def _held(story: Teller, event: CreditAccount.CreditsHeld, record: AnyRecord) -> Told:
    story.money.held_ncr = event.amount_ncr
    return f"{credits(event.amount_ncr)} credits set aside for {event.meter}", None


@_tells(CreditAccount.HoldExtended)
def _extended(story: Teller, event: CreditAccount.HoldExtended, record: AnyRecord) -> Told:
    story.money.extended_ncr += event.amount_ncr
    tool = story.tools.get(event.extension_id)
    return f"{credits(event.amount_ncr)} credits more set aside for {tool or event.meter}", None


@_tells(CreditAccount.CreditsSettled)
def _settled(story: Teller, event: CreditAccount.CreditsSettled, record: AnyRecord) -> Told:
    _charge(story, event, record, "settled")
    story.money.released_ncr = event.released_ncr
    free = event.captured_ncr == 0
    return (
        f"charged {credits(event.captured_ncr)}: {charge_lines(event.lines)}; {credits(event.released_ncr)} given back; "
        f"balance {credits(event.available_after_ncr + event.held_after_ncr)}"
    ), "not charged because its price is 0" if free else None


@_tells(CreditAccount.LateCharge)
def _charged_late(story: Teller, event: CreditAccount.LateCharge, record: AnyRecord) -> Told:
    _charge(story, event, record, "charged late")
    story.money.uncollected_ncr = event.uncollected_ncr
    note = (
        f"charged after its hold had expired; {credits(event.uncollected_ncr)} credits could not be collected"
    )
    return f"charged late {credits(event.captured_ncr)}: {charge_lines(event.lines)}", note


@_tells(CreditAccount.HoldReleased, CreditAccount.HoldExpired)
def _released(
    story: Teller, event: CreditAccount.HoldReleased | CreditAccount.HoldExpired, record: AnyRecord
) -> Told:
    expired = isinstance(event, CreditAccount.HoldExpired)
    money = story.money
    money.released_ncr, money.end = event.released_ncr, "expired" if expired else "released"
    money.settled_at = record.recorded_at
    money.balance_after_ncr = event.available_after_ncr + event.held_after_ncr
    text = f"{credits(event.released_ncr)} credits given back; balance {credits(money.balance_after_ncr)}"
    return (f"hold expired: {text}", "its hold expired before it was settled") if expired else (text, None)


@_tells(CreditAccount.LowBalanceCrossed)
def _low(story: Teller, event: CreditAccount.LowBalanceCrossed, record: AnyRecord) -> Told:
    return f"the balance fell below {credits(event.threshold_ncr)} credits", None


def _charge(
    story: Teller, event: CreditAccount.CreditsSettled | CreditAccount.LateCharge, record: AnyRecord, end: str
) -> None:
    money = story.money
    money.lines, money.charged_ncr, money.end = event.lines, event.captured_ncr, end
    money.settled_at = record.recorded_at
    money.balance_after_ncr = event.available_after_ncr + event.held_after_ncr


# --- words ------------------------------------------------------------------------------------------------------------


def charge_lines(lines: Iterable[ChargeLine]) -> str:
    """Each line of a charge in a few words."""
    return ", ".join(f"{line.tool or line.meter} {credits(line.amount_ncr)}" for line in lines) or "nothing"


def tokens(usage: TokenUsage) -> str:
    """Tokens in and out, and how many came from the provider's cache."""
    cached = f" ({usage.cache_read} cached)" if usage.cache_read else ""
    mark = "~" if usage.source == "estimated" else ""
    return f"{mark}{usage.input}{cached} tokens in, {mark}{usage.output} out"


def _call(event: Turn.ModelCallStarted | Turn.ModelCallCompleted | Turn.ModelCallFailed) -> str:
    again = f", attempt {event.attempt}" if event.attempt > 1 else ""
    return f"model call {event.iteration}{again}"
