"""Tools of an agent: the catalogue, and tools of its own that call HTTP endpoints (SOP §4.1).

Secrets in headers go to the vault before anything else happens; what the log and the answers have are references.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.agents import AgentNumber
from api.bodies import Body, StrictRoute
from api.call import Call
from api.envelopes import Envelope, enveloped
from api.errors import all_invalid, invalid, not_found
from api.etags import expected_version
from api.idempotency import Once, OnceDep
from api.principals import UserCall
from commands.agent import AddCustomTool, ChangeCustomTool, RemoveCustomTool
from commands.command import Command
from domain.agent import Agent
from domain.custom_tool import secret_refs, validate_definition
from domain.ids import agent_of

MASK = "********"
OPEN_HEADERS = frozenset({"accept", "accept-language", "content-type", "user-agent"})  # never secret

router = APIRouter(route_class=StrictRoute, tags=["Tools"])

ToolName = Annotated[str, Path(max_length=64, description="The tool's name.")]


class CustomToolBody(Body):
    """One HTTP request as a tool. Header values are kept secret and shown as ********; sent so, they are kept."""

    name: str = ""
    description: str
    method: str
    url: Annotated[str, Field(description="With {placeholders} of required parameters in path and query.")]
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    headers: dict[str, str] = Field(default_factory=dict)
    timeout_s: Annotated[float, Field(strict=False)] = 15
    idempotent: bool = False


class ToolData(BaseModel):
    """A tool that the agent may know by name."""

    name: str
    description: str
    kind: str
    enabled: bool
    available: bool
    reason: str | None
    parameters: dict[str, Any] | None


@router.get("/api/agents/{agent_id}/tools", response_model=Envelope[list[ToolData]])
async def list_tools(call: UserCall, agent_id: AgentNumber) -> Response:
    """All tools the agent may have: which are enabled, and which this server can run."""
    agent = await _agent(call, agent_id)
    _, settings = agent.settings_at(agent.config_version)
    data = [
        {
            "name": tool.name,
            "description": tool.description,
            "kind": tool.kind,
            "enabled": settings.offers(tool.name),
            "available": tool.available,
            "reason": tool.reason,
            "parameters": tool.parameters,
        }
        for tool in call.server.toolbox.offered(agent)
    ]
    return enveloped(data, "The agent's tools.", next_cursor=None)


@router.get("/api/agents/{agent_id}/custom-tools", response_model=Envelope[list[dict[str, Any]]])
async def list_custom_tools(call: UserCall, agent_id: AgentNumber) -> Response:
    """The agent's own tools."""
    agent = await _agent(call, agent_id)
    data = [masked(tool) for tool in agent.custom_tools.values()]
    return enveloped(data, "The agent's custom tools.", next_cursor=None)


@router.post("/api/agents/{agent_id}/custom-tools", status_code=201, response_model=Envelope[dict[str, Any]])
async def create_custom_tool(
    call: UserCall, once: OnceDep, agent_id: AgentNumber, body: CustomToolBody
) -> Response:
    """Give the agent a tool of its own; at most ten."""
    agent = await _agent(call, agent_id)
    tool = body.model_dump()
    _check(tool, {})
    stored, _ = await _with_refs(call, agent, tool, {})
    command = AddCustomTool(
        tenant_id=agent.owner_id,
        agent_id=agent.agent_id,
        expected_version=expected_version(call),
        tool=stored,
    )
    await _execute(call, once, command, stored, {})
    call.say("Location", f"/api/agents/{agent_id}/custom-tools/{body.name}/")
    return enveloped(masked(stored), "Custom tool created.", 201)


@router.get("/api/agents/{agent_id}/custom-tools/{name}", response_model=Envelope[dict[str, Any]])
async def get_custom_tool(call: UserCall, agent_id: AgentNumber, name: ToolName) -> Response:
    """One of the agent's own tools."""
    return enveloped(masked(_tool(await _agent(call, agent_id), name)), "The custom tool.")


@router.put("/api/agents/{agent_id}/custom-tools/{name}", response_model=Envelope[dict[str, Any]])
async def replace_custom_tool(
    call: UserCall,
    once: OnceDep,
    agent_id: AgentNumber,
    name: ToolName,
    body: CustomToolBody,
) -> Response:
    """Replace the definition of a tool; its name stays."""
    agent = await _agent(call, agent_id)
    before = _tool(agent, name)
    tool = body.model_dump()
    if tool["name"] not in ("", name):
        raise invalid("/name", "A tool keeps its name; delete it and create another.", "immutable")
    tool["name"] = name
    known = secret_refs(before)
    _check(tool, known)
    stored, kept = await _with_refs(call, agent, tool, known)
    command = ChangeCustomTool(
        tenant_id=agent.owner_id,
        agent_id=agent.agent_id,
        expected_version=expected_version(call),
        name=name,
        tool=stored,
    )
    await _execute(call, once, command, stored, kept)
    for header, ref in known.items():
        if header not in kept:
            await call.server.vault.remove(agent.owner_id, ref)
    return enveloped(masked(stored), "Custom tool updated.")


@router.delete("/api/agents/{agent_id}/custom-tools/{name}", response_model=Envelope[None])
async def delete_custom_tool(
    call: UserCall, once: OnceDep, agent_id: AgentNumber, name: ToolName
) -> Response:
    """Take a tool away from the agent, and its secrets out of the vault."""
    agent = await _agent(call, agent_id)
    refs = secret_refs(agent.custom_tools.get(name, {}))
    command = RemoveCustomTool(
        tenant_id=agent.owner_id,
        agent_id=agent.agent_id,
        expected_version=expected_version(call),
        name=name,
    )
    await call.execute(command, once.command_id, once.digest)
    for ref in refs.values():
        await call.server.vault.remove(agent.owner_id, ref)
    return enveloped(None, "Custom tool deleted.")


def masked(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A definition as answers show it."""
    headers = {
        name: MASK if isinstance(value, Mapping) else value
        for name, value in (tool.get("headers") or {}).items()
    }
    return {**tool, "headers": headers}


async def _agent(call: Call, number: int) -> Agent:
    """The caller's agent, as fresh as this process knows it."""
    agent = await call.server.bus.read(Agent, agent_of(number), call.caller().owner_id)
    if agent.deleted:
        raise not_found("agent")
    return agent


def _tool(agent: Agent, name: str) -> Mapping[str, Any]:
    tool = agent.custom_tools.get(name)
    if tool is None:
        raise not_found("custom tool")
    return tool


def _check(tool: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Refuse a bad definition before any of its secrets is stored."""
    faults = validate_definition(tool)
    if faults:
        raise all_invalid([fault._asdict() for fault in faults])
    for header, value in tool["headers"].items():
        if value == MASK and header not in known:
            raise invalid("/headers", f"{header} has no value yet that could be kept.", "unknown_secret")


async def _with_refs(
    call: Call, agent: Agent, tool: Mapping[str, Any], known: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The definition with references for secrets, and which of the `known` references it still has."""
    kept = {header: known[header] for header, value in tool["headers"].items() if value == MASK}
    headers: dict[str, Any] = {header: {"secret_ref": ref} for header, ref in kept.items()}
    for header, value in tool["headers"].items():
        if header.lower() in OPEN_HEADERS:
            headers[header] = value
        elif header not in kept:
            # A name of its own: what is there stays in use until the command is accepted.
            name = f"custom_tool:{agent.number}:{tool['name']}:{header.lower()}:{uuid4()}"
            headers[header] = {"secret_ref": await call.server.vault.put(agent.owner_id, name, value)}
    return {**tool, "headers": headers}, kept


async def _execute(
    call: Call, once: Once, command: Command, stored: Mapping[str, Any], kept: Mapping[str, str]
) -> None:
    """Run the command; secrets that it did not take are forgotten again."""
    taken = False
    try:
        outcome = await call.execute(command, once.command_id, once.digest)
        taken = not outcome.seen
    finally:
        if not taken:
            for header, ref in secret_refs(stored).items():
                if header not in kept:
                    await call.server.vault.remove(command.tenant_id, ref)
