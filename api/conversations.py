"""Conversations: begin and go on without waiting, fetch answers, look things up (SOP §5.3.3, §7)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from api import webhooks
from api.answers import conversation_shown, visible_story
from api.bodies import Body, StrictRoute, body_as
from api.call import Call, call_of, conversation_name, request_name, turn_named
from api.chat import Asked, Busy, ConversationText, Words, caller_of_own_agent, known_conversation, send
from api.envelopes import Envelope, answered, enveloped, instant
from api.errors import invalid, not_found
from api.etags import is_known, tag_of
from api.idempotency import once
from api.pages import LIMIT_MAX, begins_after, cursor_after
from api.principals import AgentCall, AnyCall
from api.quotas import say_quota
from api.webhooks import CallbackData, callback_of_story
from domain.callback import URL_CHARS_MAX
from domain.ids import AgentId, named_conversation
from domain.prices import MESSAGE
from projections.conversations import MessageRow, get_conversation, list_messages, search_messages
from schemas.turn_story import polled

QUEUED = "Request queued for processing. Use /api/get_answer with request_id to get the response."
WAIT_S_MAX = 25

router = APIRouter(route_class=StrictRoute, tags=["Conversations"])


CallbackUrl = Annotated[
    str,
    Field(
        min_length=1,
        max_length=URL_CHARS_MAX,
        description="Is sent a signed POST when the request has ended: what `/api/get_answer` tells then, as `data`.",
        examples=["https://example.com/oshaani-callback"],
    ),
]


class CreateConversationBody(Body):
    """The first message of a new conversation."""

    message: Words
    callback_url: CallbackUrl | None = None


class ContinueConversationBody(Body):
    """The next message of a conversation."""

    conversation_id: ConversationText
    message: Words
    when_busy: Busy = "queue"
    callback_url: CallbackUrl | None = None


class FindConversationBody(Body):
    """Which conversation, or what to search for in all of the agent's."""

    conversation_id: ConversationText | None = None
    query: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    limit: Annotated[int, Field(ge=1, le=LIMIT_MAX)] = 50
    cursor: Annotated[str, Field(max_length=500)] | None = None


class Accepted(BaseModel):
    """A message that waits for its turn (SOP §5.6.3)."""

    request_id: str
    conversation_id: str
    status: Literal["pending"]
    message: str


class Polled(BaseModel):
    """A request. `response` is there when it is completed, `error_message` and `code` when it failed."""

    request_id: str
    conversation_id: str | None
    status: Literal["pending", "processing", "completed", "failed"]
    response: str | None = None
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    iterations: int = 0
    error_message: str | None = None
    code: str | None = None
    callback: CallbackData | None = None


@router.post("/api/create_conversation", status_code=202, response_model=Accepted)
async def create_conversation(request: Request) -> Response:
    """Begin a conversation; its answer is fetched from `/api/get_answer`."""
    principal, agent_id = await caller_of_own_agent(request)
    body = await body_as(CreateConversationBody, request)
    asked = Asked(principal, agent_id, "api", MESSAGE, body.message, callback_url=body.callback_url)
    return await _queue(request, asked)


@router.post("/api/continue_conversation", status_code=202, response_model=Accepted)
async def continue_conversation(request: Request) -> Response:
    """Queue another message of a conversation; its turn comes when those before it are answered."""
    principal, agent_id = await caller_of_own_agent(request)
    body = await body_as(ContinueConversationBody, request)
    asked = Asked(
        principal,
        agent_id,
        "api",
        MESSAGE,
        body.message,
        body.conversation_id,
        when_busy=body.when_busy,
        callback_url=body.callback_url,
    )
    return await _queue(request, asked)


@router.get("/api/get_answer", response_model=Polled)
async def get_answer(
    request: Request,
    call: AnyCall,
    request_id: Annotated[
        str, Query(max_length=64, description="`req-…`, as the answer that accepted it says.")
    ],
    wait: Annotated[int, Query(ge=0, le=WAIT_S_MAX, description="Seconds to wait for the end.")] = 0,
) -> Response:
    """A request in every state: pending, processing, completed or failed. It is answered with 200 in each of them."""
    turn_id = turn_named(request_id)
    if turn_id is None:
        raise not_found("request")
    with call.server.feed.follow(turn_id) as follower:
        story = await visible_story(call, turn_id)
        if story.ended is None and wait:
            await follower.end(float(wait))
            story = await visible_story(call, turn_id)
    if story.ended is None:
        call.say("Retry-After", "1")
    callback = await callback_of_story(call, story)
    tag = tag_of(story.version + (callback.version if callback else 0))
    call.say("ETag", tag)
    if is_known(call, tag):
        return Response(status_code=304)
    shown = await conversation_shown(call, story.conversation_id, call.caller().owner_id)
    return answered({**polled(story, shown), **webhooks.shown(callback)})


@router.post("/api/find_conversation", response_model=Envelope[dict[str, Any]])
async def find_conversation(request: Request, call: AgentCall, body: FindConversationBody) -> Response:
    """Details and messages of a conversation, newest first; or with `query` messages of all of the agent's."""
    if (body.conversation_id is None) == (body.query is None):
        raise invalid("/conversation_id", "Send 'conversation_id' or 'query'.", "required")
    await call.reads()
    return await (_one(call, body) if body.conversation_id is not None else _search(call, body))


async def _queue(request: Request, asked: Asked) -> Response:
    call = call_of(request)
    turn_id, shown, _ = await send(call, asked, await once(request), "async")
    await say_quota(call, asked.meter)
    call.say("Location", f"/api/get_answer?request_id={request_name(turn_id)}")
    call.say("Retry-After", "1")
    body = {
        "request_id": request_name(turn_id),
        "conversation_id": shown,
        "status": "pending",
        "message": QUEUED,
    }
    return answered(body, 202)


async def _one(call: Call, body: FindConversationBody) -> Response:
    principal, text = call.caller(), body.conversation_id or ""
    agent_id = AgentId(principal.agent_id) if principal.agent_id else None
    assert agent_id is not None
    id = known_conversation(text) if text.startswith("conv-") else named_conversation(agent_id, text)
    scope = f"messages:{id}"
    after = begins_after(call, body.cursor, scope)
    db = call.server.db
    row = await get_conversation(db, principal.owner_id, agent_id, id)
    if row is None:
        raise not_found("conversation")
    found = await list_messages(db, principal.owner_id, id, body.limit + 1, after[0] if after else None)
    shown = found[: body.limit]
    cursor = cursor_after(call, scope, [shown[-1].position]) if len(found) > len(shown) else None
    data = {
        "conversation_id": row.name or conversation_name(id),
        "channel": row.channel,
        "message_count": row.message_count,
        "created_at": instant(row.created_at),
        "last_message_at": instant(row.last_message_at),
        "messages": [_message(message) for message in shown],
    }
    return enveloped(data, "The conversation.", next_cursor=cursor)


async def _search(call: Call, body: FindConversationBody) -> Response:
    principal = call.caller()
    assert principal.agent_id is not None and body.query is not None
    scope = f"search:{principal.agent_id}:{body.query}"
    after = begins_after(call, body.cursor, scope)
    found = await search_messages(
        call.server.db,
        principal.owner_id,
        principal.agent_id,
        body.query,
        body.limit,
        after[0] if after else None,
    )
    data = [
        {**_message(row), "conversation_id": row.conversation_name or conversation_name(row.conversation_id)}
        for row in found.rows
    ]
    cursor = cursor_after(call, scope, [found.seen_to]) if found.seen_to is not None else None
    return enveloped({"messages": data}, "Messages that contain the words.", next_cursor=cursor)


def _message(row: MessageRow) -> dict[str, Any]:
    return {
        "message_id": str(row.message_id),
        "request_id": request_name(row.turn_id),
        "role": row.role,
        "content": row.content,
        "created_at": instant(row.created_at),
    }
