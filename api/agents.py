"""Agents: create, list, configure, publish (SOP §5.2.1)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.bodies import Body, StrictRoute
from api.call import Call
from api.chat import AGENT_NUMBER_MAX
from api.envelopes import Envelope, Listed, enveloped, instant, listed
from api.errors import invalid, not_found
from api.etags import expected_version, is_known, say_version, tag_of
from api.idempotency import Once, OnceDep
from api.pages import PagingDep, after_row, page_of
from api.principals import UserCall
from api.quotas import say_quota
from commands.agent import (
    ChangeAgent,
    CreateAgent,
    DeleteAgent,
    PublishAgent,
    TestAgent,
    TrainAgent,
    UnpublishAgent,
)
from commands.command import Command, Result
from domain import configuration as configurations
from domain.agent import DESCRIPTION_CHARS_MAX, NAME_CHARS_MAX
from domain.ids import AgentId, agent_of
from domain.prices import AGENT_CREATE
from projections.agents import AgentRow, get_agent, list_agents

MODEL_ID_MAX = 2**31 - 1

router = APIRouter(route_class=StrictRoute, tags=["Agent management"])

AgentNumber = Annotated[int, Path(ge=1, le=AGENT_NUMBER_MAX, description="The agent's number.", examples=[1])]
ModelId = Annotated[int, Field(ge=1, le=MODEL_ID_MAX, description="Of `GET /api/models/`; 1 is the default.")]
Configuration = Annotated[
    dict[str, Any],
    Field(
        description="Known keys are checked: system_prompt, enabled_tools, disabled_tools, tools_enabled, "
        "max_tool_iterations, use_memory, max_history_messages, use_rag, rag_top_k, rag_threshold, temperature, "
        "max_output_tokens, auto_apply. Others are kept and named in `warnings`."
    ),
]


class CreateAgentBody(Body):
    """A new agent; only the name is required."""

    name: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
    description: Annotated[str, Field(max_length=DESCRIPTION_CHARS_MAX)] = ""
    model_id: ModelId = 1
    agent_type: Annotated[str, Field(min_length=1, max_length=64)] = "quick_bot"
    configuration: Configuration = Field(default_factory=dict)


class ChangeAgentBody(Body):
    """A merge patch (RFC 7396), recursive in `configuration`: lists replace, null deletes a key of it."""

    name: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)] = ""
    description: Annotated[str, Field(max_length=DESCRIPTION_CHARS_MAX)] = ""
    model_id: ModelId = 1
    agent_type: Annotated[str, Field(min_length=1, max_length=64)] = ""
    configuration: Configuration = Field(default_factory=dict)


class AgentData(BaseModel):
    """An agent as its owner sees it."""

    id: int = Field(examples=[1])
    name: str
    description: str
    model_id: int
    agent_type: str
    status: Literal["draft", "training", "testing", "published"]
    configuration: dict[str, Any]
    version: int = Field(description='Also the ETag: `"v<version>"`.')
    config_version: int
    published_version: int | None
    published_at: str | None = None
    created_at: str | None = None
    updated_at: str | None = None
    warnings: list[str]


class AgentEnvelope(Envelope[AgentData]):
    """An agent; its configuration also stands at the top."""

    configuration: dict[str, Any]


@router.get("/api/agents", response_model=Listed[AgentData])
async def list_agents_of_user(
    call: UserCall,
    paging: PagingDep,
    scope: Annotated[
        Literal["own", "shared"],
        Query(
            description="Own agents, or those shared with you. Agents cannot be shared yet: that list is empty."
        ),
    ] = "own",
) -> Response:
    """List all of the user's agents, newest first."""
    owner_id, name = call.caller().owner_id, f"agents:{scope}"
    after = after_row(call, paging.cursor, name)
    await call.reads()
    rows = [] if scope == "shared" else await list_agents(call.server.db, owner_id, paging.limit + 1, after)
    page = page_of(call, paging, name, rows, lambda row: row.after)
    message = "Agents cannot be shared yet; none is shared with you." if scope == "shared" else "Your agents."
    return listed(page, [data_of(row) for row in page.rows], message)


@router.post("/api/agents", status_code=201, response_model=AgentEnvelope)
async def create_agent(call: UserCall, once: OnceDep, body: CreateAgentBody) -> Response:
    """Create a draft that only its owner can try."""
    await _check_model(call, body.model_id)
    number = await call.server.next_agent_number()
    command = CreateAgent(
        tenant_id=call.caller().owner_id,
        number=number,
        name=body.name,
        description=body.description,
        model_id=body.model_id,
        agent_type=body.agent_type,
        configuration=body.configuration,
    )
    outcome = await call.execute(command, once.command_id, once.digest)
    await say_quota(call, AGENT_CREATE)
    call.say("Location", f"/api/agents/{outcome.result['number']}/")
    return _changed(call, outcome.result, "Agent created.", 201)


@router.get("/api/agents/{agent_id}", response_model=AgentEnvelope)
async def get_agent_of_user(call: UserCall, agent_id: AgentNumber) -> Response:
    """Get an agent, its configuration included."""
    row = await owned_agent(call, agent_id)
    say_version(call, row.version)
    if is_known(call, tag_of(row.version)):
        return Response(status_code=304)
    return enveloped(data_of(row), "The agent.", configuration=row.configuration)


@router.patch("/api/agents/{agent_id}", response_model=AgentEnvelope)
async def update_agent(
    call: UserCall, once: OnceDep, agent_id: AgentNumber, body: ChangeAgentBody
) -> Response:
    """Change an agent with a merge patch; its configuration takes effect at once unless `auto_apply` is false."""
    patch = body.model_dump(exclude_unset=True)
    if "model_id" in patch:
        await _check_model(call, body.model_id)
    command = ChangeAgent(**_of(call, agent_id), patch=patch)
    return await _change(call, once, command, "Agent updated.")


@router.delete("/api/agents/{agent_id}", response_model=Envelope[None])
async def delete_agent(call: UserCall, once: OnceDep, agent_id: AgentNumber) -> Response:
    """Delete an agent and revoke its keys; its charges stay."""
    outcome = await call.execute(DeleteAgent(**_of(call, agent_id)), once.command_id, once.digest)
    await call.shown(outcome)
    return enveloped(None, "Agent deleted.")


@router.post("/api/agents/{agent_id}/publish", response_model=AgentEnvelope)
async def publish_agent(call: UserCall, once: OnceDep, agent_id: AgentNumber) -> Response:
    """Publish an agent: callers with one of its API keys can use it from here on."""
    return await _change(call, once, PublishAgent(**_of(call, agent_id)), "Agent published.")


@router.post("/api/agents/{agent_id}/unpublish", response_model=AgentEnvelope)
async def unpublish_agent(call: UserCall, once: OnceDep, agent_id: AgentNumber) -> Response:
    """Take an agent back to draft; its API keys are suspended until it is published again."""
    return await _change(call, once, UnpublishAgent(**_of(call, agent_id)), "Agent unpublished.")


@router.post("/api/agents/{agent_id}/train", response_model=AgentEnvelope)
async def train_agent(call: UserCall, once: OnceDep, agent_id: AgentNumber) -> Response:
    """Set an agent to training."""
    return await _change(call, once, TrainAgent(**_of(call, agent_id)), "Agent is in training.")


@router.post("/api/agents/{agent_id}/test", response_model=AgentEnvelope)
async def test_agent(call: UserCall, once: OnceDep, agent_id: AgentNumber) -> Response:
    """Set an agent to testing."""
    return await _change(call, once, TestAgent(**_of(call, agent_id)), "Agent is in testing.")


async def owned_agent(call: Call, number: int) -> AgentRow:
    """The caller's agent of a number, as the read model has it.

    Raises:
        Problem: no such agent of the caller.
    """
    await call.reads()
    row = await get_agent(call.server.db, call.caller().owner_id, number)
    if row is None:
        raise not_found("agent")
    return row


def data_of(row: AgentRow) -> dict[str, Any]:
    """An agent as its owner sees it."""
    return {
        "id": row.number,
        "name": row.name,
        "description": row.description,
        "model_id": row.model_id,
        "agent_type": row.agent_type,
        "status": row.status,
        "configuration": row.configuration,
        "version": row.version,
        "config_version": row.config_version,
        "published_version": row.published_version,
        "published_at": instant(row.published_at),
        "created_at": instant(row.created_at),
        "updated_at": instant(row.updated_at),
        "warnings": configurations.check(row.configuration),
    }


def _of(call: Call, number: int) -> dict[str, Any]:
    return {
        "tenant_id": call.caller().owner_id,
        "agent_id": AgentId(agent_of(number)),
        "expected_version": expected_version(call),
    }


async def _change(call: Call, once: Once, command: Command, message: str) -> Response:
    outcome = await call.execute(command, once.command_id, once.digest)
    if isinstance(command, PublishAgent | UnpublishAgent):
        # Its keys are let in by the read models: have them know before the owner does.
        await call.shown(outcome)
    return _changed(call, outcome.result, message)


def _changed(call: Call, result: Result, message: str, status: int = 200) -> Response:
    say_version(call, result["version"])
    data = {"id": result["number"], **{name: value for name, value in result.items() if name != "number"}}
    if "created_at" in data:
        data["created_at"] = instant(data["created_at"])
    return enveloped(data, message, status, configuration=result["configuration"])


async def _check_model(call: Call, model_id: int) -> None:
    models = call.server.models
    if not models.knows(model_id):
        await models.cards()
        if not models.knows(model_id):
            raise invalid(
                "/model_id", f"This server has no model {model_id}; see GET /api/models/.", "unknown_model"
            )
