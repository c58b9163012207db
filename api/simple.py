"""What a caller with an agent's key may know of the agent: its state, and the list of agents it can use (SOP §5.3.1)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from api.agents import AgentNumber, data_of
from api.bodies import StrictRoute
from api.call import Call
from api.chat import caller_of_agent
from api.envelopes import Envelope, Listed, enveloped, instant
from api.errors import not_found
from api.principals import AgentCall, AnyCall
from domain.agent import Agent
from domain.ids import AgentId, agent_of
from projections.agents import AgentRow, get_agent

router = APIRouter(route_class=StrictRoute)


class AgentStatus(BaseModel):
    """How an agent is doing."""

    id: int
    name: str
    status: str
    published_at: str | None
    version: int
    tools_count: int
    rag: dict[str, Any]


class AgentInfo(BaseModel):
    """What its users may know of an agent: not what it is told."""

    id: int
    name: str
    description: str
    agent_type: str
    status: str


@router.get("/api/agents/{agent_id}/status", response_model=Envelope[AgentStatus], tags=["Agent interaction"])
async def get_status(request: Request, call: AnyCall, agent_id: AgentNumber) -> Response:
    """The agent's state."""
    principal, id = await caller_of_agent(request)
    agent = await call.server.bus.read(Agent, id, principal.owner_id)
    row = await _row(call, agent_id)
    _, settings = agent.settings_at(agent.served_version(principal.is_owner))
    tools = [
        tool for tool in call.server.toolbox.offered(agent) if tool.available and settings.offers(tool.name)
    ]
    data = {
        "id": row.number,
        "name": row.name,
        "status": row.status,
        "published_at": instant(row.published_at),
        "version": row.version,
        "tools_count": len(tools),
        "rag": {"enabled": settings.use_rag},
    }
    return enveloped(data, "The agent's state.")


@router.get("/api/v1/agents", response_model=Listed[AgentInfo], tags=["Simple API v1"])
async def list_accessible_agents(request: Request, call: AgentCall) -> Response:
    """The agents that the key can use: a key belongs to one."""
    agent = await call.server.bus.read(Agent, _own(call), call.caller().owner_id)
    row = await _row(call, agent.number)
    return enveloped([_info(row)], "The agent of this key.", next_cursor=None)


@router.get("/api/v1/agents/{agent_id}", response_model=Envelope[AgentInfo], tags=["Simple API v1"])
async def get_agent_info(request: Request, call: AgentCall, agent_id: AgentNumber) -> Response:
    """The agent of the key."""
    if agent_of(agent_id) != _own(call):
        raise not_found("agent")
    return enveloped(_info(await _row(call, agent_id)), "The agent.")


def _own(call: Call) -> AgentId:
    agent_id = call.caller().agent_id
    assert agent_id is not None
    return AgentId(agent_id)


async def _row(call: Call, number: int) -> AgentRow:
    await call.reads()
    row = await get_agent(call.server.db, call.caller().owner_id, number)
    if row is None:
        raise not_found("agent")
    return row


def _info(row: AgentRow) -> dict[str, Any]:
    shown = data_of(row)
    return {name: shown[name] for name in AgentInfo.model_fields}
