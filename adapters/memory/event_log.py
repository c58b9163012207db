"""The event log in this process's memory: the contract of `domain.event_log` without a database, gone with it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from domain.event_log import (
    STREAM_EVENTS_MAX,
    SYNC_EVENTS_MAX,
    Batch,
    CommandRow,
    CommandSeen,
    DueChange,
    DueRow,
    HeadMoved,
    LogUnavailable,
    Snapshot,
    StoredEvent,
    Streams,
    Synced,
)
from domain.ids import SHARDS, shard_of
from domain.ports import Clock

LOCK_S = 4.0  # what one call waits for others to let go of its shards
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def utc_now() -> datetime:
    """The clock of this machine."""
    return datetime.now(UTC)


@dataclass(slots=True)
class _Due:
    """A row of due work; `kept_until`: the sweeper that claimed it is believed to be at it until then."""

    change: DueChange
    due_at: datetime
    kept_until: datetime = _LONG_AGO


class MemoryEventLog:
    """Implements `domain.event_log.EventLog` for the tasks of one event loop. Keeps everything."""

    def __init__(self, clock: Clock = utc_now) -> None:
        self._clock = clock
        self._locks = [asyncio.Lock() for _ in range(SHARDS)]
        self._events: list[list[StoredEvent]] = [[] for _ in range(SHARDS)]
        self._streams: defaultdict[tuple[int, UUID], list[StoredEvent]] = defaultdict(list)
        self._commands: dict[tuple[int, UUID], CommandRow] = {}
        self._due: dict[tuple[int, UUID], _Due] = {}
        self._beats: dict[str, datetime] = {}
        self._cursors: dict[str, dict[int, int]] = {}
        self._snapshots: dict[tuple[int, UUID], Snapshot] = {}

    # --- writing

    async def append(self, batch: Batch) -> datetime:
        async with self.locked(list(batch.heads)) as log:
            return await log.append(batch)

    @asynccontextmanager
    async def locked(self, shards: Sequence[int]) -> AsyncIterator[_Locked]:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(LOCK_S):
                    for shard in sorted(set(shards)):
                        await stack.enter_async_context(self._locks[shard])
            except TimeoutError:
                raise LogUnavailable(f"shards {sorted(shards)} stayed locked for {LOCK_S} s") from None
            locked = _Locked(self)
            yield locked
            self._write(locked.staged)

    # --- reading

    async def sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        return self._sync(heads, streams)

    async def commands(self, ids: Sequence[tuple[int, UUID]]) -> dict[UUID, CommandRow]:
        return {key[1]: self._commands[key] for key in ids if key in self._commands}

    async def read_after(self, cursors: Mapping[int, int], limit: int) -> list[StoredEvent]:
        found: list[StoredEvent] = []
        for shard in sorted(cursors):
            after = cursors[shard]
            found += self._events[shard][after : after + limit - len(found)]
        return found

    async def read_stream(self, shard: int, stream_id: UUID, last: int) -> list[StoredEvent]:
        stream = self._streams.get((shard, stream_id), [])
        return stream[max(0, len(stream) - last) :]

    async def read_stream_after(
        self, shard: int, stream_id: UUID, version: int, limit: int
    ) -> list[StoredEvent]:
        return self._streams.get((shard, stream_id), [])[version : version + limit]

    async def save_snapshot(self, snapshot: Snapshot) -> None:
        key = snapshot.shard, snapshot.stream_id
        kept = self._snapshots.get(key)
        if kept is None or kept.schema != snapshot.schema or kept.stream_version < snapshot.stream_version:
            self._snapshots[key] = snapshot

    async def heads(self) -> dict[int, int]:
        return {shard: len(events) for shard, events in enumerate(self._events)}

    # --- who works, and what is due

    async def beat(self, worker: str) -> None:
        self._beats[worker] = self._clock()

    async def due(self, worker: str, limit: int, dead_after_s: float) -> list[DueRow]:
        now = self._clock()
        silent_since = now - timedelta(seconds=dead_after_s)
        waiting = [
            row
            for row in self._due.values()
            if row.kept_until <= now
            and (row.due_at <= now or self._is_gone(row.change.claimed_by, worker, silent_since))
        ]
        waiting.sort(key=lambda row: row.due_at)
        return [_due_row(row.change) for row in waiting[:limit]]

    async def claim_due(self, row: DueRow, worker: str, until: datetime) -> bool:
        now = self._clock()
        stored = self._due.get((shard_of(row.tenant_id), row.id))
        if stored is None or stored.kept_until > now or stored.change.claimed_by != row.lost_worker:
            return False
        # An unclaimed row that has moved into the future was dealt with since it was read.
        if stored.due_at > now and not row.lost_worker:
            return False
        stored.kept_until = until
        return True

    @property
    def waiting(self) -> int:
        """Rows of due work, whenever their time is."""
        return len(self._due)

    # --- inside

    def _sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        shards = sorted({*heads, *(shard for shard, _ in streams)})
        found = Synced({shard: len(self._events[shard]) for shard in shards}, [], {})
        for shard in sorted(heads):
            if found.heads[shard] - heads[shard] <= SYNC_EVENTS_MAX:
                found.newer += self._events[shard][heads[shard] :]
        for shard, stream_id in streams:
            snapshot = self._snapshots.get((shard, stream_id))
            after = 0
            if snapshot is not None:
                found.snapshots[stream_id], after = snapshot, snapshot.stream_version
            stream = self._streams.get((shard, stream_id), [])
            found.streams[stream_id] = stream[after : after + STREAM_EVENTS_MAX]
        return found

    def _check(self, batch: Batch, staged: Batch) -> None:
        """Refuse what the database's keys would refuse, as if `staged` were already written."""
        self._move_on(batch, staged)
        next_positions = dict(batch.heads)
        for command in batch.commands:
            if self._is_served(command, staged):
                raise CommandSeen
        versions = {(event.shard, event.stream_id, event.stream_version) for event in staged.events}
        for event in batch.events:
            next_positions[event.shard] += 1
            if event.position != next_positions[event.shard]:
                raise ValueError(f"position {event.position} of shard {event.shard} does not follow its head")
            version = (event.shard, event.stream_id, event.stream_version)
            if version in versions or self._has_version(event):
                # A stream that was thought new exists: what was known of the shard is wrong as with a moved head.
                raise HeadMoved
            versions.add(version)

    def _move_on(self, batch: Batch, staged: Batch) -> None:
        """Have the batch follow on what others appended, if that changed nothing it was based on."""
        newer: dict[int, list[StoredEvent]] = {}
        for shard, head in batch.heads.items():
            ours = [event for event in staged.events if event.shard == shard]
            if head > len(self._events[shard]) + len(ours):
                raise HeadMoved
            newer[shard] = self._events[shard][head:] + [event for event in ours if event.position > head]
        if not any(newer.values()):
            return
        changed = {event.stream_id for events in newer.values() for event in events}
        too_many = any(len(events) > SYNC_EVENTS_MAX for events in newer.values())
        if batch.based_on is None or too_many or not changed.isdisjoint(batch.based_on):
            raise HeadMoved
        batch.move_on({shard: len(events) for shard, events in newer.items()})

    def _is_served(self, command: CommandRow, staged: Batch) -> bool:
        key = (command.shard, command.command_id)
        rows = [row for row in staged.commands if (row.shard, row.command_id) == key]
        row = rows[-1] if rows else self._commands.get(key)
        return row is not None and row.remembered

    def _has_version(self, event: StoredEvent) -> bool:
        # Versions of a stream are dense from 1, so its length is its version.
        return len(self._streams.get((event.shard, event.stream_id), ())) >= event.stream_version

    def _write(self, staged: Batch) -> None:
        for event in staged.events:
            self._events[event.shard].append(event)
            self._streams[event.shard, event.stream_id].append(event)
        for command in staged.commands:
            self._commands[command.shard, command.command_id] = command
        for change in staged.due:
            if change.due_at is None:
                self._due.pop((change.shard, change.id), None)
            else:
                self._due[change.shard, change.id] = _Due(change, change.due_at)

    def _is_gone(self, claimed_by: str, worker: str, silent_since: datetime) -> bool:
        if claimed_by in ("", worker):
            return False
        earlier_life = claimed_by.partition("/")[0] == worker.partition("/")[0]
        return earlier_life or self._beats.get(claimed_by, _LONG_AGO) < silent_since

    # --- how far a reader of the log has come

    async def cursor(self, reader: str) -> dict[int, int]:
        return dict(self._cursors.get(reader, {}))

    async def save_cursor(self, reader: str, positions: Mapping[int, int]) -> None:
        saved = self._cursors.setdefault(reader, {})
        for shard, position in positions.items():
            saved[shard] = max(position, saved.get(shard, 0))


class _Locked:
    """Implements `LockedLog`: what is appended is staged here until the lock ends without an error."""

    def __init__(self, log: MemoryEventLog) -> None:
        self._log = log
        self.staged = Batch({})

    async def sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        found = self._log._sync(heads, streams)
        for event in self.staged.events:
            found.heads[event.shard] = max(found.heads.get(event.shard, 0), event.position)
            if event.shard in heads and event.position > heads[event.shard]:
                found.newer.append(event)
            stream = found.streams.get(event.stream_id)
            if stream is not None and len(stream) < STREAM_EVENTS_MAX:
                stream.append(event)
        found.newer.sort(key=lambda event: (event.shard, event.position))
        return found

    async def append(self, batch: Batch) -> datetime:
        self._log._check(batch, self.staged)
        recorded_at = self._log._clock()
        self.staged.events += [event._replace(recorded_at=recorded_at) for event in batch.events]
        self.staged.commands += batch.commands
        self.staged.due += batch.due
        return recorded_at


def _due_row(change: DueChange) -> DueRow:
    return DueRow(change.kind, change.id, change.stream_id, change.tenant_id, change.claimed_by)
