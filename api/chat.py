"""Talking to an agent (SOP §5.2.2, §5.3): the answer comes back with the call, or as a stream.

The routes answer from what they follow of the turn as it happens; only a turn that had begun before is read again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from api.answers import RUNNING, charged, problem_of_end, story_of
from api.bodies import Body, StrictRoute, body_as
from api.call import Call, Principal, call_of, conversation_name, conversation_named, request_name
from api.errors import Problem, invalid
from api.idempotency import Once, once
from api.principals import identify
from api.quotas import say_quota
from api.streams import LOOK_AGAIN_S, TurnStream
from commands.turn import Beginning, InvokeTool, SendMessage
from domain.agent import Agent
from domain.conversation import Channel, WhenBusy
from domain.errors import NotFound
from domain.ids import AgentId, ConversationId, TurnId, UserId, agent_of, derived, named_conversation
from domain.prices import API_CALL, MESSAGE, TOOL_CALL
from domain.turn import AskedTool, Mode, Turn
from schemas.turn_feed import Follower
from schemas.turn_story import Story, answer_of

MESSAGE_CHARS_MAX = 200_000
NAME_CHARS_MAX = 128
AGENT_NUMBER_MAX = 2**53

router = APIRouter(route_class=StrictRoute, tags=["Agent interaction"])

Words = Annotated[str, Field(min_length=1, max_length=MESSAGE_CHARS_MAX, pattern=r"\S")]
ConversationText = Annotated[
    str,
    Field(
        min_length=1,
        max_length=NAME_CHARS_MAX,
        description="An id that we gave (`conv-…`), or a name of your own: a conversation is begun on its first use.",
    ),
]
Busy = Annotated[
    WhenBusy,
    Field(
        description="While another message is being answered: wait for it (`queue`), be refused with 409 (`reject`), or "
        "cancel it and go ahead of those that wait (`interrupt`)."
    ),
]
Stream = Annotated[bool, Field(description="Answer with server-sent events.")]


class ChatBody(Body):
    """A message to an agent."""

    message: Words
    conversation_id: ConversationText | None = None
    stream: Stream = False
    when_busy: Busy = "queue"


class QueryBody(Body):
    """A question without a past: the model is not told what was said before. `query` and `message` mean the same."""

    query: Words | None = None
    message: Words | None = None
    conversation_id: ConversationText | None = None
    stream: Stream = False

    @property
    def text(self) -> str:
        """What is asked.

        Raises:
            Problem: neither field is there, or both.
        """
        if self.query is not None and self.message is not None:
            raise invalid("/message", "Send 'query' or 'message', not both.", "conflicting_fields")
        text = self.query or self.message
        if text is None:
            raise invalid("/query", "'query' is required.", "required")
        return text


class InvokeBody(Body):
    """One tool of the agent, run without a model."""

    action: Annotated[str, Field(min_length=1, max_length=64, description="The name of the tool.")]
    parameters: dict[str, Any] = Field(default_factory=dict, description="Its arguments.")


class ToolCallData(BaseModel):
    """A tool that was called. `outcome`: succeeded, failed, timed_out, refused or unknown."""

    tool_name: str
    parameters: dict[str, Any] | str
    result: str | None
    outcome: str | None = None


class ChatAnswer(BaseModel):
    """An answer (SOP §5.2.4)."""

    response: str | None
    tool_calls: list[ToolCallData]
    conversation_id: str | None
    iterations: int
    request_id: str | None = None
    finish: str | None = None


class InvokeAnswer(BaseModel):
    """What a tool gave."""

    tool_name: str
    parameters: dict[str, Any]
    result: str
    outcome: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A message on its way: to which agent, through which door, in which conversation."""

    principal: Principal
    agent_id: AgentId
    channel: Channel
    meter: str
    text: str
    conversation: str | None = None
    stateless: bool = False
    when_busy: WhenBusy = "queue"
    callback_url: str | None = None


@router.post("/api/agents/{agent_id}/chat")
async def chat(request: Request) -> Response:
    """Chat with an agent. Needs the agent's API key; its owner may also use the owner's own, before publishing too."""
    principal, agent_id = await caller_of_agent(request)
    body = await body_as(ChatBody, request)
    asked = Asked(
        principal, agent_id, "api", MESSAGE, body.message, body.conversation_id, when_busy=body.when_busy
    )
    return await _answer(request, asked, body.stream)


@router.post("/api/agents/{agent_id}/query")
async def query(request: Request) -> Response:
    """Ask an agent one question, without regard to what was said before."""
    principal, agent_id = await caller_of_agent(request)
    body = await body_as(QueryBody, request)
    asked = Asked(principal, agent_id, "api", MESSAGE, body.text, body.conversation_id, stateless=True)
    return await _answer(request, asked, body.stream)


@router.post("/api/v1/chat")
async def simple_chat(request: Request) -> Response:
    """Chat with the agent of the API key. The agent's owner is billed per `api_call`."""
    principal, agent_id = await caller_of_own_agent(request)
    body = await body_as(ChatBody, request)
    asked = Asked(
        principal, agent_id, "api_v1", API_CALL, body.message, body.conversation_id, when_busy=body.when_busy
    )
    return await _answer(request, asked, body.stream)


@router.post("/api/v1/query")
async def simple_query(request: Request) -> Response:
    """Ask the agent of the API key one question, without regard to what was said before."""
    principal, agent_id = await caller_of_own_agent(request)
    body = await body_as(QueryBody, request)
    asked = Asked(principal, agent_id, "api_v1", API_CALL, body.text, body.conversation_id, stateless=True)
    return await _answer(request, asked, body.stream)


@router.post("/api/agents/{agent_id}/invoke")
async def invoke(request: Request) -> Response:
    """Run one of the agent's tools without a model."""
    principal, agent_id = await caller_of_agent(request)
    body = await body_as(InvokeBody, request)
    call, key = call_of(request), await once(request)
    turn_id = TurnId(key.command_id)
    asked = await _asked_tool(call, principal, agent_id, body)
    command = InvokeTool(
        tenant_id=principal.owner_id,
        turn_id=turn_id,
        agent_id=agent_id,
        asked=asked,
        mode="sync",
        by_owner=principal.is_owner,
    )
    with call.server.feed.follow(turn_id) as follower:
        outcome = await call.execute(command, turn_id, key.digest, turn_id)
        story = await _ended(call, turn_id, principal.owner_id, follower, outcome.seen)
    await say_quota(call, TOOL_CALL)
    return _still_running(turn_id, None) if story is None else _tool_answer(call, story, body)


async def caller_of_agent(request: Request) -> tuple[Principal, AgentId]:
    """Who is calling, and the agent of the path: that of the caller's key, or one of the owner's.

    Raises:
        Problem: nobody, or the key of another agent.
        NotFound: the path names no agent.
    """
    principal = await identify(request)
    agent_id = agent_of(agent_number(request.path_params["agent_id"]))
    if principal.agent_id is not None and principal.agent_id != agent_id:
        raise Problem("agent_key_mismatch", "This API key belongs to another agent.")
    return principal, agent_id


async def caller_of_own_agent(request: Request) -> tuple[Principal, AgentId]:
    """Who is calling with an agent's key, and that agent.

    Raises:
        Problem: nobody, or a person's key.
    """
    principal = await identify(request)
    if principal.agent_id is None:
        raise Problem("forbidden", "Use the API key of an agent: `Authorization: ApiKey <agent API key>`.")
    return principal, AgentId(principal.agent_id)


def agent_number(text: str) -> int:
    """The number in a path.

    Raises:
        NotFound: not a number that an agent can have.
    """
    if not text.isascii() or not text.isdecimal() or len(text) > 16 or not 0 < int(text) <= AGENT_NUMBER_MAX:
        raise NotFound("agent")
    return int(text)


async def send(call: Call, asked: Asked, key: Once, mode: Mode) -> tuple[TurnId, str, bool]:
    """Send a message. Returns its turn, how the caller calls the conversation, and whether it was sent before."""
    turn_id, principal = TurnId(key.command_id), asked.principal
    conversation_id, beginning, shown = _conversation_of(asked, turn_id)
    message = SendMessage(
        tenant_id=principal.owner_id,
        turn_id=turn_id,
        conversation_id=conversation_id,
        beginning=beginning,
        name=asked.conversation if beginning == "named" else None,
        agent_id=asked.agent_id,
        content=asked.text,
        channel=asked.channel,
        mode=mode,
        meter=asked.meter,
        by_owner=principal.is_owner,
        stateless=asked.stateless,
        when_busy=asked.when_busy,
        callback_url=asked.callback_url,
    )
    message = await call.server.prepare(message)
    outcome = await call.execute(message, turn_id, key.digest, turn_id)
    return turn_id, shown, outcome.seen


def _conversation_of(asked: Asked, turn_id: TurnId) -> tuple[ConversationId, Beginning, str]:
    """Which conversation a message belongs to, whether it must exist, and how the caller calls it."""
    text = asked.conversation
    if text is None:
        new = ConversationId(derived(turn_id, "conversation"))
        return new, "new", conversation_name(new)
    if text.startswith("conv-"):
        return ConversationId(known_conversation(text)), "existing", text
    return named_conversation(asked.agent_id, text), "named", text


def known_conversation(text: str) -> UUID:
    """The conversation of an id of our form.

    Raises:
        NotFound: it cannot be one of ours.
    """
    found = conversation_named(text)
    if found is None:
        raise NotFound("conversation")
    return found


async def _answer(request: Request, asked: Asked, stream: bool) -> Response:
    call, key = call_of(request), await once(request)
    if stream:
        return await _stream(call, asked, key)
    turn_id, owner_id = TurnId(key.command_id), asked.principal.owner_id
    with call.server.feed.follow(turn_id) as follower:
        _, shown, seen = await send(call, asked, key, "sync")
        story = await _ended(call, turn_id, owner_id, follower, seen)
    await say_quota(call, asked.meter)
    if story is None:
        return _still_running(turn_id, shown)
    if not isinstance(story.ended, Turn.Completed):
        raise problem_of_end(story)
    call.say("Oshaani-Credits-Charged", charged(story))
    return Response(orjson.dumps(answer_of(story, shown)), media_type="application/json")


async def _stream(call: Call, asked: Asked, key: Once) -> Response:
    turn_id = TurnId(key.command_id)
    _, _, shown = _conversation_of(asked, turn_id)
    stream = TurnStream(call, turn_id, shown)
    stream.begin()
    try:
        _, _, seen = await send(call, asked, key, "stream")
        await say_quota(call, asked.meter)
    except BaseException:
        stream.stop()
        raise
    stream.fresh = not seen
    return stream


async def _ended(
    call: Call, turn_id: TurnId, owner_id: UserId, follower: Follower, seen: bool
) -> Story | None:
    """The story of a turn once it has ended; None when that takes too long for a request to wait."""
    deadline = time.monotonic() + call.server.limits.sync_timeout_s
    story = await story_of(call, turn_id, owner_id) if seen else Story(turn_id)
    while story.ended is None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return None
        records = await follower.end(min(LOOK_AGAIN_S, left_s))
        if records is not None:
            story.tell(records)
        if records is None or story.incomplete:
            story = await story_of(call, turn_id, owner_id)
    return story


def _still_running(turn_id: TurnId, conversation: str | None) -> Response:
    body = {
        "request_id": request_name(turn_id),
        "conversation_id": conversation,
        "status": "processing",
        "message": RUNNING,
    }
    headers = {"Location": f"/api/get_answer?request_id={request_name(turn_id)}", "Retry-After": "1"}
    return Response(orjson.dumps(body), 202, headers=headers, media_type="application/json")


async def _asked_tool(call: Call, principal: Principal, agent_id: AgentId, body: InvokeBody) -> AskedTool:
    """The tool that is to run, if the agent may use it and the arguments fit."""
    agent = await call.server.bus.read(Agent, agent_id, principal.owner_id)
    agent.check_can_answer(principal.is_owner)
    _, settings = agent.settings_at(agent.served_version(principal.is_owner))
    tool = call.server.toolbox.get(body.action, agent)
    if tool is None or not settings.offers(tool.name):
        raise invalid("/action", f"The agent has no enabled tool {body.action!r}.", "unknown_tool")
    missing = tool.missing()
    if missing is not None:
        raise Problem("tool_not_available", missing)
    fault = tool.validate(body.parameters)
    if fault is not None:
        raise invalid("/parameters", fault, "invalid_arguments")
    digest = sha256(orjson.dumps(body.parameters, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return AskedTool("invoke", tool.name, tool.kind, tool.effect, body.parameters, digest)


def _tool_answer(call: Call, story: Story, body: InvokeBody) -> Response:
    if not isinstance(story.ended, Turn.Completed):
        raise problem_of_end(story)
    called = next(iter(story.calls.values()))
    if called["outcome"] != "succeeded":
        code = "upstream_timeout" if called["outcome"] == "timed_out" else "upstream_failed"
        facts = {"request_id": request_name(story.turn_id), "provider": body.action}
        raise Problem(code, called["result"] or "It is not known whether the tool did its work.", facts)
    call.say("Oshaani-Credits-Charged", charged(story))
    answer = {**called, "request_id": request_name(story.turn_id)}
    return Response(orjson.dumps(answer), media_type="application/json")
