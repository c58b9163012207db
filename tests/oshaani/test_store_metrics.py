from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from prometheus_client import CollectorRegistry
from psycopg_pool import AsyncConnectionPool

from adapters.postgres.leases import PostgresLeases
from adapters.postgres.parked_records import PostgresParkedRecords
from adapters.postgres.pool import open_pool
from domain.leases import Mark
from domain.parked import Stuck
from oshaani.store_metrics import StoreMetrics
from oshaani.wiring import migrate
from projections import checkpoints
from schemas.topics import LOG, work_topic


@dataclass
class Seen:
    """A prepared database, and what is seen of it."""

    pool: AsyncConnectionPool[Any]
    metrics: StoreMetrics
    registry: CollectorRegistry

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"oshaani_{name}", labels)

    async def do(self, statement: str) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(statement.encode())


@pytest.fixture
async def seen(database_url: str) -> AsyncIterator[Seen]:
    await migrate(database_url)
    async with open_pool(database_url, 2) as pool:
        registry = CollectorRegistry()
        yield Seen(pool, StoreMetrics(registry), registry)


async def test_an_empty_database_has_nothing_to_wait_for(seen: Seen) -> None:
    await seen.metrics.look(seen.pool)
    assert seen.value("log_events") == 0
    assert seen.value("topic_lag_events", topic=LOG.name) == 0
    assert seen.value("processor_parked_streams", processor="agent_turns") == 0
    assert seen.value("leases", kind="projector") == 0
    assert seen.value("overdue_work_seconds") == 0
    assert seen.value("workers_alive") == 0
    assert seen.value("store_looked_timestamp_seconds") > 0  # type: ignore[operator]


async def test_lags_are_counted_from_the_log_itself(seen: Seen) -> None:
    async with seen.pool.connection() as connection:
        await checkpoints.migrate(connection)
    await seen.do("UPDATE shard SET head = 100 WHERE shard IN (3, 4)")
    await seen.do("INSERT INTO checkpoint SELECT 'turns', 1, array_fill(60::bigint, ARRAY[32])")
    leases = PostgresLeases(seen.pool)
    epoch = await leases.acquire("relay/3", "relay-1/a", 5.0)
    assert epoch is not None
    assert await leases.save_marks("relay/3", epoch, [Mark(LOG.name, 3, 90, 90)])
    await seen.metrics.look(seen.pool)
    assert seen.value("log_events") == 200
    assert seen.value("projection_lag_events", projection="turns") == 80
    assert seen.value("topic_lag_events", topic=LOG.name) == 110
    assert seen.value("topic_lag_events", topic=work_topic("agent_turns").name) is None
    assert seen.value("leases", kind="relay") == 1


async def test_what_is_parked_is_shown_until_it_goes_on(seen: Seen) -> None:
    parked, stream = PostgresParkedRecords(seen.pool), uuid4()
    await parked.park("tool_calls", stream, uuid4(), Stuck(3, 7, 2, "Turn.ToolCallRequested", "ValueError()"))
    await seen.metrics.look(seen.pool)
    assert seen.value("processor_parked_streams", processor="tool_calls") == 1
    (found,) = await parked.streams()
    await parked.carried_out(found, None)
    await seen.metrics.look(seen.pool)
    assert seen.value("processor_parked_streams", processor="tool_calls") == 0


async def test_overdue_work_and_workers_are_seen(seen: Seen) -> None:
    await seen.do("INSERT INTO worker VALUES ('a/1', clock_timestamp()), ('b/1', '-infinity')")
    await seen.do(
        "INSERT INTO due SELECT 0, 'step', gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), "
        "clock_timestamp() - interval '90 seconds', ''"
    )
    await seen.metrics.look(seen.pool)
    assert seen.value("workers_alive") == 1
    assert 89 < seen.value("overdue_work_seconds") < 200  # type: ignore[operator]


async def test_an_outage_leaves_what_was_seen_last(seen: Seen, database_url: str) -> None:
    await seen.do("UPDATE shard SET head = 5 WHERE shard = 0")
    await seen.metrics.look(seen.pool)
    looked = seen.value("store_looked_timestamp_seconds")
    await seen.do("ALTER TABLE shard RENAME TO away")
    with pytest.raises(psycopg.Error):
        await seen.metrics.look(seen.pool)
    assert seen.value("log_events") == 5
    assert seen.value("store_looked_timestamp_seconds") == looked
