"""A projection built anew from the log beside the old one, then swapped in: read models are never migrated.

The log is read by one connection while another writes, both thousands of rows at a time; only event types that
somebody handles leave the database, and personal parts only where a handler looks at them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from domain.event_log import StoredEvent
from domain.ids import SHARDS
from projections import checkpoints
from projections.applying import BatchRefused, Readable, apply, apply_one_by_one
from projections.checkpoints import SCHEMA, Connection, Parked, Progress
from projections.projection import Projection
from projections.read_side import Deadline, Pool
from projections.tables import forget, shapes_of, table_names
from schemas.codec import EVENT_TYPES
from schemas.records import Records

log_of = logging.getLogger(__name__)

BATCH_MAX = 10_000  # events in one transaction
BATCHES_COLLECTED = 20  # at once: they leave no cycles, and looking for some walks through what is read ahead
PREFETCHED_MAX = 2  # batches read ahead
NEAR = 5_000  # events left when the swap may catch up with live under its lock
CONNECT_S, STEP_S, INDEX_S = 5.0, 60.0, 3_600.0
SWAP_TRIES_MAX, SWAP_LOCK_MS, SWAP_PAUSE_S = 50, 300, 0.1
BUILDING = "oshaani_rebuild"

_HEADS = "SELECT shard, head FROM shard ORDER BY shard"
_READ = """
    SELECT shard, position, tenant_id, stream_id, stream_version, type, schema_version, payload,
           CASE WHEN type = ANY (%b) THEN personal END, subject_id, command_id, correlation_id, causation_id, actor,
           traceparent, recorded_at
      FROM event
     WHERE shard = %b AND position > %b AND position <= %b AND NOT type = ANY (%b)
     ORDER BY position LIMIT %b
"""
_CHECKPOINT = """
    INSERT INTO checkpoint (projection, version, positions) VALUES (%s, %s, %s)
    ON CONFLICT (projection) DO UPDATE SET version = excluded.version, positions = excluded.positions
"""

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Batch:
    records: list[Readable]
    cursors: list[int]


async def rebuild(
    pool: Pool,
    deadline: Deadline,
    records: Records,
    projections: Sequence[Projection],
    progress: Report | None = None,
    *,
    outdated_only: bool = False,
) -> dict[str, Progress]:
    """Build projections from position 0 and swap them in together; returns where they stand.

    One rebuild at a time on a database; with `outdated_only`, what another process has built meanwhile is left alone.
    `progress(done, total)` counts events. The old tables serve queries and live updates until the swap.

    Raises:
        psycopg.Error, OSError: the database failed; the old tables are as they were.
    """
    async with pool.connection(timeout=CONNECT_S) as writer:
        building = Building(pool, deadline, records, projections, writer)
        try:
            with collecting_by_hand():
                return await building.run(progress or (lambda done, total: None), outdated_only)
        finally:
            await building.leave()


@contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Keep the garbage collector from walking through tens of thousands of records again and again.

    It takes half the time of a rebuild otherwise; `Building` calls it now and then between batches.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


async def current(connection: Connection, projections: Sequence[Projection]) -> dict[str, Progress]:
    """Where the projections stand whose tables are of the version this program knows."""
    async with connection.transaction():
        found = await checkpoints.lock(connection, [projection.name for projection in projections])
    works: dict[str, Progress] = {}
    for projection in projections:
        version, positions, waiting = found.get(projection.name, (-1, [], set()))
        if version == projection.version:
            shapes = await shapes_of(connection, projection, SCHEMA)
            works[projection.name] = Progress(projection, shapes, positions, waiting)
    return works


class Building:
    """One rebuild under way; `writer` works in a schema of its own."""

    def __init__(
        self,
        pool: Pool,
        deadline: Deadline,
        records: Records,
        projections: Sequence[Projection],
        writer: Connection,
    ) -> None:
        self._pool, self._deadline, self._records, self._writer = pool, deadline, records, writer
        self._projections = projections
        self._works: list[Progress] = []
        self._parked: dict[tuple[str, Any], Parked] = {}
        self._cursors = [0] * SHARDS
        types = {name for projection in projections for name in projection.handled}
        self._ignored = sorted(EVENT_TYPES.keys() - types)
        self._personal = sorted(
            {name for each in projections for name, handled in each.handled.items() if handled.personal}
        )

    async def run(self, progress: Report, outdated_only: bool) -> dict[str, Progress]:
        await self._take_turns()
        done: dict[str, Progress] = {}
        if outdated_only:
            done = await current(self._writer, self._projections)
            self._projections = [each for each in self._projections if each.name not in done]
        if not self._projections:
            return done
        try:
            await self._build(progress, index_first=False)
        except psycopg.errors.UniqueViolation:
            # Some event must not have happened: with the indexes in place it is found and its stream parked.
            await self._build(progress, index_first=True)
        return done | {work.projection.name: work for work in self._works}

    async def _build(self, progress: Report, index_first: bool) -> None:
        self._cursors, self._works, self._parked = [0] * SHARDS, [], {}
        await self._create()
        if index_first:
            await self._index()
        heads = await self._heads(self._writer)
        while sum(heads) - sum(self._cursors) > 0:
            await self._catch_up(heads, progress)
            heads = await self._heads(self._writer)
            if sum(heads) - sum(self._cursors) < NEAR:
                break
        if not index_first:
            await self._index()
        await self._swap()
        progress(sum(self._cursors), sum(self._cursors))

    async def leave(self) -> None:
        """Put the connection back as it was, or throw it away."""
        try:
            with self._deadline(self._writer, STEP_S):
                await self._writer.execute(f"DROP SCHEMA IF EXISTS {BUILDING} CASCADE")
                await self._writer.execute("SELECT pg_advisory_unlock_all()")
                await self._writer.execute("RESET ALL")
        except (psycopg.Error, OSError):
            await self._writer.close()

    # --- steps

    async def _take_turns(self) -> None:
        while True:
            with self._deadline(self._writer, STEP_S):
                query = "SELECT pg_try_advisory_lock(hashtext('oshaani rebuild'))"
                row = await (await self._writer.execute(query)).fetchone()
            if row is not None and row[0]:
                return
            await asyncio.sleep(SWAP_PAUSE_S)

    async def _create(self) -> None:
        with self._deadline(self._writer, STEP_S):
            execute = self._writer.execute
            await execute(f"DROP SCHEMA IF EXISTS {BUILDING} CASCADE")
            await execute(f"CREATE SCHEMA {BUILDING}")
            await execute(f"SET search_path = {BUILDING}, {SCHEMA}")
            # Nobody sees these rows before the swap, and its commit makes them durable with it.
            await execute("SET synchronous_commit = off")
            await execute("SET statement_timeout = 0")
            for projection in self._projections:
                await _script(self._writer, projection.tables)
                shapes = await shapes_of(self._writer, projection, BUILDING)
                self._works.append(Progress(projection, shapes, forgets=[]))

    async def _catch_up(self, heads: list[int], progress: Report) -> None:
        total = sum(heads)
        queue: asyncio.Queue[_Batch | None] = asyncio.Queue(PREFETCHED_MAX)
        reader = asyncio.create_task(self._read_into(queue, self._cursors.copy(), heads))
        batch_count = 0
        try:
            while (batch := await queue.get()) is not None:
                await self._apply(batch)
                del batch
                batch_count += 1
                if batch_count % BATCHES_COLLECTED == 0:
                    gc.collect(1)
                progress(sum(self._cursors), total)
            await reader
        finally:
            reader.cancel()
            await asyncio.wait([reader])

    async def _index(self) -> None:
        with self._deadline(self._writer, INDEX_S):
            for projection in self._projections:
                await _script(self._writer, projection.indexes)
                for table in table_names(projection):
                    await self._writer.execute(f"ANALYZE {table}".encode())
            async with self._writer.transaction():
                for work in self._works:
                    for change in work.forgets or ():
                        await forget(self._writer, change)
                    work.forgets = None

    async def _swap(self) -> None:
        for attempt in range(SWAP_TRIES_MAX):
            cursors, parked = self._cursors.copy(), dict(self._parked)
            waiting = [work.waiting.copy() for work in self._works]
            try:
                with self._deadline(self._writer, STEP_S):
                    async with self._writer.transaction():
                        await self._swap_now()
                return
            except (psycopg.errors.LockNotAvailable, BatchRefused) as refused:
                if attempt == SWAP_TRIES_MAX - 1:
                    raise
                self._cursors, self._parked = cursors, parked
                for work, before in zip(self._works, waiting, strict=True):
                    work.waiting, work.positions = before, cursors.copy()
                if isinstance(refused, BatchRefused):
                    await self._catch_up(await self._heads(self._writer), lambda done, total: None)
            await asyncio.sleep(SWAP_PAUSE_S)

    async def _swap_now(self) -> None:
        names = [projection.name for projection in self._projections]
        await self._writer.execute("SET LOCAL synchronous_commit = on")
        # Shorter than deadlock_timeout: when a query holds some of the tables, this gives way and not the query.
        await self._writer.execute(f"SET LOCAL lock_timeout = {SWAP_LOCK_MS}")
        await checkpoints.lock(self._writer, names)
        heads = await self._heads(self._writer)
        async for batch in self._batches(self._writer, self._cursors.copy(), heads):
            for work in self._works:
                _, parked = await apply(self._writer, work, batch.records)
                self._note(parked)
            self._move(batch.cursors)
        await self._writer.execute("DELETE FROM parked WHERE projection = ANY (%s)", (names,))
        await checkpoints.park(self._writer, list(self._parked.values()))
        for work in self._works:
            for table in table_names(work.projection):
                await self._writer.execute(f"DROP TABLE IF EXISTS {SCHEMA}.{table}".encode())
                await self._writer.execute(f"ALTER TABLE {table} SET SCHEMA {SCHEMA}".encode())
            arguments = (work.projection.name, work.projection.version, work.positions)
            await self._writer.execute(_CHECKPOINT, arguments)

    # --- reading and applying

    async def _heads(self, connection: Connection) -> list[int]:
        with self._deadline(connection, STEP_S):
            cursor = await connection.execute(_HEADS)
            return [head for _, head in await cursor.fetchall()]

    async def _read_into(
        self, queue: asyncio.Queue[_Batch | None], cursors: list[int], heads: list[int]
    ) -> None:
        try:
            async with self._pool.connection(timeout=CONNECT_S) as connection:
                async for batch in self._batches(connection, cursors, heads):
                    await queue.put(batch)
        except Exception:
            await queue.put(None)  # whoever waits then finds the failure in this task
            raise
        await queue.put(None)

    async def _batches(
        self, connection: Connection, cursors: list[int], heads: list[int]
    ) -> AsyncIterator[_Batch]:
        """Records from the cursors to the heads, shard by shard, each batch with the cursors after it."""
        rows: list[StoredEvent] = []
        for shard in range(SHARDS):
            while cursors[shard] < heads[shard]:
                room = BATCH_MAX - len(rows)
                arguments = (self._personal, shard, cursors[shard], heads[shard], self._ignored, room)
                with self._deadline(connection, STEP_S):
                    cursor = await connection.execute(_READ, arguments, binary=True)
                    found = await cursor.fetchall()
                rows += [StoredEvent(*row) for row in found]
                cursors[shard] = rows[-1].position if len(found) == room else heads[shard]
                if len(rows) >= BATCH_MAX:
                    yield _Batch(await self._records.open_some(rows, self._personal), cursors.copy())
                    rows = []
        yield _Batch(await self._records.open_some(rows, self._personal), cursors.copy())

    async def _apply(self, batch: _Batch) -> None:
        before = [work.waiting.copy() for work in self._works]
        parked: list[Parked] = []
        try:
            with self._deadline(self._writer, STEP_S):
                async with self._writer.transaction():
                    await checkpoints.plan_by_key(self._writer)
                    for work in self._works:
                        parked += (await apply(self._writer, work, batch.records))[1]
        except BatchRefused:
            parked = []
            for work, waiting in zip(self._works, before, strict=True):
                work.waiting = waiting
            with self._deadline(self._writer, INDEX_S):
                async with self._writer.transaction():
                    await checkpoints.plan_by_key(self._writer)
                    for work in self._works:
                        parked += (await apply_one_by_one(self._writer, work, batch.records))[1]
        self._note(parked)
        self._move(batch.cursors)

    def _note(self, parked: Sequence[Parked]) -> None:
        for each in parked:
            self._parked[each.projection, each.stream_id] = each

    def _move(self, cursors: list[int]) -> None:
        self._cursors = cursors
        for work in self._works:
            work.positions = cursors.copy()


async def _script(connection: Connection, script: str) -> None:
    for statement in script.split(";\n"):
        if statement.strip():
            await connection.execute(sql.SQL(statement.rstrip().rstrip(";")))
