"""The event log on PostgreSQL: one SQL call per append, dense positions by a locked row per shard.

psycopg 3, autocommit, prepared statements; no pipeline mode, no LISTEN/NOTIFY, no advisory locks, no sequences.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from importlib.resources import files
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from adapters.postgres import rows
from adapters.postgres.arrays import (
    BigintArray,
    SmallintArray,
    UuidArray,
    bigints,
    instant_of,
    numbers_of,
    smallints,
    uuids,
)
from adapters.postgres.pool import LOG_PLANS, SCHEMA, connect, deadline, open_pool
from adapters.postgres.prepared import PreparedCall
from domain.event_log import (
    STREAM_EVENTS_MAX,
    SYNC_EVENTS_MAX,
    Batch,
    CommandRow,
    CommandSeen,
    DueRow,
    HeadMoved,
    LogUnavailable,
    Snapshot,
    StoredEvent,
    Streams,
    Synced,
)
from domain.ids import shard_of

Connection = psycopg.AsyncConnection[Any]

CALL_S = 4.0  # what one call of the log may take before its connection is cut
FREE_S = 1.5  # for a connection; without a database there is none, and whoever asks is told soon
READERS = 3
# The types of heads and streams; the server knows those of the rows from the function.
_APPEND_TYPES = (
    *(SmallintArray.type_oid, BigintArray.type_oid, BigintArray.type_oid),
    *(0, 0, 0),
    UuidArray.type_oid,
)
_ROW_TYPES = "SELECT 'new_event'::regtype::oid, 'new_command'::regtype::oid, 'due_change'::regtype::oid"
_HEADS = "SELECT shard, head FROM shard WHERE shard = ANY (%b) ORDER BY shard"
_EVENT_COLUMNS = (
    "shard, position, tenant_id, stream_id, stream_version, type, schema_version, payload, personal, subject_id,"
    " command_id, correlation_id, causation_id, actor, traceparent, recorded_at"
)
# Heads, newer events, snapshots and streams in one statement see one instant. Each LIMIT is there to make the planner
# look up what is asked for, whatever it believes about the tables: without one it may join with all of a shard's events.
# Kind 0: a head; 1: newer; 2: the snapshot of a stream (its schema as `type`, its state as `payload`); 3: of a stream.
_SYNC = f"""
    SELECT 0 AS what, s.shard, s.head AS position, NULL::uuid AS tenant_id, NULL::uuid AS stream_id,
           NULL::integer AS stream_version, NULL AS type, NULL::smallint AS schema_version, NULL::bytea AS payload,
           NULL::bytea AS personal, NULL::uuid AS subject_id, NULL::uuid AS command_id, NULL::uuid AS correlation_id,
           NULL::uuid AS causation_id, NULL AS actor, NULL AS traceparent, NULL::timestamptz AS recorded_at
      FROM shard s WHERE s.shard = ANY (%b)
    UNION ALL
    SELECT 1, e.* FROM unnest(%b, %b) h(shard, head)
      JOIN shard s ON s.shard = h.shard AND s.head > h.head AND s.head - h.head <= {SYNC_EVENTS_MAX}
     CROSS JOIN LATERAL (SELECT {_EVENT_COLUMNS} FROM event
                          WHERE shard = h.shard AND position > h.head
                          ORDER BY position LIMIT {SYNC_EVENTS_MAX}) e
    UNION ALL
    SELECT 2, n.shard, 0, n.tenant_id, n.stream_id, n.stream_version, n.schema, 0, n.state, NULL, NULL, NULL, NULL,
           NULL, NULL, NULL, NULL
      FROM unnest(%b, %b) w(shard, stream_id)
     CROSS JOIN LATERAL (SELECT * FROM snapshot WHERE shard = w.shard AND stream_id = w.stream_id LIMIT 1) n
    UNION ALL
    SELECT 3, e.* FROM unnest(%b, %b) w(shard, stream_id)
      LEFT JOIN LATERAL (SELECT stream_version FROM snapshot
                          WHERE shard = w.shard AND stream_id = w.stream_id LIMIT 1) n ON true
     CROSS JOIN LATERAL (SELECT {_EVENT_COLUMNS} FROM event
                          WHERE shard = w.shard AND stream_id = w.stream_id
                            AND stream_version > coalesce(n.stream_version, 0)
                          ORDER BY stream_version LIMIT {STREAM_EVENTS_MAX}) e
     ORDER BY what, shard, position
"""
_COMMANDS = """
    SELECT c.shard, c.command_id, c.tenant_id, c.type, c.actor, c.digest, c.outcome, c.remembered, c.position, c.result
      FROM unnest(%b, %b) k(shard, id)
     CROSS JOIN LATERAL (SELECT * FROM command WHERE shard = k.shard AND command_id = k.id LIMIT 1) c
"""
_READ_AFTER = f"""
    SELECT e.* FROM unnest(%b, %b) c(shard, position)
      JOIN shard s ON s.shard = c.shard AND s.head > c.position
     CROSS JOIN LATERAL (SELECT {_EVENT_COLUMNS} FROM event
                          WHERE shard = c.shard AND position > c.position ORDER BY position LIMIT %b) e
     ORDER BY e.shard, e.position LIMIT %b
"""
_READ_STREAM = f"""
    SELECT * FROM (SELECT {_EVENT_COLUMNS} FROM event WHERE shard = %b AND stream_id = %b
                    ORDER BY stream_version DESC LIMIT %b) e ORDER BY stream_version
"""
_READ_STREAM_AFTER = f"""
    SELECT {_EVENT_COLUMNS} FROM event WHERE shard = %b AND stream_id = %b AND stream_version > %b
     ORDER BY stream_version LIMIT %b
"""
_SAVE_SNAPSHOT = """
    INSERT INTO snapshot AS s VALUES (%b, %b, %b, %b, %b, %b)
        ON CONFLICT (shard, stream_id) DO UPDATE
       SET stream_version = excluded.stream_version, schema = excluded.schema, state = excluded.state
     WHERE excluded.schema <> s.schema OR excluded.stream_version > s.stream_version
"""
_BEAT = """
    INSERT INTO worker VALUES (%b, clock_timestamp()) ON CONFLICT (worker) DO UPDATE SET beat_at = clock_timestamp()
"""
# A row needs somebody when its time has come, or when the worker that claimed it is dead: silent for too long, unknown,
# or an earlier life of the asking slot.
_DUE = """
    SELECT d.kind, d.id, d.stream_id, d.tenant_id, d.claimed_by FROM due d
      LEFT JOIN worker w ON w.worker = d.claimed_by
     WHERE d.kept_until <= clock_timestamp()
       AND (d.due_at <= clock_timestamp()
            OR (d.claimed_by <> '' AND d.claimed_by <> %b
                AND (w.beat_at IS NULL OR w.beat_at < clock_timestamp() - make_interval(secs => %b)
                     OR split_part(d.claimed_by, '/', 1) = split_part(%b, '/', 1))))
     ORDER BY d.due_at LIMIT %b
"""
_CLAIM_DUE = """
    UPDATE due SET kept_until = %b WHERE shard = %b AND id = %b AND claimed_by = %b AND kept_until <= clock_timestamp()
           AND (due_at <= clock_timestamp() OR claimed_by <> '') RETURNING 1
"""
_SAVE_CURSOR = """
    INSERT INTO reader SELECT %b, c.* FROM unnest(%b, %b) c(shard, position)
        ON CONFLICT (reader, shard) DO UPDATE SET position = greatest(reader.position, excluded.position)
"""


class PostgresEventLog:
    """Implements `domain.event_log.EventLog`. Open it before use; it reconnects by itself after a failure."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._writer: _Writer | None = None
        self._writing = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._pool: AsyncConnectionPool[Any] | None = None

    async def open(self) -> None:
        """Connect; `migrate` must have been run once on the database."""
        self._pool = await self._stack.enter_async_context(open_pool(self._dsn, READERS, LOG_PLANS))

    async def close(self) -> None:
        """Let go of all connections."""
        await self._drop_writer()
        await self._stack.aclose()

    async def migrate(self) -> None:
        """Create what is not there yet; safe to run again and by several processes at once."""
        await run_script(self._dsn, files(__package__).joinpath("event_log.sql").read_text())

    # --- writing

    async def append(self, batch: Batch) -> datetime:
        """As in `EventLog`."""
        async with self._writing:
            writer = await self._open_writer()
            try:
                with deadline(writer.connection, CALL_S):
                    return await writer.append(batch)
            except (HeadMoved, CommandSeen, psycopg.DataError):
                raise
            except BaseException as failure:
                await self._drop_writer()
                if isinstance(failure, (psycopg.Error, OSError)):
                    raise LogUnavailable(str(failure)) from failure
                raise

    @asynccontextmanager
    async def locked(self, shards: Sequence[int]) -> AsyncIterator[_Writer]:
        """As in `EventLog`."""
        async with self._writing:
            writer = await self._open_writer()
            try:
                with deadline(writer.connection, CALL_S):
                    async with writer.connection.transaction():
                        query = "SELECT 1 FROM shard WHERE shard = ANY (%b) ORDER BY shard FOR UPDATE"
                        await writer.connection.execute(query, (smallints(shards),))
                        yield writer
            except BaseException as failure:
                # Also after a refusal: with the rollback psycopg forgets what was prepared on the connection.
                await self._drop_writer()
                unreachable = isinstance(failure, (psycopg.Error, OSError))
                if unreachable and not isinstance(failure, psycopg.DataError):
                    raise LogUnavailable(str(failure)) from failure
                raise

    # --- reading

    async def sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        """As in `EventLog`."""
        async with self._reader() as connection:
            return await _sync(connection, heads, streams)

    async def commands(self, ids: Sequence[tuple[int, UUID]]) -> dict[UUID, CommandRow]:
        """As in `EventLog`."""
        arguments = (smallints([shard for shard, _ in ids]), uuids([id for _, id in ids]))
        return {row[1]: CommandRow(*row) for row in await self._fetch(_COMMANDS, arguments)}

    async def read_after(self, cursors: Mapping[int, int], limit: int) -> list[StoredEvent]:
        """As in `EventLog`."""
        arguments = (smallints(list(cursors)), bigints(list(cursors.values())), limit, limit)
        return [StoredEvent(*row) for row in await self._fetch(_READ_AFTER, arguments)]

    async def read_stream(self, shard: int, stream_id: UUID, last: int) -> list[StoredEvent]:
        """As in `EventLog`."""
        return [StoredEvent(*row) for row in await self._fetch(_READ_STREAM, (shard, stream_id, last))]

    async def read_stream_after(
        self, shard: int, stream_id: UUID, version: int, limit: int
    ) -> list[StoredEvent]:
        """As in `EventLog`."""
        rows = await self._fetch(_READ_STREAM_AFTER, (shard, stream_id, version, limit))
        return [StoredEvent(*row) for row in rows]

    async def save_snapshot(self, snapshot: Snapshot) -> None:
        """As in `EventLog`."""
        async with self._reader() as connection:
            await connection.execute(_SAVE_SNAPSHOT, snapshot)

    async def heads(self) -> dict[int, int]:
        """As in `EventLog`."""
        return dict(await self._fetch("SELECT shard, head FROM shard", ()))

    # --- who works, and what is due

    async def beat(self, worker: str) -> None:
        """As in `EventLog`."""
        async with self._reader() as connection:
            await connection.execute(_BEAT, (worker,))

    async def due(self, worker: str, limit: int, dead_after_s: float) -> list[DueRow]:
        """As in `EventLog`."""
        rows = await self._fetch(_DUE, (worker, float(dead_after_s), worker, limit))
        return [DueRow(*row) for row in rows]

    async def claim_due(self, row: DueRow, worker: str, until: datetime) -> bool:
        """As in `EventLog`."""
        arguments = (until, shard_of(row.tenant_id), row.id, row.lost_worker)
        return bool(await self._fetch(_CLAIM_DUE, arguments))

    async def cursor(self, reader: str) -> dict[int, int]:
        """As in `EventLog`."""
        return dict(await self._fetch("SELECT shard, position FROM reader WHERE reader = %b", (reader,)))

    async def save_cursor(self, reader: str, positions: Mapping[int, int]) -> None:
        """As in `EventLog`."""
        arguments = (reader, smallints(list(positions)), bigints(list(positions.values())))
        async with self._reader() as connection:
            await connection.execute(_SAVE_CURSOR, arguments)

    # --- inside

    async def _fetch(self, query: LiteralString, arguments: Sequence[Any]) -> list[Any]:
        async with self._reader() as connection:
            cursor = await connection.execute(query, arguments, binary=True)
            return await cursor.fetchall()

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Connection]:
        assert self._pool is not None, "open() the log first"
        try:
            async with self._pool.connection(timeout=FREE_S) as connection:
                with deadline(connection, CALL_S):
                    yield connection
        except (psycopg.Error, PoolTimeout, OSError) as failure:
            raise LogUnavailable(str(failure)) from failure

    async def _open_writer(self) -> _Writer:
        if self._writer is None or self._writer.connection.closed:
            try:
                self._writer = await _writer(self._dsn)
            except (psycopg.Error, OSError, TimeoutError) as failure:
                raise LogUnavailable(str(failure)) from failure
        return self._writer

    async def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.connection.close()


class RowTypes(NamedTuple):
    """What this database calls the types of an append's rows."""

    event: int
    command: int
    due: int


class _Writer:
    """The one connection that appends; implements `LockedLog` while a transaction of it holds shards."""

    def __init__(self, connection: Connection, types: RowTypes) -> None:
        self.connection, self._types = connection, types
        self._append = PreparedCall(connection, "append", _APPEND_TYPES)

    async def sync(self, heads: Mapping[int, int], streams: Streams) -> Synced:
        return await _sync(self.connection, heads, streams)

    async def append(self, batch: Batch) -> datetime:
        try:
            told = await self._append(_arguments(batch, self._types))
        except psycopg.Error as error:
            if error.sqlstate == "OS001":
                raise HeadMoved from error
            if error.sqlstate == "OS002":
                raise CommandSeen from error
            if isinstance(error, psycopg.errors.UniqueViolation):
                # A stream that was thought new exists: what was known of the shard is wrong as with a moved head.
                raise HeadMoved from error
            raise
        assert told is not None, "append returns the time of record"
        at, *moved = numbers_of(told)
        if moved:
            batch.move_on(dict(zip(sorted(batch.heads), moved, strict=True)))
        return instant_of(at)


async def _writer(dsn: str) -> _Writer:
    connection = await connect(dsn)
    try:
        with deadline(connection, CALL_S):
            row = await (await connection.execute(_ROW_TYPES)).fetchone()
    except BaseException:
        await connection.close()
        raise
    assert row is not None
    return _Writer(connection, RowTypes(*row))


async def run_script(dsn: str, script: str) -> None:
    """Run DDL in our schema, one process at a time."""
    try:
        async with await psycopg.AsyncConnection.connect(
            dsn, autocommit=True, connect_timeout=5
        ) as connection:
            with deadline(connection, 30):
                async with connection.transaction():
                    schema = sql.Identifier(SCHEMA)
                    await connection.execute("SELECT pg_advisory_xact_lock(hashtext('oshaani migrate'))")
                    await connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema))
                    await connection.execute(sql.SQL("SET LOCAL search_path = {}").format(schema))
                    await connection.execute(sql.SQL(script))
    except (psycopg.OperationalError, OSError) as failure:
        raise LogUnavailable(str(failure)) from failure


def _arguments(batch: Batch, types: RowTypes) -> tuple[bytes | None, ...]:
    shards = sorted(batch.heads)
    counts = dict.fromkeys(shards, 0)
    for event in batch.events:
        counts[event.shard] += 1
    # Commands decided together may change the same row; the last one counts.
    last_due = {(change.shard, change.id.int): change for change in batch.due}
    return (
        smallints(shards).encoded,
        bigints([batch.heads[shard] for shard in shards]).encoded,
        bigints(list(counts.values())).encoded,
        rows.events(types.event, batch.events),
        rows.commands(types.command, batch.commands),
        rows.due_changes(types.due, list(last_due.values())),
        None if batch.based_on is None else uuids(list(batch.based_on)).encoded,
    )


async def _sync(connection: Connection, heads: Mapping[int, int], streams: Streams) -> Synced:
    shards = sorted({*heads, *(shard for shard, _ in streams)})
    wanted = smallints([shard for shard, _ in streams]), uuids([stream_id for _, stream_id in streams])
    arguments = (
        smallints(shards),
        smallints(list(heads)),
        bigints(list(heads.values())),
        *wanted,
        *wanted,
    )
    cursor = await connection.execute(_SYNC, arguments, binary=True)
    found = Synced({}, [], {stream_id: [] for _, stream_id in streams})
    for what, *row in await cursor.fetchall():
        if what == 0:
            found.heads[row[0]] = row[1]
        elif what == 1:
            found.newer.append(StoredEvent(*row))
        elif what == 2:
            found.snapshots[row[3]] = Snapshot(row[0], row[3], row[4], row[2], row[5], row[7])
        else:
            found.streams[row[3]].append(StoredEvent(*row))
    return found
