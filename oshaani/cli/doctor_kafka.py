"""What `oshaani doctor` finds around Kafka: the broker, its topics, who carries the log there, and how far readers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from adapters.kafka.admin import group_lags, show
from adapters.kafka.clients import KafkaConfig
from adapters.kafka.faults import KafkaUnavailable
from adapters.postgres.pool import READ_PLANS, connect, deadline
from oshaani.cli.findings import Finding, fail, ok, warn
from oshaani.settings import Settings
from oshaani.wiring import LAG_MAX
from schemas.topics import PROCESSORS, group_of, work_topic

EXAMINE_S = 10.0
START = "start `oshaani up --kafka`, or the missing roles"

_LEASES = """
    SELECT name, holder, extract(epoch FROM expires_at - clock_timestamp())::float8 FROM lease WHERE holder <> ''
     ORDER BY name
"""
_RELAY_LAG = """
    SELECT m.topic, sum(s.head - m.position)::bigint FROM relay_mark m JOIN shard s USING (shard)
     GROUP BY m.topic ORDER BY 2 DESC, 1 LIMIT 1
"""
_PARKED = "SELECT processor, count(*) FROM parked_record GROUP BY processor ORDER BY processor"
RELAY, PROJECTOR = "relay/", "projector"


async def examine(config: KafkaConfig, settings: Settings, is_running: bool) -> list[Finding]:
    """What the cluster says. `is_running`: a server is expected to keep up with it."""
    where = ", ".join(config.bootstrap_servers)
    try:
        states = await show(config, partitions=settings.kafka_partitions)
        lags = await group_lags(config, {group_of(each): work_topic(each).name for each in PROCESSORS})
    except KafkaUnavailable as fault:
        fix = "start it, or mend KAFKA_BOOTSTRAP_SERVERS; commands are taken and turns go on meanwhile"
        return [fail("kafka", str(fault), fix)]
    found = [ok("kafka", f"answers at {where}")]
    differing = [f"{state.topic}: {', '.join(state.differences)}" for state in states if state.differences]
    if differing:
        found.append(fail("topics", "; ".join(differing), "run `oshaani topics apply`"))
    else:
        found.append(ok("topics", f"{len(states)}, as they should be"))
    return found + [_group(each, lags, is_running) for each in PROCESSORS]


async def examine_roles(dsn: str, is_running: bool) -> list[Finding]:
    """Who relays and who projects, how far the relay is, and what waits for an operator, as the database knows it."""
    connection = await connect(dsn, READ_PLANS)
    async with connection:
        with deadline(connection, EXAMINE_S):
            leases = await _rows(connection, _LEASES)
            lag = await _rows(connection, _RELAY_LAG)
            parked = await _rows(connection, _PARKED)
    return [
        _holders("relay", [lease for lease in leases if lease[0].startswith(RELAY)], is_running),
        _relay_lag(lag, is_running),
        _holders("projector", [lease for lease in leases if lease[0] == PROJECTOR], is_running),
        _parked(parked),
    ]


def _group(processor: str, lags: Sequence[Any], is_running: bool) -> Finding:
    own = [lag for lag in lags if lag.group == group_of(processor)]
    total = sum(lag.lag for lag in own)
    behind = ", ".join(f"{lag.partition}: {lag.lag}" for lag in own if lag.lag)
    name = f"lag of {processor}"
    if not total:
        return ok(name, "level with its topic")
    detail = f"{total} records (by partition {behind})"
    if not is_running:
        return warn(name, detail, f"{START}: it goes on where it stopped")
    if total > LAG_MAX:
        return fail(name, detail, f"look at `oshaani processor {processor}`, or start more of it")
    return ok(name, detail)


def _holders(role: str, leases: Sequence[Any], is_running: bool) -> Finding:
    alive = sorted({holder.partition("/")[0] for _, holder, left_s in leases if left_s > 0})
    if alive:
        return ok(role, f"{len(leases)} leases, held by {', '.join(alive)}")
    if is_running:
        return fail(role, "nobody holds its leases", f"start `oshaani {role}`")
    return warn(role, "nobody holds its leases", START)


def _relay_lag(rows: Sequence[Any], is_running: bool) -> Finding:
    if not rows or rows[0][1] == 0:
        return ok("relay lag", "every topic has all of the log")
    topic, lag = rows[0]
    detail = f"{topic} lacks {lag} events of the log"
    if is_running and lag > LAG_MAX:
        return fail("relay lag", detail, "look at the log of `oshaani relay`")
    return ok("relay lag", detail) if is_running else warn("relay lag", detail, START)


def _parked(rows: Sequence[Any]) -> Finding:
    if not rows:
        return ok("parked records", "none")
    detail = ", ".join(f"{count} of {processor}" for processor, count in rows)
    fix = "see `oshaani parked list`, then `oshaani parked retry` or `skip`"
    return fail("parked records", f"streams wait: {detail}", fix)


async def _rows(connection: psycopg.AsyncConnection[Any], query: str) -> list[Any]:
    cursor = await connection.execute(query.encode())
    return await cursor.fetchall()
