"""A log, its leases, topics of the test's own, and relays between them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TypeVar
from uuid import UUID, uuid4

from aiokafka import ConsumerRecord, TopicPartition

from adapters.kafka.clients import KafkaConfig, open_consumer
from adapters.kafka.relay import Relay, RelayOptions
from adapters.postgres import leases as postgres_leases
from adapters.postgres.event_log import PostgresEventLog, run_script
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.pool import open_pool
from domain.event_log import Batch, EventLog, LogUnavailable, StoredEvent
from domain.ids import shard_of
from domain.leases import Leases
from schemas.topics import LOG, work_topic
from schemas.wire import unpack
from tests.peers.log_rows import stored, tenant_on

PATIENCE_S = 30.0
POLL_S = 0.02
TTL_S = 1.0
FIREHOSE, TURNS, CREDITS = LOG, work_topic("agent_turns"), work_topic("credit_debits")
ASKED, ANSWERED, OTHER = "Test.Asked", "Test.Answered", "Test.Happened"
T = TypeVar("T")


async def until(ask: Callable[[], Awaitable[T]], what: str, within_s: float = PATIENCE_S) -> T:
    """What `ask` answers as soon as that is true."""
    try:
        async with asyncio.timeout(within_s):
            while not (answer := await ask()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"waited {within_s} s for {what}") from None
    return answer


@dataclass(slots=True)
class Stage:
    """What the tests of the relay work on. `work` maps the work topics to their types."""

    log: EventLog
    leases: Leases
    config: KafkaConfig
    firehose: str
    work: Mapping[str, Collection[str]]
    gather_s: Mapping[str, float] = field(default_factory=dict)
    ttl_s: float = TTL_S
    tenants: list[UUID] = field(
        default_factory=lambda: [tenant_on(shard) for shard in (0, 1, 2, 3, 5, 8, 16, 31)]
    )

    @property
    def turns(self) -> str:
        return next(iter(self.work))

    @property
    def options(self) -> RelayOptions:
        return RelayOptions(firehose=self.firehose, gather_s=self.gather_s, ttl_s=self.ttl_s, look_s=0.3)

    def relay(self, holder: str | None = None) -> Relay:
        """One that is not running yet."""
        return Relay(self.log, self.leases, self.config, holder or f"{uuid4()}/1", self.work, self.options)

    @asynccontextmanager
    async def running(self, holder: str | None = None) -> AsyncIterator[Relay]:
        """One that runs as long as the block, and is then abandoned with all its leases."""
        relay = self.relay(holder)
        task = asyncio.create_task(relay.run())
        try:
            yield relay
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def happen(self, count: int, payload: bytes = b"{}", tenants: Collection[UUID] = ()) -> None:
        """Append `count` events, in turn to each tenant and of each type."""
        heads = await self.log.heads()
        events: list[StoredEvent] = []
        followed: dict[int, int] = {}
        for number, tenant in enumerate(islice(cycle(tenants or self.tenants), count)):
            shard = shard_of(tenant)
            followed.setdefault(shard, heads[shard])
            heads[shard] += 1
            kind = (ASKED, OTHER, OTHER, ANSWERED, OTHER)[number % 5]
            events.append(stored(tenant, heads[shard], uuid4(), 1, payload)._replace(type=kind))
        await self.log.append(Batch(followed, events))

    async def all_of_log(self) -> list[StoredEvent]:
        return await self.log.read_after(dict.fromkeys(await self.log.heads(), 0), 1_000_000)

    async def records(self, topic: str) -> list[ConsumerRecord]:
        """All records of a topic, by partition and offset."""
        async with open_consumer(self.config, "test-reader") as consumer:
            cluster = await consumer._client.fetch_all_metadata()
            partitions = [TopicPartition(topic, n) for n in sorted(cluster.partitions_for_topic(topic) or ())]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            await consumer.seek_to_beginning()
            found: dict[TopicPartition, list[ConsumerRecord]] = {to: [] for to in partitions}
            async with asyncio.timeout(PATIENCE_S):
                while any([await consumer.position(to) < ends[to] for to in partitions]):
                    for to, records in (await consumer.getmany(timeout_ms=100)).items():
                        found[to] += records
        return [record for records in found.values() for record in records]

    async def rows(self, topic: str) -> dict[int, list[StoredEvent]]:
        """The rows of a topic by shard, in the order in which they are there."""
        found: defaultdict[int, list[StoredEvent]] = defaultdict(list)
        for record in await self.records(topic):
            row = unpack(record.value)
            found[row.shard].append(row)
        return found

    async def everything_is_marked(self) -> bool:
        """Whether the saved cursors of all topics have reached the heads."""
        heads = {shard: head for shard, head in (await self.log.heads()).items() if head}
        marks = {(mark.topic, mark.shard): mark.position for mark in await self.leases.marks()}
        topics = (self.firehose, *self.work)
        return all(marks.get((topic, shard), 0) >= head for topic in topics for shard, head in heads.items())

    async def relayed(self, within_s: float = PATIENCE_S) -> None:
        await until(self.everything_is_marked, "all cursors at the heads", within_s)

    async def is_on_firehose(self) -> None:
        """Everything is there; in order and without a gap once what came twice is dropped."""
        by_shard = await self.rows(self.firehose)
        expected: defaultdict[int, list[StoredEvent]] = defaultdict(list)
        for row in await self.all_of_log():
            expected[row.shard].append(row)
        for shard, rows in expected.items():
            kept: list[StoredEvent] = []
            for row in by_shard[shard]:
                assert row.position <= len(kept) + 1, f"a gap before {row.position} in shard {shard}"
                if row.position == len(kept) + 1:
                    kept.append(row)
            assert kept == rows
        assert by_shard.keys() <= expected.keys()


@asynccontextmanager
async def opened_log(dsn: str) -> AsyncIterator[tuple[PostgresEventLog, PostgresLeases]]:
    """A log and leases on a database of the test's own."""
    log = PostgresEventLog(dsn)
    await log.migrate()
    await run_script(dsn, postgres_leases.TABLES)
    await log.open()
    try:
        async with open_pool(dsn, 4) as pool:
            yield log, PostgresLeases(pool)
    finally:
        with suppress(LogUnavailable):
            await log.close()
