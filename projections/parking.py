"""Streams that a projection could not go on with: list them, try again, or go on without the event."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from psycopg.rows import class_row

from domain.event_log import STREAM_EVENTS_MAX, EventLog, StoredEvent
from projections import checkpoints
from projections.applying import apply_one_by_one
from projections.catalogue import PROJECTIONS
from projections.checkpoints import SCHEMA, Connection, Progress
from projections.projection import Projection
from projections.read_side import Deadline, Pool
from projections.tables import shapes_of
from schemas.codec import EVENT_TYPES
from schemas.records import Records

RETRY_S = 9.0


@dataclass(frozen=True, slots=True)
class ParkedStream:
    """A stream that waits since `parked_at` because a projection could not apply the event at `position`."""

    projection: str
    stream_id: UUID
    shard: int
    position: int
    error: str
    parked_at: datetime


class NotParked(Exception):
    """The stream does not wait in that projection."""


class Parking:
    """The streams that wait. Safe beside running runners: it holds the projection's checkpoint while it works."""

    def __init__(
        self,
        pool: Pool,
        deadline: Deadline,
        log: EventLog,
        records: Records,
        projections: tuple[Projection, ...] = PROJECTIONS,
    ) -> None:
        self._pool, self._deadline, self._log, self._records = pool, deadline, log, records
        self._projections = {projection.name: projection for projection in projections}

    async def streams(self, limit: int = 1_000) -> list[ParkedStream]:
        """The streams that wait, longest first."""
        async with self._connection() as connection:
            cursor = connection.cursor(row_factory=class_row(ParkedStream))
            await cursor.execute(
                "SELECT projection, stream_id, shard, position, error, parked_at FROM parked"
                " ORDER BY parked_at, projection, stream_id LIMIT %s",
                (limit,),
            )
            return await cursor.fetchall()

    async def retry(self, projection: str, stream_id: UUID) -> bool:
        """Apply the event that failed and those behind it. False when the stream was parked again.

        Raises:
            NotParked: it does not wait.
        """
        return await self._apply_rest(projection, stream_id, skipped=0)

    async def skip(self, projection: str, stream_id: UUID) -> bool:
        """Leave out the event that failed and apply those behind it. False when the stream was parked again.

        Raises:
            NotParked: it does not wait.
        """
        return await self._apply_rest(projection, stream_id, skipped=1)

    async def _apply_rest(self, name: str, stream_id: UUID, skipped: int) -> bool:
        projection = self._projections[name]
        async with self._connection() as connection, connection.transaction():
            locked = await checkpoints.lock(connection, [name])
            cursor = await connection.execute(
                "DELETE FROM parked WHERE projection = %s AND stream_id = %s RETURNING shard, position",
                (name, stream_id),
            )
            row = await cursor.fetchone()
            if row is None or name not in locked:
                raise NotParked(f"stream {stream_id} in projection {name!r}")
            shard, position = row
            _, positions, waiting = locked[name]
            waited = await self._stream(shard, stream_id, position + skipped, positions[shard])
            rows = [row for row in waited if row.type in projection.handled or row.type not in EVENT_TYPES]
            work = Progress(projection, await shapes_of(connection, projection, SCHEMA))
            work.waiting = waiting - {stream_id}
            records = await self._records.open_some(rows, projection.handled)
            _, parked = await apply_one_by_one(connection, work, records)
            await checkpoints.park(connection, parked)
        return not parked

    async def _stream(self, shard: int, stream_id: UUID, first: int, last: int) -> list[StoredEvent]:
        found: list[StoredEvent] = []
        version = 0
        while rows := await self._log.read_stream_after(shard, stream_id, version, STREAM_EVENTS_MAX):
            version = rows[-1].stream_version
            found += [row for row in rows if first <= row.position <= last]
        return found

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        async with self._pool.connection(timeout=RETRY_S) as connection:
            with self._deadline(connection, RETRY_S):
                yield connection
