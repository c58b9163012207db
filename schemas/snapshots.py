"""States of long-lived aggregates, so that a process need not replay years to serve one command.

A snapshot is a cache: it follows from the log, is written beside it, may be deleted at any time, and is ignored when
this program's idea of the state has changed. It holds no personal content.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import date, datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

import msgspec

from domain.aggregate import Root
from domain.conversation import Channel, Conversation
from domain.credit_account import CreditAccount, Grant, Hold
from domain.event_log import Snapshot
from domain.ids import AgentId, TurnId, UserId
from schemas.codec import encode_json

EVERY = 256  # events of a stream between two snapshots


@dataclass(frozen=True, slots=True)
class CreditAccountState:
    """What a credit account knows after its events."""

    owner_id: UserId
    plan: str
    available_ncr: int
    held_ncr: int
    grants: list[Grant]
    grant_ids: set[UUID]
    holds: dict[UUID, Hold]
    expired_hold_ids: set[UUID]
    free_granted: bool
    low_balance_armed: bool
    counted_on: date | None
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class ConversationState:
    """What a conversation knows after its events."""

    owner_id: UserId
    agent_id: AgentId
    channel: Channel
    name: str | None
    active_turn: TurnId | None
    queue: list[TurnId]
    message_count: int


STATES: dict[type[Root], type] = {CreditAccount: CreditAccountState, Conversation: ConversationState}
_CLASSES = {root_class.TOPIC: root_class for root_class in STATES}


def schema_of(root_class: type[Root]) -> str:
    """Names the form of a state; another form is another name."""
    form = msgspec.json.encode(msgspec.json.schema(STATES[root_class]), order="deterministic")
    digest = sha256(form).hexdigest()[:16]
    return f"{root_class.TOPIC}/{digest}"


_SCHEMAS = {root_class: schema_of(root_class) for root_class in STATES}


def is_due(root: Root, new_events: int) -> bool:
    """Whether the aggregate's last `new_events` events passed a multiple of `EVERY`."""
    return type(root) in STATES and root.version // EVERY != (root.version - new_events) // EVERY


def taken(root: Root, shard: int, tenant_id: UUID) -> Snapshot:
    """The snapshot of an aggregate as it stands."""
    state_class = STATES[type(root)]
    state = encode_json({field.name: getattr(root, field.name) for field in fields(state_class)})
    return Snapshot(shard, root.id, root.version, tenant_id, _SCHEMAS[type(root)], state)


def restored(snapshot: Snapshot, at: datetime) -> Root | None:
    """The aggregate of a snapshot; None when it has another form than this program's."""
    root_class = _CLASSES.get(snapshot.schema.partition("/")[0])
    if root_class is None or snapshot.schema != _SCHEMAS[root_class]:
        return None
    state: Any = msgspec.json.decode(snapshot.state, type=STATES[root_class])
    root = object.__new__(root_class)
    root.__base_init__(snapshot.stream_id, snapshot.stream_version, at)
    for field in fields(STATES[root_class]):
        setattr(root, field.name, getattr(state, field.name))
    return root
