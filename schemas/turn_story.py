"""The story of one turn, told from its records: what callers are answered with, wherever they ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

from domain.ids import request_name
from domain.prompt import FORGOTTEN
from domain.turn import NOTHING_SAID, SILENCE, Turn
from schemas.records import AnyRecord

Status = Literal["pending", "processing", "completed", "failed"]
_TIMEOUTS = frozenset({"turn_timeout", "model_timeout"})


@dataclass(slots=True)
class Story:
    """What is known of a turn so far. Records are told in the order of their stream; other streams' are passed over."""

    turn_id: UUID
    version: int = 0
    accepted: Turn.Accepted | None = None
    begun: bool = False
    model: str | None = None
    text: str | None = None
    open_call: tuple[int, int] | None = None  # iteration and attempt of the model call under way
    last_call: tuple[int, int] = (0, 0)  # and of the last one that began
    calls: dict[UUID, dict[str, Any]] = field(default_factory=dict)
    ended: Turn.Ended | None = None
    incomplete: bool = False  # records are missing: the log has them

    def tell(self, records: Iterable[AnyRecord]) -> Story:
        """Go on with records; those told before are passed over."""
        for record in records:
            if record.stream_id == self.turn_id and record.stream_version > self.version:
                self.incomplete = self.incomplete or record.stream_version > self.version + 1
                self.version = record.stream_version
                self._tell(record.event)
        return self

    def _tell(self, event: Any) -> None:
        match event:
            case Turn.Accepted():
                self.accepted = event
            case Turn.ModelCallStarted():
                self.begun, self.model = True, event.model
                self.open_call = self.last_call = (event.iteration, event.attempt)
            case Turn.ModelCallCompleted():
                self.text = FORGOTTEN if event.output is None else event.output
                self.open_call = None
            case Turn.ModelCallFailed():
                self.open_call = None
            case Turn.ToolCallRequested():
                args = FORGOTTEN if event.args is None else event.args
                self.calls[event.tool_call_id] = {"tool_name": event.tool, "parameters": args, "result": None}
            case Turn.ToolCallStarted():
                self.begun = True
            case Turn.ToolCalled():
                result = FORGOTTEN if event.result is None else event.result
                self.calls[event.tool_call_id].update(result=result, outcome=event.outcome)
            case Turn.ToolCallOutcomeUnknown():
                self.calls[event.tool_call_id].update(result=None, outcome="unknown")
            case Turn.Ended():
                self.ended = event
            case _:
                pass

    @property
    def conversation_id(self) -> UUID | None:
        """The conversation it is part of; None for a tool that was invoked by itself."""
        return self.accepted.conversation_id if self.accepted else None

    @property
    def status(self) -> Status:
        if self.ended is not None:
            return "completed" if isinstance(self.ended, Turn.Completed) else "failed"
        return "processing" if self.begun else "pending"

    @property
    def response(self) -> str | None:
        """The answer; None as long as there is none, and when a tool was invoked without a model."""
        if not isinstance(self.ended, Turn.Completed) or self.ended.finish == "invoked":
            return None
        return self.text or SILENCE.get(self.ended.finish, NOTHING_SAID)

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """As the requirements print them, with the outcome beside."""
        return list(self.calls.values())


def answer_of(story: Story, conversation: str | None) -> dict[str, Any]:
    """A completed turn as the chat routes answer it (SOP §5.2.4)."""
    assert story.ended is not None
    return {
        "response": story.response,
        "tool_calls": story.tool_calls,
        "conversation_id": conversation,
        "iterations": story.ended.iterations,
        "request_id": request_name(story.turn_id),
        "finish": getattr(story.ended, "finish", None),
    }


def polled(story: Story, conversation: str | None) -> dict[str, Any]:
    """A turn as `get_answer` answers it, in every state."""
    body: dict[str, Any] = {
        "request_id": request_name(story.turn_id),
        "conversation_id": conversation,
        "status": story.status,
    }
    ended = story.ended
    if isinstance(ended, Turn.Completed):
        body.update(answer_of(story, conversation))
    elif isinstance(ended, Turn.Failed | Turn.TimedOut | Turn.Cancelled):
        body.update(error_message=ended.sentence, code=code_of_end(ended), reason=ended.error_code)
    return body


def code_of_end(ended: Turn.Failed | Turn.TimedOut | Turn.Cancelled) -> str:
    """The error code of a turn that has no answer."""
    if isinstance(ended, Turn.Cancelled):
        return "request_cancelled"
    if isinstance(ended, Turn.TimedOut) or ended.error_code in _TIMEOUTS:
        return "upstream_timeout"
    return "upstream_failed"
