"""Turns as people track them: list, look at, follow, cancel."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api import webhooks
from api.agents import AgentNumber, owned_agent
from api.answers import conversation_shown, visible_story
from api.bodies import Body, StrictRoute
from api.call import Call, conversation_name, request_name, turn_named
from api.chat import caller_of_agent, known_conversation
from api.envelopes import Envelope, Listed, enveloped, instant, listed
from api.idempotency import OnceDep
from api.pages import Paging, PagingDep, after_row, page_of
from api.principals import AnyCall
from api.streams import TurnStream, last_event_id
from api.webhooks import CallbackData, callback_of_story
from commands.turn import CancelTurn
from domain.ids import AgentId, TurnId, agent_of, named_conversation
from domain.money import credits
from projections.requests import RequestRow, list_requests
from schemas.turn_story import polled

router = APIRouter(route_class=StrictRoute, tags=["Requests"])

RequestId = Annotated[
    str, Path(max_length=64, description="`req-…`", examples=["req-550e8400-e29b-41d4-a716-446655440000"])
]
OfAgent = Annotated[int | None, Query(ge=1, le=2**53, description="Of this agent only.")]
OfConversation = Annotated[str | None, Query(max_length=128, description="Of this conversation only.")]


class CancelBody(Body):
    """Why the answer is not wanted any more."""

    reason: Annotated[str, Field(max_length=500)] = ""


class RequestData(BaseModel):
    """A turn."""

    request_id: str
    conversation_id: str | None
    status: str = Field(examples=["completed"])
    model: str | None = Field(default=None, examples=["ollama:llama3.2"])
    callback: CallbackData | None = None


@router.get("/api/requests", response_model=Listed[RequestData], tags=["Requests"])
async def list_requests_of_caller(
    call: AnyCall, paging: PagingDep, agent_id: OfAgent = None, conversation_id: OfConversation = None
) -> Response:
    """List requests, newest first; an agent's API key sees those to its agent."""
    own = call.caller().agent_id
    agent = AgentId(own) if own else None if agent_id is None else agent_of(agent_id)
    return await _page(call, paging, agent, conversation_id)


@router.get("/api/agents/{agent_id}/history", response_model=Listed[RequestData], tags=["Agent interaction"])
async def get_history(
    request: Request,
    call: AnyCall,
    paging: PagingDep,
    agent_id: AgentNumber,
    conversation_id: OfConversation = None,
) -> Response:
    """The agent's interaction history, newest first."""
    _, agent = await caller_of_agent(request)
    await owned_agent(call, agent_id)
    return await _page(call, paging, agent, conversation_id)


@router.get("/api/requests/{request_id}", response_model=Envelope[RequestData])
async def get_request(call: AnyCall, request_id: RequestId) -> Response:
    """One request, in every state."""
    story = await visible_story(call, turn_named(request_id))
    shown = await conversation_shown(call, story.conversation_id, call.caller().owner_id)
    callback = await callback_of_story(call, story)
    return enveloped(
        {**polled(story, shown), "model": story.model, **webhooks.shown(callback)}, "The request."
    )


@router.get("/api/requests/{request_id}/events", response_class=StreamingResponse)
async def follow_request(request: Request, call: AnyCall, request_id: RequestId) -> Response:
    """Follow a request as server-sent events; `Last-Event-ID` goes on where the connection was lost."""
    turn_id = turn_named(request_id)
    last = last_event_id(request)
    story = await visible_story(call, turn_id)
    assert turn_id is not None
    shown = await conversation_shown(call, story.conversation_id, call.caller().owner_id)
    stream = TurnStream(call, turn_id, shown, last)
    stream.begin()
    return stream


@router.post("/api/requests/{request_id}/cancel", response_model=Envelope[RequestData])
async def cancel_request(
    call: AnyCall, once: OnceDep, request_id: RequestId, body: CancelBody | None = None
) -> Response:
    """Cancel a request: what ran is charged, the message is not."""
    story = await visible_story(call, turn_named(request_id))
    reason = body.reason if body else ""
    command = CancelTurn(tenant_id=call.caller().owner_id, turn_id=TurnId(story.turn_id), reason=reason)
    await call.execute(command, once.command_id, once.digest)
    shown = await conversation_shown(call, story.conversation_id, call.caller().owner_id)
    data = {"request_id": request_name(story.turn_id), "conversation_id": shown, "status": "failed"}
    return enveloped({**data, "code": "request_cancelled"}, "Request cancelled.")


async def _page(call: Call, paging: Paging, agent_id: AgentId | None, conversation: str | None) -> Response:
    owner_id, scope = call.caller().owner_id, f"requests:{agent_id}:{conversation}"
    after = after_row(call, paging.cursor, scope)
    conversation_id = _conversation(agent_id, conversation)
    await call.reads()
    rows = await list_requests(call.server.db, owner_id, agent_id, conversation_id, paging.limit + 1, after)
    page = page_of(call, paging, scope, rows, lambda row: row.after)
    return listed(page, [data_of(row, call.caller().is_owner) for row in page.rows], "Requests.")


def _conversation(agent_id: AgentId | None, text: str | None) -> UUID | None:
    if text is None:
        return None
    if text.startswith("conv-") or agent_id is None:
        return known_conversation(text)
    return named_conversation(agent_id, text)


def data_of(row: RequestRow, by_owner: bool) -> dict[str, Any]:
    """A request as a list shows it; what it cost is for the owner."""
    named = row.conversation_name or (row.conversation_id and conversation_name(row.conversation_id))
    data: dict[str, Any] = {
        "request_id": request_name(row.request_id),
        "conversation_id": named,
        "status": row.status,
        "queued": row.queued,
        "message": row.question,
        "response": row.response,
        "tool_calls": row.tool_calls,
        "iterations": row.iterations,
        "model": row.model,
        "mode": row.mode,
        "code": row.code,
        "error_message": row.error_message,
        "created_at": instant(row.created_at),
        "started_at": instant(row.started_at),
        "ended_at": instant(row.ended_at),
    }
    if row.callback_status is not None:
        data["callback"] = {"status": row.callback_status, "attempts": row.callback_attempts}
    if by_owner:
        data.update(charged_credits=credits(row.charged_ncr), meter=row.meter, actor=row.actor)
    return data
