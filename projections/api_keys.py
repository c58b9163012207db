"""Read model: API keys of people and of agents, by the id that is part of each key. Only digests are here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from domain.agent import Agent
from domain.user import User
from projections.projection import Insert, Projection, Update
from projections.read_side import ReadSide
from schemas.records import Record

api_keys = Projection(
    "api_keys",
    version=1,
    tables="""
    CREATE TABLE api_key (
        key_id     text        PRIMARY KEY,
        kind       text        NOT NULL,           -- user | agent
        tenant_id  uuid        NOT NULL,
        agent_id   uuid,                           -- of an agent's key
        name       text        NOT NULL,
        prefix     text        NOT NULL,           -- what people may see of the key
        digest     text        NOT NULL,
        created_at timestamptz NOT NULL,
        revoked_at timestamptz
    );
    -- What a key needs to know of its agent.
    CREATE TABLE api_key_agent (
        agent_id   uuid        PRIMARY KEY,
        number     bigint      NOT NULL,
        published  boolean     NOT NULL,
        deleted_at timestamptz
    );""",
    indexes="CREATE INDEX api_key_by_tenant ON api_key (tenant_id, agent_id, created_at DESC, key_id DESC);",
)


@dataclass(frozen=True, slots=True)
class ApiKeyRow:
    """A key. `revoked_at` is also set by the deletion of its agent.

    `agent_published` is False while an agent's key is suspended, None for keys of people.
    """

    key_id: str
    kind: Literal["user", "agent"]
    tenant_id: UUID
    agent_id: UUID | None
    agent_number: int | None
    agent_published: bool | None
    name: str
    prefix: str
    digest: str
    created_at: datetime
    revoked_at: datetime | None


_SELECT = """
    SELECT k.key_id, k.kind, k.tenant_id, k.agent_id, a.number AS agent_number, a.published AS agent_published,
           k.name, k.prefix, k.digest, k.created_at, coalesce(k.revoked_at, a.deleted_at) AS revoked_at
      FROM api_key k LEFT JOIN api_key_agent a USING (agent_id)
"""


async def find_key(db: ReadSide, key_id: str) -> ApiKeyRow | None:
    """A key by its id alone, whosever it is: for authentication only. Check `revoked_at` and `agent_published`."""
    return await db.one(ApiKeyRow, f"{_SELECT} WHERE k.key_id = %(key_id)s", {"key_id": key_id})


async def list_keys(db: ReadSide, tenant_id: UUID, agent_id: UUID | None) -> list[ApiKeyRow]:
    """The keys of a tenant's agent, or with None those of the tenant; revoked ones too, newest first."""
    return await db.all(
        ApiKeyRow,
        f"""
        {_SELECT}
         WHERE k.tenant_id = %(tenant_id)s AND k.agent_id IS NOT DISTINCT FROM %(agent_id)s::uuid
         ORDER BY k.created_at DESC, k.key_id DESC LIMIT 1000
        """,
        {"tenant_id": tenant_id, "agent_id": agent_id},
    )


@api_keys.on(User.ApiKeyIssued)
def user_key_issued(record: Record[User.ApiKeyIssued]) -> Insert:
    return _issued(record, "user", None)


@api_keys.on(User.ApiKeyRevoked)
def user_key_revoked(record: Record[User.ApiKeyRevoked]) -> Update:
    return Update("api_key", (record.event.key_id,), {"revoked_at": record.recorded_at})


@api_keys.on(Agent.KeyIssued)
def agent_key_issued(record: Record[Agent.KeyIssued]) -> Insert:
    return _issued(record, "agent", record.stream_id)


@api_keys.on(Agent.KeyRevoked)
def agent_key_revoked(record: Record[Agent.KeyRevoked]) -> Update:
    return Update("api_key", (record.event.key_id,), {"revoked_at": record.recorded_at})


@api_keys.on(Agent.Created)
def agent_created(record: Record[Agent.Created]) -> Insert:
    row = {"agent_id": record.stream_id, "number": record.event.number, "published": False}
    return Insert("api_key_agent", row)


@api_keys.on(Agent.Published)
def agent_published(record: Record[Agent.Published]) -> Update:
    return Update("api_key_agent", (record.stream_id,), {"published": True})


@api_keys.on(Agent.Unpublished)
def agent_unpublished(record: Record[Agent.Unpublished]) -> Update:
    return Update("api_key_agent", (record.stream_id,), {"published": False})


@api_keys.on(Agent.Deleted)
def agent_deleted(record: Record[Agent.Deleted]) -> Update:
    columns = {"published": False, "deleted_at": record.recorded_at}
    return Update("api_key_agent", (record.stream_id,), columns)


def _issued(
    record: Record[User.ApiKeyIssued] | Record[Agent.KeyIssued],
    kind: Literal["user", "agent"],
    agent_id: UUID | None,
) -> Insert:
    event = record.event
    row = {
        "key_id": event.key_id,
        "kind": kind,
        "tenant_id": record.tenant_id,
        "agent_id": agent_id,
        "name": event.name,
        "prefix": event.prefix,
        "digest": event.digest,
        "created_at": event.issued_at,
    }
    return Insert("api_key", row)
