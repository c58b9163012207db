"""What `oshaani doctor` asks the database: itself, how far its readers are, and what waits for somebody."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg

from adapters.crypto import MASTER_KEY_ID_BYTES, MasterKey
from adapters.postgres.pool import READ_PLANS, connect, deadline
from oshaani.cli.findings import Finding, fail, ok, warn
from oshaani.processor_host import READER
from oshaani.wiring import LAG_MAX
from stream_processors.sweeper import DEAD_AFTER_S

EXAMINE_S = 10.0
VERSION_MIN = 150_000  # PostgreSQL 15
OVERDUE_S = 30.0
SKEW_WARN_S, SKEW_FAIL_S = 2.0, 30.0
SAFE_SETTINGS = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
START = "start `oshaani up`"

Connection = psycopg.AsyncConnection[Any]

_LAG = """
    SELECT c.projection, sum(greatest(0, s.head - coalesce(c.positions[s.shard + 1], 0)))::bigint
      FROM checkpoint c CROSS JOIN shard s GROUP BY c.projection ORDER BY 2 DESC, 1
"""
_READER_LAG = """
    SELECT coalesce(sum(greatest(0, s.head - coalesce(r.position, 0))), 0)::bigint
      FROM shard s LEFT JOIN reader r ON r.shard = s.shard AND r.reader = %s
"""
_OVERDUE = """
    SELECT count(*), extract(epoch FROM max(clock_timestamp() - due_at))::float8
      FROM due WHERE due_at < clock_timestamp() - make_interval(secs => %s)
"""
_WORKERS = """
    SELECT worker, extract(epoch FROM clock_timestamp() - beat_at)::float8 FROM worker ORDER BY beat_at DESC LIMIT 50
"""

_KEY_IDS = """
    SELECT substring(wrapped FROM 1 FOR %s), count(*) FROM data_key WHERE wrapped IS NOT NULL GROUP BY 1
"""


async def examine(
    dsn: str, is_running: bool, key: bytes | None, *, is_embedded: bool = True
) -> list[Finding]:
    """Everything the database can tell. `is_running`: a server is expected to keep up with it.

    `key` is the master key, as far as there is one. `is_embedded`: processors read the log itself.

    Raises:
        psycopg.OperationalError, OSError, TimeoutError: it cannot be reached.
    """
    connection = await connect(dsn, READ_PLANS)
    async with connection:
        with deadline(connection, EXAMINE_S):
            found = [await _itself(connection), *await _durability(connection), await _clock(connection)]
            row = await _row(
                connection, "SELECT to_regclass('oshaani.event'), to_regclass('oshaani.checkpoint')"
            )
            if row[0] is None:
                return [*found, fail("tables", "they are not there", "run `oshaani migrate`")]
            found += [await _log(connection), *await _sealed_with(connection, key)]
            if row[1] is None:
                return [*found, warn("read models", "not built yet", START)]
            found += [await _read_models(connection, is_running), await _parked(connection)]
            if is_embedded:
                found.append(await _processors(connection, is_running))
            return [*found, await _due(connection, is_running), await _workers(connection, is_running)]


async def _itself(connection: Connection) -> Finding:
    number, version, encoding, replica = await _row(
        connection,
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'),"
        " current_setting('server_encoding'), pg_is_in_recovery()",
    )
    if number < VERSION_MIN:
        return fail("database", f"PostgreSQL {version}", "use PostgreSQL 15 or newer")
    if encoding != "UTF8":
        return fail("database", f"its encoding is {encoding}", "make the database with ENCODING 'UTF8'")
    if replica:
        return fail("database", "it is a read-only replica", "name the primary in DATABASE_URL")
    return ok("database", f"PostgreSQL {version}")


async def _durability(connection: Connection) -> list[Finding]:
    """Settings without which a power failure loses what was acknowledged."""
    cursor = await connection.execute(
        "SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", (list(SAFE_SETTINGS),)
    )
    unsafe = [f"{name} = {value}" for name, value in await cursor.fetchall() if value != SAFE_SETTINGS[name]]
    if not unsafe:
        return []
    return [warn("durability", ", ".join(unsafe), "set them back to 'on': a power failure would lose data")]


async def _clock(connection: Connection) -> Finding:
    before, began_s = datetime.now(UTC), time.monotonic()
    (there,) = await _row(connection, "SELECT clock_timestamp()")
    half_s = (time.monotonic() - began_s) / 2
    skew_s = abs((there - before).total_seconds() - half_s)
    detail = f"this machine and the database differ by {skew_s:.3f} s"
    if skew_s <= SKEW_WARN_S:
        return ok("clock", detail)
    fix = "have both clocks follow the same time server (NTP)"
    return fail("clock", detail, fix) if skew_s > SKEW_FAIL_S else warn("clock", detail, fix)


async def _log(connection: Connection) -> Finding:
    events, shards = await _row(
        connection, "SELECT sum(head)::bigint, count(*) FILTER (WHERE head > 0) FROM shard"
    )
    (size,) = await _row(connection, "SELECT pg_size_pretty(pg_database_size(current_database()))")
    return ok("log", f"{events} events in {shards} shards; the database has {size}")


async def _sealed_with(connection: Connection, key: bytes | None) -> list[Finding]:
    """Whether our master key is the one that everything is sealed with."""
    cursor = await connection.execute(_KEY_IDS, (MASTER_KEY_ID_BYTES,))
    counts = {bytes(key_id): count for key_id, count in await cursor.fetchall()}
    if not counts or key is None:
        return []
    foreign = sum(count for key_id, count in counts.items() if key_id != MasterKey(key).id)
    if not foreign:
        return [ok("data keys", f"{sum(counts.values())}, all wrapped by our master key")]
    detail = f"{foreign} of {sum(counts.values())} data keys are wrapped by another master key"
    return [fail("data keys", detail, "give back the master key that was used before")]


async def _read_models(connection: Connection, is_running: bool) -> Finding:
    cursor = await connection.execute(_LAG)
    behind = [(name, lag) for name, lag in await cursor.fetchall() if lag]
    if not behind:
        return ok("read models", "level with the log")
    detail = ", ".join(f"{name} {lag} events behind" for name, lag in behind)
    if not is_running:
        return warn("read models", detail, f"{START}: it brings them up to date")
    if behind[0][1] > LAG_MAX:
        return fail("read models", detail, "look for errors of the projector in the server's log")
    return ok("read models", detail)


async def _parked(connection: Connection) -> Finding:
    (shown,) = await _row(connection, "SELECT count(*) FROM parked")
    (worked,) = await _row(connection, "SELECT count(*) FROM parked_record")
    if not shown and not worked:
        return ok("parked streams", "none")
    detail = f"{shown} wait for a read model, {worked} for a processor that could not handle an event"
    return fail("parked streams", detail, "see `oshaani parked list`, then `oshaani parked retry` or `skip`")


async def _processors(connection: Connection, is_running: bool) -> Finding:
    (lag,) = await _row(connection, _READER_LAG, (READER,))
    detail = f"{lag} records not finished"
    if lag == 0:
        return ok("processors", "level with the log")
    if not is_running:
        return warn("processors", detail, f"{START}: it goes on where it stopped")
    if lag > LAG_MAX:
        return fail("processors", detail, "look for failing processors in the server's log")
    return ok("processors", detail)


async def _due(connection: Connection, is_running: bool) -> Finding:
    count, oldest_s = await _row(connection, _OVERDUE, (OVERDUE_S,))
    if not count:
        return ok("due work", "nothing overdue")
    detail = f"{count} pieces of work overdue, the oldest by {oldest_s:.0f} s"
    if not is_running:
        return warn("due work", detail, f"{START}: it takes them up")
    return fail("due work", detail, "look for errors of the sweeper in the server's log")


async def _workers(connection: Connection, is_running: bool) -> Finding:
    cursor = await connection.execute(_WORKERS)
    rows: Sequence[tuple[str, float]] = await cursor.fetchall()
    alive = [name for name, silent_s in rows if silent_s <= DEAD_AFTER_S]
    if alive:
        return ok("workers", f"{len(alive)} alive: {', '.join(name.partition('/')[0] for name in alive)}")
    last = f"the last was heard of {rows[0][1]:.0f} s ago" if rows else "none was ever seen"
    if is_running:
        return fail("workers", f"none alive; {last}", "restart the server")
    return warn("workers", f"none alive; {last}", START)


async def _row(connection: Connection, query: str, arguments: Sequence[object] = ()) -> tuple[Any, ...]:
    cursor = await connection.execute(query.encode(), arguments)
    row: tuple[Any, ...] | None = await cursor.fetchone()
    assert row is not None
    return row
