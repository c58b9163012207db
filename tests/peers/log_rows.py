"""Rows for an event log, with everything a test does not care about filled in."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID, uuid4

from domain.event_log import Batch, CommandRow, DueChange, EventLog, StoredEvent
from domain.ids import shard_of


def tenant_on(shard: int) -> UUID:
    """A new tenant whose streams are on `shard`."""
    while shard_of(tenant := uuid4()) != shard:
        pass
    return tenant


def stored(
    tenant_id: UUID,
    position: int,
    stream_id: UUID,
    stream_version: int,
    payload: bytes = b"{}",
    command_id: UUID | None = None,
) -> StoredEvent:
    """An event that waits to be appended."""
    return StoredEvent(
        shard=shard_of(tenant_id),
        position=position,
        tenant_id=tenant_id,
        stream_id=stream_id,
        stream_version=stream_version,
        type="Test.Happened",
        schema_version=1,
        payload=payload,
        personal=None,
        subject_id=None,
        command_id=command_id or UUID(int=1),
        correlation_id=UUID(int=2),
        causation_id=None,
        actor="system:test",
        traceparent=None,
        recorded_at=None,
    )


def served(
    tenant_id: UUID,
    command_id: UUID,
    outcome: str = "accepted",
    position: int = 0,
    remembered: bool = True,
) -> CommandRow:
    """What became of a command."""
    return CommandRow(
        shard=shard_of(tenant_id),
        command_id=command_id,
        tenant_id=tenant_id,
        type="DoTest",
        actor="system:test",
        digest=b"\x00digest\xff",
        outcome=outcome,
        remembered=remembered,
        position=position,
        result=b'{"ok":true}',
    )


def due(tenant_id: UUID, id: UUID, due_at: datetime | None, claimed_by: str = "") -> DueChange:
    """Work of the stream of the same id; None when it is done."""
    return DueChange(shard_of(tenant_id), "turn", id, id, tenant_id, due_at, claimed_by)


async def batch_after(log: EventLog, tenant_id: UUID, *streams: tuple[UUID, int]) -> Batch:
    """One event for each (stream, version), at the next positions of the tenant's shard."""
    shard = shard_of(tenant_id)
    head = (await log.heads())[shard]
    events = [stored(tenant_id, head + n, id, version) for n, (id, version) in enumerate(streams, 1)]
    return Batch({shard: head}, events)


async def happened(log: EventLog, tenant_id: UUID, stream_id: UUID, *versions: int) -> list[StoredEvent]:
    """Append an event for each version of a stream, in one batch; as they are stored."""
    batch = await batch_after(log, tenant_id, *((stream_id, version) for version in versions))
    at = await log.append(batch)
    return [event._replace(recorded_at=at) for event in batch.events]
