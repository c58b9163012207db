"""Usage counted by Faust on a real broker: rebuilt after every end of a worker, each record counted once."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adapters.kafka.clients import KafkaConfig, open_consumer, open_producer
from adapters.memory.publisher import MemoryPublisher
from domain.event_log import StoredEvent
from schemas import wire
from schemas.codec import EVENT_TYPES
from schemas.records import AnyRecord
from schemas.topics import USAGE_TABLE, dead_letters, partition_of, work_topic
from stream_processors.analytics_app import AnalyticsHost
from stream_processors.faust_app import Names
from stream_processors.usage_analytics import HOUR_S, Usage, row_of, usage_analytics, usage_in
from tests.peers.brokers import PrivateTopics
from tests.programs.usage_worker import usage_host
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import CountedTool, ScriptedModels, Stage, says, until, wants
from tests.stream_processors.test_usage_analytics import MemoryRows

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "programs" / "usage_worker.py"
PATIENCE_S = 60.0
TURNS = 20
KILLS = 3
HANDLED = {name for name, kind in EVENT_TYPES.items() if kind.event_class in usage_analytics.handlers}


class Watching:
    """Topics of a test's own, and what is on them."""

    def __init__(self, broker: str, topics: PrivateTopics) -> None:
        self.broker = broker
        work, table = work_topic("usage_analytics"), USAGE_TABLE
        topic, changelog = topics.create(work, table)
        self.partitions, self.changelog = topic.partitions, changelog.name
        letters = dead_letters(topic.name, f"{topics.prefix}group")
        self.names = Names(topic.name, f"{topics.prefix}group", letters.name)
        self.publisher = MemoryPublisher()

    async def carry(self, rows: list[StoredEvent]) -> None:
        async with open_producer(KafkaConfig.at(self.broker), "carrier") as producer:
            for row in rows:
                partition = partition_of(row.shard, self.partitions)
                await producer.send(self.names.topic, wire.pack(row), row.stream_id.bytes, partition)

    @asynccontextmanager
    async def worker(self, in_order: bool = True) -> AsyncIterator[AnalyticsHost]:
        host = usage_host(self.broker, self.names, self.changelog, self.publisher)
        self.running = asyncio.create_task(host.run())
        try:
            yield host
        finally:
            if in_order:
                await host.drain()
            self.running.cancel()
            await asyncio.wait({self.running})

    def check(self) -> None:
        if self.running.done():
            self.running.result()

    async def reaches(self, host: AnalyticsHost, key: bytes, expected: Usage) -> None:
        async def is_there() -> bool:
            self.check()
            return host.ready() and usage_in(host, key) == expected

        await until(is_there, f"the row to be {expected}", PATIENCE_S)

    async def handles_all(self, host: AnalyticsHost) -> None:
        async def is_idle() -> bool:
            self.check()
            state = host.state
            return host.ready() and len(state.partitions) == self.partitions and state.lag == 0

        await until(is_idle, "all records to be handled", PATIENCE_S)


async def happened(staged: Staged) -> tuple[Stage, list[StoredEvent]]:
    """Turns with tool calls, as rows of the log."""
    steps = [step for _ in range(TURNS // 2) for step in (wants(("lookup", {"q": "x"})), says("Found."))]
    stage = await staged(ScriptedModels(*steps), CountedTool()).begin()
    for _ in range(TURNS):
        await stage.ask()
    await stage.idle()
    rows = await stage.log.read_after(dict.fromkeys(await stage.log.heads(), 0), 100_000)
    return stage, [row for row in rows if row.type in HANDLED]


async def expected_of(stage: Stage, records: list[AnyRecord]) -> MemoryRows:
    """The same rows, without Faust."""
    rows = MemoryRows()
    work: Any = SimpleNamespace(usage_rows=rows, publication=None)
    for record in records:
        handler = usage_analytics.handlers.get(type(record.event))
        if handler is not None:
            later = await handler(record, work)
            assert later is not None
            await later
    return rows


async def test_a_row_is_written_once_for_many_that_change_it(
    broker: str, topics: PrivateTopics, staged: Staged
) -> None:
    stage, rows = await happened(staged)
    expected = await expected_of(stage, await stage.happened())
    watching = Watching(broker, topics)
    await watching.carry(rows)
    keys = [row_of(stage.owner.tenant_id), row_of(stage.owner.tenant_id, stage.owner.agent_id)]
    async with watching.worker() as host:
        for key in keys:
            await watching.reaches(host, key, usage_in(expected, key))
    written: list[bytes] = []
    async with open_consumer(KafkaConfig.at(broker), "reader", watching.changelog) as consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        while any([await consumer.position(each) < end for each, end in ends.items()]):
            for found in (await consumer.getmany(timeout_ms=100)).values():
                written += [record.key for record in found]
    counts = Counter(written)
    assert all(0 < counts[key] < TURNS for key in keys)


async def test_a_new_worker_goes_on_from_what_was_counted(
    broker: str, topics: PrivateTopics, staged: Staged
) -> None:
    stage, rows = await happened(staged)
    expected = await expected_of(stage, await stage.happened())
    key = row_of(stage.owner.tenant_id, stage.owner.agent_id)
    total = usage_in(expected, key)
    assert total.windows[HOUR_S].turn_count <= TURNS
    watching = Watching(broker, topics)
    half = len(rows) // 2
    await watching.carry(rows[:half])
    async with watching.worker() as host:
        await watching.handles_all(host)
    # Some of it comes again.
    await watching.carry(rows[half // 2 :])
    async with watching.worker() as host:
        await watching.reaches(host, key, total)
        await watching.reaches(
            host, row_of(stage.owner.tenant_id), usage_in(expected, row_of(stage.owner.tenant_id))
        )
    # Nothing is left to read: all of it is from the table's own topic.
    async with watching.worker(in_order=False) as host:
        await watching.reaches(host, key, total)
        await watching.carry(rows)
        await watching.handles_all(host)
        assert usage_in(host, key) == total


async def test_a_worker_that_is_killed_again_and_again_counts_each_record_once(
    broker: str, topics: PrivateTopics, staged: Staged
) -> None:
    stage, rows = await happened(staged)
    expected = await expected_of(stage, await stage.happened())
    key = row_of(stage.owner.tenant_id, stage.owner.agent_id)
    watching = Watching(broker, topics)
    names = watching.names
    command = [sys.executable, str(WORKER), broker, names.topic, names.group, names.dead_letters]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for begin in range(0, len(rows), len(rows) // KILLS):
        process = await asyncio.create_subprocess_exec(
            *command, watching.changelog, env=environment, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        await watching.carry(rows[begin : begin + len(rows) // KILLS])
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(random.randint(1, 8)):
                assert await process.stdout.readline() == b"kept\n"
            process.kill()
            await process.wait()
    async with watching.worker() as host:
        await watching.reaches(host, key, usage_in(expected, key))
