"""Read model: agents as their owners see them. A deleted agent has no row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from domain.agent import Agent
from domain.configuration import merged
from projections.projection import Delete, Edit, Insert, Projection, Update
from projections.read_side import After, ReadSide, page
from schemas.records import AnyRecord, Record

agents = Projection(
    "agents",
    version=1,
    tables="""
    CREATE TABLE agent (
        agent_id          uuid        PRIMARY KEY,
        number            bigint      NOT NULL,    -- the id that people see
        tenant_id         uuid        NOT NULL,    -- the owner
        name              text        NOT NULL,
        description       text        NOT NULL,
        model_id          integer     NOT NULL,
        agent_type        text        NOT NULL,
        status            text        NOT NULL,    -- draft | training | testing | published
        configuration     json        NOT NULL,    -- as given: json keeps the order of keys
        custom_tools      json        NOT NULL,    -- by name, in the order of adding
        version           integer     NOT NULL,    -- of the stream; the ETag
        config_version    integer     NOT NULL,
        published_version integer,
        published_at      timestamptz,
        created_at        timestamptz NOT NULL,
        updated_at        timestamptz NOT NULL
    );""",
    indexes="""
    CREATE UNIQUE INDEX agent_by_number ON agent (number);
    CREATE INDEX agent_by_tenant ON agent (tenant_id, created_at DESC, agent_id DESC);
    """,
)


@dataclass(frozen=True, slots=True)
class AgentRow:
    """An agent. `version` is that of its stream (ETag), `published_version` the configuration callers were given."""

    agent_id: UUID
    number: int
    tenant_id: UUID
    name: str
    description: str
    model_id: int
    agent_type: str
    status: str
    configuration: dict[str, Any]
    custom_tools: dict[str, dict[str, Any]]
    version: int
    config_version: int
    published_version: int | None
    published_at: datetime | None
    created_at: datetime
    updated_at: datetime

    @property
    def after(self) -> After:
        return self.created_at, self.agent_id


_COLUMNS = """
    agent_id, number, tenant_id, name, description, model_id, agent_type, status, configuration, custom_tools,
    version, config_version, published_version, published_at, created_at, updated_at
"""


async def get_agent(db: ReadSide, tenant_id: UUID, number: int) -> AgentRow | None:
    """A tenant's agent by the number people see; None when it is deleted or somebody else's."""
    return await db.one(
        AgentRow,
        f"SELECT {_COLUMNS} FROM agent WHERE tenant_id = %(tenant_id)s AND number = %(number)s",
        {"tenant_id": tenant_id, "number": number},
    )


async def list_agents(
    db: ReadSide, tenant_id: UUID, limit: int = 50, after: After | None = None
) -> list[AgentRow]:
    """A tenant's agents, newest first."""
    return await db.all(
        AgentRow,
        f"""
        SELECT {_COLUMNS} FROM agent
         WHERE tenant_id = %(tenant_id)s AND (created_at, agent_id) < (%(after_at)s, %(after_id)s)
         ORDER BY created_at DESC, agent_id DESC LIMIT %(limit)s
        """,
        {"tenant_id": tenant_id, **page(limit, after)},
    )


@agents.on(Agent.Created)
def created(record: Record[Agent.Created]) -> Insert:
    agent = record.event
    row = {
        "agent_id": record.stream_id,
        "number": agent.number,
        "tenant_id": record.tenant_id,
        "name": agent.name,
        "description": agent.description,
        "model_id": agent.model_id,
        "agent_type": agent.agent_type,
        "status": "draft",
        "configuration": agent.configuration,
        "custom_tools": {},
        "version": record.stream_version,
        "config_version": 1,
        "created_at": agent.created_at,
        "updated_at": record.recorded_at,
    }
    return Insert("agent", row)


@agents.on(Agent.Changed)
def changed(record: Record[Agent.Changed]) -> Update:
    event = record.event
    fields = {
        "name": event.name,
        "description": event.description,
        "model_id": event.model_id,
        "agent_type": event.agent_type,
    }
    given = {column: value for column, value in fields.items() if value is not None}
    return _update(record, config_version=event.config_version, **given)


@agents.on(Agent.ConfigurationChanged)
def configuration_changed(record: Record[Agent.ConfigurationChanged]) -> list[Edit | Update]:
    patch = record.event.patch

    def patched(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"configuration": merged(row["configuration"], patch)}

    edit = Edit("agent", (record.stream_id,), patched)
    return [edit, _update(record, config_version=record.event.config_version)]


@agents.on(Agent.TrainingStarted)
def training_started(record: Record[Agent.TrainingStarted]) -> Update:
    return _update(record, status="training")


@agents.on(Agent.TestingStarted)
def testing_started(record: Record[Agent.TestingStarted]) -> Update:
    return _update(record, status="testing")


@agents.on(Agent.Published)
def published(record: Record[Agent.Published]) -> Update:
    event = record.event
    return _update(
        record,
        status="published",
        published_version=event.config_version,
        published_at=event.published_at,
    )


@agents.on(Agent.Unpublished)
def unpublished(record: Record[Agent.Unpublished]) -> Update:
    return _update(record, status="draft")


@agents.on(Agent.CustomToolAdded, Agent.CustomToolChanged)
def custom_tool_set(
    record: Record[Agent.CustomToolAdded | Agent.CustomToolChanged],
) -> list[Edit | Update]:
    tool = record.event.tool

    def with_tool(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"custom_tools": {**row["custom_tools"], tool["name"]: tool}}

    return [Edit("agent", (record.stream_id,), with_tool), _update(record)]


@agents.on(Agent.CustomToolRemoved)
def custom_tool_removed(record: Record[Agent.CustomToolRemoved]) -> list[Edit | Update]:
    name = record.event.name

    def without_tool(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"custom_tools": {key: tool for key, tool in row["custom_tools"].items() if key != name}}

    return [Edit("agent", (record.stream_id,), without_tool), _update(record)]


@agents.on(Agent.KeyIssued, Agent.KeyRevoked)
def keys_changed(record: Record[Agent.KeyIssued | Agent.KeyRevoked]) -> Update:
    return Update("agent", (record.stream_id,), {"version": record.stream_version})


@agents.on(Agent.Deleted)
def deleted(record: Record[Agent.Deleted]) -> Delete:
    return Delete("agent", (record.stream_id,))


def _update(record: AnyRecord, **columns: Any) -> Update:
    stamps = {"version": record.stream_version, "updated_at": record.recorded_at}
    return Update("agent", (record.stream_id,), {**columns, **stamps})
