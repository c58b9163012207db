"""The log as the rest of the program sees it: rows, one atomic append, and what is due.

Positions are dense and in commit order within a shard, so `(shard, position)` proves that nothing is missing and
nothing is there twice. A shard's head is its last position. Every call is bounded in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, Protocol
from uuid import UUID

DueKind = Literal["turn", "tool_call", "callback", "erasure"]


class StoredEvent(NamedTuple):
    """One event as stored. `payload` is JSON (or a reference to an object); `personal` is sealed under `subject_id`."""

    shard: int
    position: int
    tenant_id: UUID
    stream_id: UUID
    stream_version: int
    type: str
    schema_version: int
    payload: bytes
    personal: bytes | None
    subject_id: UUID | None
    command_id: UUID
    correlation_id: UUID
    causation_id: UUID | None
    actor: str
    traceparent: str | None
    recorded_at: datetime | None  # None until the database's clock has set it


class CommandRow(NamedTuple):
    """What became of a command: audit trail and idempotency key in one. `position` is of its last event, 0 without any."""

    shard: int
    command_id: UUID
    tenant_id: UUID
    type: str
    actor: str
    digest: bytes
    outcome: str  # "accepted" or a refusal's code
    remembered: bool  # whether the id serves this outcome for ever, or may be tried again
    position: int
    result: bytes  # JSON


class DueChange(NamedTuple):
    """Work that must happen at `due_at` even if nobody hears of it; `due_at` None removes it.

    `claimed_by` names the worker that is at it, "" when nobody is.
    """

    shard: int
    kind: DueKind
    id: UUID
    stream_id: UUID
    tenant_id: UUID
    due_at: datetime | None
    claimed_by: str


class DueRow(NamedTuple):
    """A row of due work that needs somebody. `lost_worker`: who held it and is gone, "" when it is simply time."""

    kind: DueKind
    id: UUID
    stream_id: UUID
    tenant_id: UUID
    lost_worker: str


class Snapshot(NamedTuple):
    """The state of a long stream at a version; a cache beside the log. `schema` names the form of `state`."""

    shard: int
    stream_id: UUID
    stream_version: int
    tenant_id: UUID
    schema: str
    state: bytes


@dataclass(slots=True)
class Batch:
    """One atomic append. Events carry the positions that follow `heads`.

    `based_on`: the streams that all of it was decided on. When others have appended meanwhile, it is still written if
    none of these has changed, further behind: `moved` then says by how much, shard by shard, and everything here was
    moved on by that. None: the heads must be what they were.
    """

    heads: dict[int, int]
    events: list[StoredEvent] = field(default_factory=list)
    commands: list[CommandRow] = field(default_factory=list)
    due: list[DueChange] = field(default_factory=list)
    based_on: Sequence[UUID] | None = None
    moved: dict[int, int] = field(default_factory=dict)

    def move_on(self, moved: dict[int, int]) -> None:
        """Have everything stand as many positions further behind, shard by shard."""
        self.moved = moved
        self.heads = {shard: head + moved.get(shard, 0) for shard, head in self.heads.items()}
        self.events = [
            row._replace(position=row.position + by) if (by := moved.get(row.shard)) else row
            for row in self.events
        ]
        self.commands = [
            row._replace(position=row.position + by) if row.position and (by := moved.get(row.shard)) else row
            for row in self.commands
        ]


@dataclass(slots=True)
class Synced:
    """A consistent view: heads of the shards asked for, what happened after the heads given, and streams.

    A stream begins after its snapshot if it has one, and ends early at `STREAM_EVENTS_MAX` events.
    """

    heads: dict[int, int]
    newer: list[StoredEvent]
    streams: dict[UUID, list[StoredEvent]]
    snapshots: dict[UUID, Snapshot] = field(default_factory=dict)


class HeadMoved(Exception):
    """Another process changed what the batch was based on; nothing was written. Sync, decide again."""


class CommandSeen(Exception):
    """Some of the batch's commands are already served; nothing was written. Look them up, leave them out."""


class LogUnavailable(Exception):
    """The log cannot be reached now, or did not answer in time; whether the last append happened may be unknown."""


Streams = Sequence[tuple[int, UUID]]


class LockedLog(Protocol):
    """The log with some shards locked: nobody else appends to them until the lock ends."""

    async def sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        """As `EventLog.sync`, under the lock."""

    async def append(self, batch: Batch) -> datetime:
        """As `EventLog.append`; takes effect when the lock ends without an error."""


class EventLog(Protocol):
    """The system of record."""

    async def append(self, batch: Batch) -> datetime:
        """Write everything or nothing and return the time of record. The batch says where it stands, see `Batch`.

        Raises:
            HeadMoved, CommandSeen: nothing was written.
            LogUnavailable: it is not known whether it was written; `commands` tells.
            Exception: anything else is about the batch, which cannot be stored as it is; nothing was written.
        """

    def locked(self, shards: Sequence[int]) -> AbstractAsyncContextManager[LockedLog]:
        """Lock shards (in ascending order, so that two such locks cannot deadlock) for a decision that must not race."""

    async def sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        """The shards' heads, events after the `heads` given, and the `streams`, all of one instant.

        Shards whose head is more than `SYNC_EVENTS_MAX` ahead are reported without events.
        """

    async def commands(self, ids: Sequence[tuple[int, UUID]]) -> dict[UUID, CommandRow]:
        """The commands already decided, of those asked for by (shard, id)."""

    async def read_after(self, cursors: Mapping[int, int], limit: int) -> list[StoredEvent]:
        """Up to `limit` events after the cursor of each shard, ascending (shard, position)."""

    async def read_stream(self, shard: int, stream_id: UUID, last: int) -> list[StoredEvent]:
        """The last `last` events of a stream, ascending."""

    async def read_stream_after(
        self, shard: int, stream_id: UUID, version: int, limit: int
    ) -> list[StoredEvent]:
        """Up to `limit` events of a stream after a version, ascending."""

    async def save_snapshot(self, snapshot: Snapshot) -> None:
        """Keep the snapshot of a stream; an older one than is kept, of the same schema, changes nothing."""

    async def heads(self) -> dict[int, int]:
        """The head of every shard."""

    # --- who works, and what is due

    async def beat(self, worker: str) -> None:
        """Say that a worker (`slot/incarnation`) is alive."""

    async def due(self, worker: str, limit: int, dead_after_s: float) -> list[DueRow]:
        """Work whose time has come, or whose worker is dead: silent for `dead_after_s`, or an earlier life of this slot."""

    async def claim_due(self, row: DueRow, worker: str, until: datetime) -> bool:
        """Keep others from taking the same row until then. False when somebody was faster."""

    # --- how far a reader of the log has come

    async def cursor(self, reader: str) -> dict[int, int]:
        """The positions a reader has saved, by shard; empty for a new reader."""

    async def save_cursor(self, reader: str, positions: Mapping[int, int]) -> None:
        """Remember how far a reader has come; a position never goes back."""


SYNC_EVENTS_MAX = 2_000
STREAM_EVENTS_MAX = 2_000
