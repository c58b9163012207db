"""What the database knows of everybody's work, in Prometheus: true whichever processes live.

One process of the layout is enough to look; where several do, they see the same, and `max` of them is meant.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import psycopg
from prometheus_client import CollectorRegistry, Gauge
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from adapters.postgres.pool import deadline
from projections.catalogue import PROJECTIONS
from schemas.topics import LOG, PROCESSORS, work_topic
from stream_processors.sweeper import DEAD_AFTER_S

log_of = logging.getLogger(__name__)

LOOK_S: Final = 5.0
LOOK_LIMIT_S: Final = 4.0
LEASES = ("relay", "projector")
TOPICS = (LOG.name, *(work_topic(processor).name for processor in PROCESSORS))
OUTAGE = (psycopg.Error, PoolTimeout, OSError, TimeoutError)

_EVENTS = "SELECT sum(head)::bigint FROM shard"
_PROJECTION_LAG = """
    SELECT c.projection, sum(greatest(0, s.head - coalesce(c.positions[s.shard + 1], 0)))::bigint
      FROM checkpoint c CROSS JOIN shard s GROUP BY 1
"""
# A topic of which no relay knows yet is none that it writes to; the log itself always is one.
_TOPIC_LAG = """
    SELECT t.topic, sum(greatest(0, s.head - coalesce(m.position, 0)))::bigint
      FROM unnest(%s::text[]) t(topic) CROSS JOIN shard s
      LEFT JOIN relay_mark m ON m.topic = t.topic AND m.shard = s.shard
     WHERE t.topic = %s OR EXISTS (SELECT FROM relay_mark k WHERE k.topic = t.topic) GROUP BY 1
"""
_PROJECTION_PARKED = "SELECT projection, count(*) FROM parked GROUP BY 1"
_PROCESSOR_PARKED = "SELECT processor, count(*) FROM parked_record GROUP BY 1"
_LEASES = """
    SELECT split_part(name, '/', 1), count(*) FROM lease
     WHERE holder <> '' AND expires_at > clock_timestamp() GROUP BY 1
"""
_OVERDUE = """
    SELECT coalesce(extract(epoch FROM clock_timestamp() - min(due_at)), 0)::float8
      FROM due WHERE due_at < clock_timestamp()
"""
_WORKERS = "SELECT count(*) FROM worker WHERE beat_at > clock_timestamp() - make_interval(secs => %s)"

Connection = psycopg.AsyncConnection[Any]
Pool = AsyncConnectionPool[Any]


class StoreMetrics:
    """`run` looks until cancelled; gauges keep what was seen last, and say when that was."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"oshaani_{name}", text, labels, registry=registry)

        self._looked = gauge("store_looked_timestamp_seconds", "When the database was last looked at.")
        self._events = gauge("log_events", "Events in the log.")
        self.topic_lag = gauge(
            "topic_lag_events", "Events of the log that a topic does not have yet.", "topic"
        )
        self.projection_lag = gauge(
            "projection_lag_events", "Events of the log that a read model has not applied.", "projection"
        )
        self._projection_parked = gauge(
            "projection_parked_streams", "Streams that a read model cannot go on with.", "projection"
        )
        self._processor_parked = gauge(
            "processor_parked_streams", "Streams that a processor cannot go on with.", "processor"
        )
        self._leases = gauge("leases", "Leases that somebody holds, by kind.", "kind")
        self._overdue = gauge(
            "overdue_work_seconds",
            "By how much the oldest due work is overdue, in seconds; 0 when none is.",
        )
        self._workers = gauge("workers_alive", "Worker processes that were heard of lately.")
        # Every series is there from the start, so that its first increase is seen.
        self._fill(self._projection_parked, _zero(each.name for each in PROJECTIONS))
        self._fill(self._processor_parked, _zero(PROCESSORS))
        self._fill(self._leases, _zero(LEASES))

    async def run(self, pool: Pool) -> None:
        """Look every few seconds, until cancelled; survives any outage of the database."""
        while True:
            try:
                await self.look(pool)
            except OUTAGE as failure:
                log_of.info("the database could not be looked at: %r", failure)
            await asyncio.sleep(LOOK_S)

    async def look(self, pool: Pool) -> None:
        """Look once.

        Raises:
            psycopg.Error, PoolTimeout, OSError: the database failed; the gauges are as they were, or partly new.
        """
        async with pool.connection(timeout=LOOK_LIMIT_S) as connection:
            with deadline(connection, LOOK_LIMIT_S):
                self._events.set(await _number(connection, _EVENTS))
                self._fill(self.topic_lag, await _numbers(connection, _TOPIC_LAG, list(TOPICS), LOG.name))
                self._fill(
                    self._processor_parked, _zero(PROCESSORS) | await _numbers(connection, _PROCESSOR_PARKED)
                )
                self._fill(self._leases, _zero(LEASES) | await _numbers(connection, _LEASES))
                self._overdue.set(await _number(connection, _OVERDUE))
                self._workers.set(await _number(connection, _WORKERS, DEAD_AFTER_S))
                await self._look_at_read_models(connection)
        self._looked.set(time.time())

    async def _look_at_read_models(self, connection: Connection) -> None:
        try:
            self._fill(self.projection_lag, await _numbers(connection, _PROJECTION_LAG))
            names = _zero(each.name for each in PROJECTIONS)
            self._fill(self._projection_parked, names | await _numbers(connection, _PROJECTION_PARKED))
        except psycopg.errors.UndefinedTable:
            pass  # the first projector makes these tables

    def _fill(self, gauge: Gauge, values: Mapping[str, float]) -> None:
        gauge.clear()
        for label, value in values.items():
            gauge.labels(label).set(value)


def _zero(names: Iterable[str]) -> dict[str, float]:
    return dict.fromkeys(names, 0.0)


async def _number(connection: Connection, query: str, *arguments: object) -> float:
    row = await (await connection.execute(query.encode(), arguments)).fetchone()
    return float(row[0]) if row is not None and row[0] is not None else 0.0


async def _numbers(connection: Connection, query: str, *arguments: object) -> dict[str, float]:
    rows = await (await connection.execute(query.encode(), arguments)).fetchall()
    return {str(name): float(value) for name, value in rows}
