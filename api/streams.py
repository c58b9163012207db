"""A turn as server-sent events: what the log has, what is being written now, and what comes.

Names follow AG-UI (`type`). An event's id is `<version of the last logged event told>.<characters of the model call
under way that were sent>`, so that a client which comes back goes on where it was, in the middle of a word if need be.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.answers import charged, problem_of_end, turn_records
from api.call import Call, request_name
from api.errors import invalid
from domain.ids import TurnId
from domain.turn import Turn
from schemas.records import AnyRecord
from schemas.turn_feed import Follower, Token
from schemas.turn_story import Story, answer_of

CHECK_S = 1.0  # how long a revoked key may go on listening
LOOK_AGAIN_S = 5.0  # a feed may lose what it carries; the log does not
HEARTBEAT = b": still here\n\n"
_LAST_ID = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})")

Data = dict[str, Any]


@dataclass(slots=True)
class Narrator:
    """Turns records and pieces of text into events. `told` and `sent` are the two halves of the last event's id."""

    story: Story
    conversation: str | None
    base_url: str
    told: int = 0
    sent: int = 0
    over: bool = False

    def record(self, record: AnyRecord) -> Iterator[bytes]:
        """What to send for a logged event; nothing for one the client has had."""
        if record.stream_id != self.story.turn_id or record.stream_version <= self.story.version:
            return
        self.story.tell((record,))
        if record.stream_version <= self.told:
            self.over = self.story.ended is not None
            return
        self.told = record.stream_version
        yield from self._events(record.event)

    def misses(self, record: AnyRecord) -> bool:
        """Whether events before this one have not been heard of."""
        return record.stream_id == self.story.turn_id and record.stream_version > self.story.version + 1

    def is_ahead(self, token: Token) -> bool:
        """Whether the piece is of a model call whose beginning has not been heard of."""
        return (token.iteration, token.attempt) > self.story.last_call

    def token(self, token: Token) -> Iterator[bytes]:
        """A piece of text of the model call under way; what the client has of it is left out."""
        if (token.iteration, token.attempt) != self.story.open_call or token.start > self.sent:
            return
        new = token.text[self.sent - token.start :]
        if new:
            yield self._text(token.iteration, new)

    def _events(self, event: Any) -> Iterator[bytes]:
        match event:
            case Turn.Accepted():
                yield self._event("status", "RUN_STARTED", status="pending")
            case Turn.ModelCallStarted(iteration=iteration, attempt=attempt):
                self.sent = 0
                step = {"iteration": iteration, "attempt": attempt, "model": event.model}
                yield self._event("status", "STEP_STARTED", status="processing", **step)
            case Turn.ModelCallCompleted():
                yield from self._completed(event)
            case Turn.ModelCallFailed():
                if self.sent:
                    self.sent = 0
                    yield self._event("reset", "CUSTOM", name="reset", iteration=event.iteration)
                step = {"iteration": event.iteration, "reason": event.error_class.value}
                yield self._event("status", "STEP_FINISHED", status="processing", **step)
            case Turn.ToolCallRequested(tool_call_id=id):
                call = self.story.calls[id]
                names = {"toolCallId": str(id), "toolCallName": event.tool}
                yield self._event(
                    "tool_call",
                    "TOOL_CALL_START",
                    **names,
                    tool_name=event.tool,
                    parameters=call["parameters"],
                )
            case Turn.ToolCalled(tool_call_id=id) | Turn.ToolCallOutcomeUnknown(tool_call_id=id):
                yield self._event(
                    "tool_result", "TOOL_CALL_RESULT", toolCallId=str(id), **self.story.calls[id]
                )
            case Turn.Ended():
                yield self._end()
            case _:
                pass

    def _completed(self, event: Turn.ModelCallCompleted) -> Iterator[bytes]:
        # What was not streamed, or was lost on the way, is in the record.
        text = event.output or ""
        if len(text) > self.sent:
            yield self._text(event.iteration, text[self.sent :])
        self.sent = 0
        usage = {
            "input_tokens": event.usage.input,
            "output_tokens": event.usage.output,
            "source": event.usage.source,
        }
        yield self._event("usage", "CUSTOM", name="usage", iteration=event.iteration, value=usage)

    def _end(self) -> bytes:
        self.over = True
        if isinstance(self.story.ended, Turn.Completed):
            answer = answer_of(self.story, self.conversation)
            return self._event("done", "RUN_FINISHED", **answer, charged_credits=charged(self.story))
        problem = problem_of_end(self.story)
        body = problem.body(self.base_url, request_name(self.story.turn_id))
        problem_type = body.pop("type")
        return self._event("error", "RUN_ERROR", **body, problem_type=problem_type, message=problem.detail)

    def _text(self, iteration: int, text: str) -> bytes:
        self.sent += len(text)
        id = f"{request_name(self.story.turn_id)}.{iteration}"
        return self._event("token", "TEXT_MESSAGE_CONTENT", messageId=id, delta=text, iteration=iteration)

    def _event(self, event: str, type: str, **data: Any) -> bytes:
        fields = {
            "type": type,
            "runId": request_name(self.story.turn_id),
            "threadId": self.conversation,
            "request_id": request_name(self.story.turn_id),
            "conversation_id": self.conversation,
            **data,
        }
        return b"event: %b\nid: %d.%d\ndata: %b\n\n" % (
            event.encode(),
            self.told,
            self.sent,
            orjson.dumps(fields),
        )


def last_event_id(request: Request) -> tuple[int, int]:
    """Where a client that comes back was: (version, characters), zeros for the beginning.

    Raises:
        Problem: not an id that we gave.
    """
    header = request.headers.get("last-event-id")
    if not header:
        return 0, 0
    match = _LAST_ID.fullmatch(header)
    if match is None:
        raise invalid("Last-Event-ID", "Last-Event-ID is the `id` of an event that was received.")
    return int(match[1]), int(match[2])


class TurnStream(StreamingResponse):
    """Follows a turn for one listener. It is never what the turn depends on.

    `begin` before the command is sent, so that nothing is missed; `fresh` says that the turn began after that, so
    that nothing need be read. Ends with the turn, with the listener, or with the listener's right to listen.
    """

    def __init__(
        self, call: Call, turn_id: TurnId, conversation: str | None, last: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(self._frames(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.fresh = False
        self._checked_at = self._looked_at = time.monotonic()
        self._call, self._turn_id = call, turn_id
        self._narrator = Narrator(Story(turn_id), conversation, call.server.base_url, *last)
        self._following = call.server.feed.follow(turn_id)
        self._follower: Follower | None = None

    def begin(self) -> None:
        """Start to follow."""
        self._follower = self._following.__enter__()

    def stop(self) -> None:
        """Let go of the turn."""
        if self._follower is not None:
            self._follower = None
            self._following.__exit__(None, None, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stop()

    async def _frames(self) -> AsyncIterator[bytes]:
        follower = self._follower
        assert follower is not None
        if not self.fresh:
            for frame in await self._logged():
                yield frame
            if follower.partial is not None:
                for frame in self._narrator.token(follower.partial):
                    yield frame
        heard_at = time.monotonic()
        while not self._narrator.over:
            frames = await self._next(follower)
            if frames is None:
                return
            now = time.monotonic()
            if not frames and now - heard_at >= self._call.server.limits.heartbeat_s:
                frames = [HEARTBEAT]
            for frame in frames:
                heard_at = now
                yield frame

    async def _next(self, follower: Follower) -> list[bytes] | None:
        """The next events, if any in a second; None when the listener may not listen any more."""
        item = await follower.next(CHECK_S)
        now = time.monotonic()
        if now - self._checked_at >= CHECK_S:
            self._checked_at = now
            if not await self._call.shared.principals.still(self._call.caller()):
                return None
        if isinstance(item, Token):
            # Pieces of text and records come on ways of their own.
            frames = await self._logged() if self._narrator.is_ahead(item) else []
            return [*frames, *self._narrator.token(item)]
        if item is not None and not self._narrator.misses(item):
            self._looked_at = now
            return list(self._narrator.record(item))
        if item is not None or now - self._looked_at >= LOOK_AGAIN_S:
            self._looked_at = now
            return await self._logged()
        return []

    async def _logged(self) -> list[bytes]:
        """What the log has beyond what was told."""
        records = await turn_records(self._call, self._turn_id, self._call.caller().owner_id)
        return [frame for record in records for frame in self._narrator.record(record)]
