"""API keys of people and of agents: shown once, kept as digests, revoked at once (SOP §5.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.agents import AgentNumber, owned_agent
from api.bodies import Body, StrictRoute
from api.call import Call
from api.envelopes import Envelope, enveloped, instant
from api.errors import not_found
from api.idempotency import Once, OnceDep
from api.principals import UserCall
from api.webhooks import secret_of
from commands.agent import IssueAgentKey, RevokeAgentKey, RotateAgentKey
from commands.command import Command
from commands.user import IssueUserKey, RevokeUserKey
from domain.ids import agent_of
from domain.ports import KeyKind
from projections.api_keys import ApiKeyRow, list_keys

router = APIRouter(route_class=StrictRoute, tags=["API keys"])

KeyId = Annotated[str, Path(max_length=64, description="The `id` of a key.")]
ONCE_SHOWN = "API key created. Store it now: it is never shown again."
SHOWN_BEFORE = "This API key was created before; it is never shown again. Revoke it if it is lost."


class CreateKeyBody(Body):
    """A new key."""

    name: Annotated[str, Field(min_length=1, max_length=100, description="What it is for.")] = "API key"


class RotateKeyBody(Body):
    """A new key in place of an old one."""

    name: Annotated[str, Field(min_length=1, max_length=100)] | None = None


class KeyData(BaseModel):
    """A key. Only `prefix` is known of it later."""

    id: str
    name: str
    prefix: str
    created_at: str
    last_used_at: str | None
    revoked_at: str | None


class NewKeyData(BaseModel):
    """A key when it is new: `key` is in no other answer."""

    id: str
    name: str
    prefix: str
    key: str | None
    created_at: str
    webhook_secret: str | None = Field(
        default=None, description="Of an agent's key: see /api/webhook-secret."
    )


@router.get("/api/api-keys", response_model=Envelope[list[KeyData]])
async def list_user_keys(call: UserCall) -> Response:
    """List the user's own API keys, revoked ones included."""
    await call.reads()
    rows = await list_keys(call.server.db, call.caller().owner_id, None)
    return enveloped(await _shown(call, rows), "Your API keys.", next_cursor=None)


@router.post("/api/api-keys", status_code=201, response_model=Envelope[NewKeyData])
async def create_user_key(call: UserCall, once: OnceDep, body: CreateKeyBody | None = None) -> Response:
    """Create an API key that acts as the user."""
    name = body.name if body else "API key"
    facts, key = _minted(call, "user", name)
    command = IssueUserKey(tenant_id=call.caller().owner_id, **facts)
    return await _issue(call, once, command, facts, key)


@router.delete("/api/api-keys/{key_id}", response_model=Envelope[None])
async def revoke_user_key(call: UserCall, once: OnceDep, key_id: KeyId) -> Response:
    """Revoke one of the user's own API keys."""
    await call.execute(
        RevokeUserKey(tenant_id=call.caller().owner_id, key_id=key_id), once.command_id, once.digest
    )
    return enveloped(None, "API key revoked.")


@router.get("/api/agents/{agent_id}/api-keys", response_model=Envelope[list[KeyData]])
async def list_agent_keys(call: UserCall, agent_id: AgentNumber) -> Response:
    """List an agent's API keys, revoked ones included."""
    row = await owned_agent(call, agent_id)
    rows = await list_keys(call.server.db, call.caller().owner_id, row.agent_id)
    return enveloped(await _shown(call, rows), "The agent's API keys.", next_cursor=None)


@router.post("/api/agents/{agent_id}/api-keys", status_code=201, response_model=Envelope[NewKeyData])
async def create_agent_key(
    call: UserCall, once: OnceDep, agent_id: AgentNumber, body: CreateKeyBody | None = None
) -> Response:
    """Create an API key that may use one published agent."""
    facts, key = _minted(call, "agent", body.name if body else "API key")
    command = IssueAgentKey(tenant_id=call.caller().owner_id, agent_id=agent_of(agent_id), **facts)
    return await _issue(call, once, command, facts, key)


@router.delete("/api/agents/{agent_id}/api-keys/{key_id}", response_model=Envelope[None])
async def revoke_agent_key(call: UserCall, once: OnceDep, agent_id: AgentNumber, key_id: KeyId) -> Response:
    """Revoke one of an agent's API keys."""
    command = RevokeAgentKey(tenant_id=call.caller().owner_id, agent_id=agent_of(agent_id), key_id=key_id)
    await call.execute(command, once.command_id, once.digest)
    return enveloped(None, "API key revoked.")


@router.post(
    "/api/agents/{agent_id}/api-keys/{key_id}/rotate", status_code=201, response_model=Envelope[NewKeyData]
)
async def rotate_agent_key(
    call: UserCall,
    once: OnceDep,
    agent_id: AgentNumber,
    key_id: KeyId,
    body: RotateKeyBody | None = None,
) -> Response:
    """Create a key in place of an old one, which is refused from then on."""
    name = body.name if body and body.name else await _name_of(call, agent_of(agent_id), key_id)
    facts, key = _minted(call, "agent", name)
    command = RotateAgentKey(
        tenant_id=call.caller().owner_id, agent_id=agent_of(agent_id), old_key_id=key_id, **facts
    )
    return await _issue(call, once, command, facts, key)


def _minted(call: Call, kind: KeyKind, name: str) -> tuple[dict[str, Any], str]:
    keys = call.server.keys
    key_id, key = keys.mint(kind)
    prefix = key.rpartition("_")[0]
    return {"key_id": key_id, "name": name, "prefix": prefix, "digest": keys.digest(key)}, key


async def _issue(call: Call, once: Once, command: Command, facts: dict[str, Any], key: str) -> Response:
    outcome = await call.execute(command, once.command_id, once.digest)
    # The next request may come with it.
    await call.shown(outcome)
    data = {
        "id": outcome.result["key_id"],
        "name": facts["name"],
        "prefix": None if outcome.seen else facts["prefix"],
        "key": None if outcome.seen else key,
        "created_at": instant(outcome.result["created_at"]),
    }
    if not isinstance(command, IssueUserKey) and not outcome.seen:
        data["webhook_secret"] = secret_of(call, f"agent_key:{facts['key_id']}")
    return enveloped(data, SHOWN_BEFORE if outcome.seen else ONCE_SHOWN, 201)


async def _name_of(call: Call, agent_id: UUID, key_id: str) -> str:
    await call.reads()
    rows = await list_keys(call.server.db, call.caller().owner_id, agent_id)
    found = next((row.name for row in rows if row.key_id == key_id), None)
    if found is None:
        raise not_found("API key")
    return found


async def _shown(call: Call, rows: Sequence[ApiKeyRow]) -> list[dict[str, Any]]:
    used = await call.server.key_uses.last([row.key_id for row in rows])
    return [
        {
            "id": row.key_id,
            "name": row.name,
            "prefix": row.prefix,
            "created_at": instant(row.created_at),
            "last_used_at": instant(used.get(row.key_id)),
            "revoked_at": instant(row.revoked_at),
        }
        for row in rows
    ]
