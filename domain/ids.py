"""Names for ids, and how ids follow from other ids.

Whatever may be asked twice gets an id derived from what it is about, so that the second request meets the first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NewType
from uuid import UUID, uuid5
from zlib import crc32

UserId = NewType("UserId", UUID)
AgentId = NewType("AgentId", UUID)
ConversationId = NewType("ConversationId", UUID)
TurnId = NewType("TurnId", UUID)
MessageId = NewType("MessageId", UUID)
CallId = NewType("CallId", UUID)
ToolCallId = NewType("ToolCallId", UUID)
AccountId = NewType("AccountId", UUID)
HoldId = NewType("HoldId", UUID)
CommandId = NewType("CommandId", UUID)

SHARDS = 32  # for ever: a tenant's shard is part of every stored position
NAMESPACE = UUID("8f4d4d0c-6a55-5a0e-9f0e-6f7368616e69")


def derived(*parts: object) -> UUID:
    """The id that always follows from these parts (uuid5, RFC 9562 §5.5)."""
    return uuid5(NAMESPACE, "/".join(map(str, parts)))


def shard_of(tenant_id: UUID) -> int:
    """The shard that holds all streams of a tenant, 0 ≤ shard < SHARDS."""
    return crc32(tenant_id.bytes) % SHARDS


@lru_cache(10_000)
def account_of(user_id: UserId) -> AccountId:
    """The credit account of a user."""
    return AccountId(derived(user_id, "credit_account"))


def agent_of(number: int) -> AgentId:
    """The agent behind the number that people see in URLs."""
    return AgentId(derived("agent", number))


def hold_of(action_id: UUID) -> HoldId:
    """The hold that pays for an action, for example a turn."""
    return HoldId(derived(action_id, "hold"))


def named_conversation(agent_id: AgentId, name: str) -> ConversationId:
    """The conversation a caller calls `name`; the same name with another agent is another conversation."""
    return ConversationId(derived(agent_id, "conversation", name))


def event_id(stream_id: UUID, stream_version: int) -> UUID:
    """The id of an event, the same wherever it is computed."""
    return uuid5(stream_id, str(stream_version))
