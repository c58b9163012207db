"""Names for ids, and how ids follow from other ids.

Whatever may be asked twice gets an id derived from what it is about, so that the second request meets the first.

Where ids are looked up or compared for every command, `id.int` is used: the standard library hashes, compares and
converts UUIDs in Python, and their numbers in C.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha1
from typing import NewType
from uuid import UUID, SafeUUID
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
_NAMESPACE_BYTES = NAMESPACE.bytes
_set, _UNKNOWN = object.__setattr__, SafeUUID.unknown
_SET_MASK, _SET_BITS = 0xF000 << 64 | 0xC000 << 48, 0x5000 << 64 | 0x8000 << 48  # version 5, RFC 9562 variant


def derived(*parts: object) -> UUID:
    """The id that always follows from these parts (uuid5, RFC 9562 §5.5)."""
    name = b"/".join(
        [part.int.to_bytes(16, "big") if type(part) is UUID else str(part).encode() for part in parts]
    )
    return _version_5(sha1(_NAMESPACE_BYTES + name, usedforsecurity=False).digest())


def shard_of(tenant_id: UUID) -> int:
    """The shard that holds all streams of a tenant, 0 ≤ shard < SHARDS."""
    return crc32(tenant_id.int.to_bytes(16, "big")) % SHARDS


@lru_cache(10_000)
def account_of(user_id: UserId) -> AccountId:
    """The credit account of a user."""
    return AccountId(derived(user_id, "credit_account"))


def agent_of(number: int) -> AgentId:
    """The agent behind the number that people see in URLs."""
    return AgentId(derived("agent", number))


def grant_of_payment(user_id: UserId, payment_ref: str) -> UUID:
    """The grant that a payment buys its payer: one, however often it is reported."""
    return derived(account_of(user_id), "payment", payment_ref)


def hold_of(action_id: UUID) -> HoldId:
    """The hold that pays for an action, for example a turn."""
    return HoldId(derived(action_id, "hold"))


def named_conversation(agent_id: AgentId, name: str) -> ConversationId:
    """The conversation a caller calls `name`; the same name with another agent is another conversation."""
    return ConversationId(derived(agent_id, "conversation", name))


def request_name(turn_id: UUID) -> str:
    """A turn as people name it."""
    return f"req-{turn_id}"


def conversation_name(conversation_id: UUID) -> str:
    """A conversation as people name it, unless they gave it a name of their own."""
    return f"conv-{conversation_id}"


def event_id(stream_id: UUID, stream_version: int) -> UUID:
    """The id of an event, the same wherever it is computed."""
    return _version_5(
        sha1(stream_id.int.to_bytes(16, "big") + b"%d" % stream_version, usedforsecurity=False).digest()
    )


def _version_5(digest: bytes) -> UUID:
    """The first 16 bytes as a UUID, version and variant set; the standard library's way takes three times as long."""
    found = object.__new__(UUID)
    # UUID's own `__init__` works out in Python which of its six arguments was given.
    _set(found, "int", int.from_bytes(digest[:16], "big") & ~_SET_MASK | _SET_BITS)
    _set(found, "is_safe", _UNKNOWN)
    return found
