"""Reading single streams of the log, of which only the id is known."""

from __future__ import annotations

from uuid import UUID

from domain.event_log import EventLog, StoredEvent
from domain.ids import SHARDS

PAGE = 500


async def first_event(log: EventLog, stream_id: UUID) -> StoredEvent | None:
    """The event that a stream begins with: it tells the tenant, and with it the shard. None without such a stream."""
    for shard in range(SHARDS):
        rows = await log.read_stream_after(shard, stream_id, 0, 1)
        if rows:
            return rows[0]
    return None


async def whole_stream(
    log: EventLog, shard: int, stream_id: UUID, after_version: int = 0
) -> list[StoredEvent]:
    """The events of a stream after a version, ascending."""
    found: list[StoredEvent] = []
    while rows := await log.read_stream_after(shard, stream_id, after_version, PAGE):
        found += rows
        after_version = rows[-1].stream_version
    return found
