"""Finding events in the log: the latest that fit a filter, and then whatever comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg

from adapters.postgres.pool import deadline
from domain.event_log import StoredEvent
from domain.ids import SHARDS, event_id, hold_of, shard_of
from oshaani.cli.streams import first_event
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from oshaani.wiring import Core

PAGE = 500
POLL_S = 0.3  # how late a followed event may be shown
POSITION_MAX = 2**63 - 1
TRAIL = 200_000  # events of its shard behind a turn's last among which its money is looked for
LEAD = 30  # events that the command which accepted a turn may have written before it
SCAN_PAGE = 20_000
SEARCH_S = 10.0  # the session's own limit on a statement
LATEST_MAX = 100_000

_COLUMNS = ", ".join(StoredEvent._fields)
# Each shard from its end, by its primary key; merged by the time of record.
_LATEST = f"""
    SELECT {_COLUMNS} FROM unnest(%(shards)s::smallint[], %(heads)s::bigint[]) h(shard_, head_)
     CROSS JOIN LATERAL (
        SELECT {_COLUMNS} FROM event
         WHERE shard = h.shard_ AND position BETWEEN %(first)s AND h.head_
           AND (%(tenant_id)s::uuid IS NULL OR tenant_id = %(tenant_id)s)
           AND (%(stream_id)s::uuid IS NULL OR stream_id = %(stream_id)s)
           AND (%(type)s::text IS NULL OR type LIKE %(type)s)
           AND (%(turn_id)s::uuid IS NULL OR stream_id = %(turn_id)s OR correlation_id = %(turn_id)s
                OR position(convert_to(%(turn_id)s::text, 'UTF8') IN payload) > 0
                OR position(convert_to(%(hold_id)s::text, 'UTF8') IN payload) > 0)
         ORDER BY position DESC LIMIT %(limit)s) e
     ORDER BY recorded_at DESC, shard DESC, position DESC LIMIT %(limit)s
"""  # noqa: S608 - the columns are our own
_SCAN = """
    SELECT position, stream_id, stream_version FROM event
     WHERE shard = %s AND position > %s ORDER BY position LIMIT %s
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are wanted; None means all. `type` may have `*` and `?`."""

    type: str | None = None
    stream_id: UUID | None = None
    tenant_id: UUID | None = None
    turn_id: UUID | None = None

    def fits(self, row: StoredEvent) -> bool:
        """The same decision as the query's, for an event at hand."""
        return (
            (self.type is None or fnmatchcase(row.type, self.type))
            and (self.stream_id is None or row.stream_id == self.stream_id)
            and (self.tenant_id is None or row.tenant_id == self.tenant_id)
            and (self.turn_id is None or self._is_of_turn(row, self.turn_id))
        )

    @staticmethod
    def _is_of_turn(row: StoredEvent, turn_id: UUID) -> bool:
        named = (str(turn_id).encode(), str(hold_of(turn_id)).encode())
        return turn_id in (row.stream_id, row.correlation_id) or any(name in row.payload for name in named)


async def latest(core: Core, wanted: Filter, limit: int, heads: Mapping[int, int]) -> list[StoredEvent]:
    """The last `limit` events up to `heads` that fit, oldest first."""
    shard, first, last = await _range_of(core, wanted)
    shards = range(SHARDS) if shard is None else [shard]
    arguments = {
        "shards": list(shards),
        "heads": [min(last, heads.get(each, 0)) for each in shards],
        "first": first,
        "tenant_id": wanted.tenant_id,
        "stream_id": wanted.stream_id,
        "type": _like(wanted.type) if wanted.type else None,
        "turn_id": wanted.turn_id,
        "hold_id": hold_of(wanted.turn_id) if wanted.turn_id else None,
        "limit": min(limit, LATEST_MAX),
    }
    rows = await _fetch(core, _LATEST, arguments)
    return [StoredEvent(*row) for row in reversed(rows)]


async def follow(core: Core, wanted: Filter, heads: Mapping[int, int]) -> AsyncIterator[StoredEvent]:
    """Events after `heads` that fit, as they come, for as long as somebody asks."""
    cursors = {shard: heads.get(shard, 0) for shard in range(SHARDS)}
    while True:
        rows = await core.log.read_after(cursors, PAGE)
        for row in rows:
            cursors[row.shard] = row.position
            if wanted.fits(row):
                yield row
        if len(rows) < PAGE:
            await asyncio.sleep(POLL_S)


async def at(core: Core, shard: int, position: int) -> StoredEvent | None:
    """The event at a position."""
    rows = await core.log.read_after({shard: position - 1}, 1)
    return rows[0] if rows and rows[0].position == position else None


async def with_id(core: Core, id: UUID) -> StoredEvent | None:
    """The event of an id. Ids follow from stream and version and have no index: the whole log is looked through."""
    for shard in range(SHARDS):
        position = 0
        while rows := await _fetch(core, _SCAN, (shard, position, SCAN_PAGE)):
            for position, stream_id, version in rows:
                if event_id(stream_id, version) == id:
                    return await at(core, shard, position)
    return None


async def _range_of(core: Core, wanted: Filter) -> tuple[int | None, int, int]:
    """The shard that all wanted events are in, if that is known, and between which positions they are."""
    known = wanted.turn_id or wanted.stream_id
    if known is None:
        return (shard_of(wanted.tenant_id) if wanted.tenant_id else None), 1, POSITION_MAX
    first = await first_event(core.log, known)
    if first is None:
        raise Failed(f"there is no {'turn' if wanted.turn_id else 'stream'} {known} in the log")
    last = POSITION_MAX
    if wanted.turn_id is not None:
        last = (await core.log.read_stream(first.shard, known, 1))[0].position + TRAIL
    return first.shard, max(1, first.position - LEAD), last


def _like(pattern: str) -> str:
    """A pattern of the shell as SQL has it."""
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


async def _fetch(core: Core, query: str, arguments: Any) -> list[Any]:
    try:
        async with core.pool.connection() as connection:
            with deadline(connection, SEARCH_S + 1):
                cursor = await connection.execute(query.encode(), arguments)
                found: list[Any] = await cursor.fetchall()
                return found
    except psycopg.errors.QueryCanceled as late:
        hint = "look for less with --tenant, --stream or --turn"
        raise Failed(f"looking through the log took longer than {SEARCH_S:.0f} s; {hint}") from late
