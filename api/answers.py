"""The story of one turn, told from its records, and what a client is answered with: the same wherever it asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

from api.call import Call, conversation_name, request_name
from api.errors import Problem
from domain.conversation import Conversation
from domain.errors import NotFound
from domain.ids import TurnId, UserId, shard_of
from domain.money import credits
from domain.prompt import FORGOTTEN
from domain.turn import NOTHING_SAID, SILENCE, Turn
from schemas.records import AnyRecord

TURN_EVENTS_MAX = 1_000  # more than a turn can have, see domain.turn
RUNNING = "Request is being processed. Use /api/get_answer with request_id to get the response."

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
                self.open_call = (event.iteration, event.attempt)
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


async def turn_records(call: Call, turn_id: TurnId, owner_id: UserId) -> list[AnyRecord]:
    """Everything recorded about a turn, as the log has it now.

    Raises:
        NotFound: no such turn of this tenant.
    """
    server = call.server
    rows = await server.log.read_stream(shard_of(owner_id), turn_id, TURN_EVENTS_MAX)
    if not rows or rows[0].tenant_id != owner_id or rows[0].type != Turn.Accepted.TOPIC:
        raise NotFound("request")
    return await server.records.open(rows)


async def story_of(call: Call, turn_id: TurnId, owner_id: UserId) -> Story:
    """The story of a turn, as the log has it now.

    Raises:
        NotFound: no such turn of this tenant.
    """
    return Story(turn_id).tell(await turn_records(call, turn_id, owner_id))


async def visible_story(call: Call, turn_id: TurnId | None) -> Story:
    """The story of a turn that the caller may know of: the owner's, and for an agent's key that agent's.

    Raises:
        NotFound: no such turn, or not the caller's.
    """
    principal = call.caller()
    if turn_id is None:
        raise NotFound("request")
    story = await story_of(call, turn_id, principal.owner_id)
    assert story.accepted is not None
    if principal.agent_id not in (None, story.accepted.agent_id):
        raise NotFound("request")
    return story


async def conversation_shown(call: Call, conversation_id: UUID | None, owner_id: UserId) -> str | None:
    """A conversation as its caller calls it."""
    if conversation_id is None:
        return None
    conversation = await call.server.bus.read(Conversation, conversation_id, owner_id)
    return conversation.name or conversation_name(conversation_id)


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
    if isinstance(story.ended, Turn.Completed):
        body.update(answer_of(story, conversation))
    elif story.ended is not None:
        problem = problem_of_end(story)
        body.update(error_message=problem.detail, code=problem.code, reason=problem.extensions.get("reason"))
    return body


def problem_of_end(story: Story) -> Problem:
    """Why a turn has no answer."""
    ended = story.ended
    assert isinstance(ended, Turn.Failed | Turn.TimedOut | Turn.Cancelled)
    if isinstance(ended, Turn.Cancelled):
        code = "request_cancelled"
    elif isinstance(ended, Turn.TimedOut) or ended.error_code in _TIMEOUTS:
        code = "upstream_timeout"
    else:
        code = "upstream_failed"
    return Problem(
        code, ended.sentence, {"request_id": request_name(story.turn_id), "reason": ended.error_code}
    )


def charged(story: Story) -> str:
    """What the turn cost, in credits."""
    return credits(story.ended.charged_ncr) if story.ended else "0.00"
