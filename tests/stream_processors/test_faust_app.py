"""What only the host on a broker meets: other members, foreign records, brokers that go and topics that are made anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from adapters.kafka.broker import KafkaServer
from adapters.kafka.clients import KafkaConfig, open_consumer, open_producer
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.memory.event_log import MemoryEventLog
from adapters.memory.leases import MemoryLeases
from adapters.memory.parked_records import MemoryParkedRecords
from domain.credit_account import CreditAccount
from domain.event_log import Batch, StoredEvent
from domain.parked import Asked
from schemas import wire
from schemas.records import AnyRecord
from schemas.topics import partition_of
from stream_processors.faust_app import FaustHost, Names, WorkerLost
from stream_processors.processor import Processor
from stream_processors.runner import Supplies
from stream_processors.slot import Slot
from tests.commands.write_side import memory_records
from tests.peers.log_rows import stored, tenant_on
from tests.stream_processors.stage import until

PARTITIONS = 4
PATIENCE_S = 30.0
EVENT = "CreditAccount.PlanChanged"


class Group:
    """A work topic, and hosts that share it."""

    def __init__(self, servers: str) -> None:
        self.servers, self.config = servers, KafkaConfig.at(servers)
        prefix = f"test-{uuid4().hex[:12]}"
        self.names = Names(f"{prefix}.work", f"{prefix}.group", f"{prefix}.dlq")
        self.log, self.parked, self.records = MemoryEventLog(), MemoryParkedRecords(), memory_records()
        self.told: list[tuple[int, int]] = []  # shard and position
        self.before: Callable[[AnyRecord], Any] = lambda record: None
        self.tasks: list[asyncio.Task[None]] = []
        self.streams = {shard: (tenant_on(shard), uuid4()) for shard in range(8)}
        self.heads: dict[int, int] = {}

    async def make_topics(self) -> None:
        async with self.admin() as admin:
            await admin.create_topics(
                [NewTopic(self.names.topic, PARTITIONS, 1), NewTopic(self.names.dead_letters, 1, 1)]
            )

    def admin(self) -> Any:
        return _Admin(self.servers)

    def host(self, slot: Slot | None = None) -> FaustHost:
        plans = Processor("plans")

        @plans.on(CreditAccount.PlanChanged)
        async def plan_changed(record: AnyRecord, work: Any) -> None:
            outcome = self.before(record)
            if outcome is not None:
                await outcome
            self.told.append((record.shard, record.position))

        work: Any = None
        supplies = Supplies(work, self.log, self.records, self.parked)
        return FaustHost(plans, supplies, WorkerKafka(self.config), slot, self.names)

    def start(self, slot: Slot | None = None) -> tuple[FaustHost, asyncio.Task[None]]:
        host = self.host(slot)
        task = asyncio.create_task(host.run())
        self.tasks.append(task)
        return host, task

    async def joined(self, *hosts: FaustHost, among: int = 1) -> None:
        async def all_joined() -> bool:
            counts = [len(host.state.partitions) for host in hosts]
            return all(host.ready() for host in hosts) and sum(counts) == PARTITIONS and len(counts) == among

        await until(all_joined, "the hosts to share the partitions", PATIENCE_S)

    async def happen(self, count: int = 1, shards: Any = range(8)) -> list[tuple[int, int]]:
        """So many records of the stream on each shard; where they are in the log."""
        rows: list[StoredEvent] = []
        for shard in shards:
            for _ in range(count):
                rows.append(await self.append(shard))
        await self.send([(wire.pack(row), row.stream_id.bytes, row.shard) for row in rows])
        return [(row.shard, row.position) for row in rows]

    async def append(self, shard: int) -> StoredEvent:
        tenant_id, stream_id = self.streams[shard]
        head = self.heads.get(shard, 0)
        row = stored(tenant_id, head + 1, stream_id, head + 1, b'{"plan":"starter"}')._replace(type=EVENT)
        at = await self.log.append(Batch({shard: head}, [row]))
        self.heads[shard] = head + 1
        return row._replace(recorded_at=at)

    async def send(self, records: list[tuple[bytes, bytes | None, int]]) -> None:
        async with open_producer(self.config, "test") as producer:
            for value, key, shard in records:
                await producer.send(self.names.topic, value, key, partition_of(shard, PARTITIONS))

    async def hear(self, places: list[tuple[int, int]]) -> None:
        async def heard() -> bool:
            return set(places) <= set(self.told)

        await until(heard, f"{len(places)} records", PATIENCE_S)

    def firsts(self) -> list[tuple[int, int]]:
        """What was handled, each when it was for the first time."""
        return list(dict.fromkeys(self.told))

    async def letters(self, count: int) -> list[Any]:
        async with open_consumer(self.config, "test", self.names.dead_letters) as consumer:
            async with asyncio.timeout(PATIENCE_S):
                return [await consumer.getone() for _ in range(count)]

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=PATIENCE_S)


class _Admin:
    def __init__(self, servers: str) -> None:
        self._servers = servers

    async def __aenter__(self) -> AIOKafkaAdminClient:
        self._client = AIOKafkaAdminClient(bootstrap_servers=self._servers)
        await self._client.start()
        return self._client

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()


@pytest.fixture
async def group(broker: str) -> AsyncIterator[Group]:
    group = Group(broker)
    await group.make_topics()
    yield group
    await group.end()


async def failure_of(task: asyncio.Task[None]) -> BaseException:
    await asyncio.wait((task,), timeout=PATIENCE_S)
    assert task.done(), "the host goes on"
    failure = task.exception()
    assert failure is not None
    return failure


async def test_what_could_not_be_handled_is_left_as_a_dead_letter_with_its_cause(group: Group) -> None:
    def poison(record: AnyRecord) -> None:
        raise ZeroDivisionError("poison")

    group.before = poison
    host, _ = group.start()
    ((shard, position),) = await group.happen(1, [5])
    (letter,) = await group.letters(1)
    headers = dict(letter.headers)
    assert wire.unpack(letter.value).position == position
    assert letter.key == group.streams[5][1].bytes
    assert b"poison" in headers["error"]
    assert (headers["topic"], headers["processor"]) == (group.names.topic.encode(), b"plans")
    assert (headers["partition"], headers["offset"]) == (b"1", b"0")
    assert (headers["shard"], headers["position"]) == (b"%d" % shard, b"%d" % position)

    async def is_counted() -> bool:
        return host.state.parked == 1 and host.state.pending == 0

    await until(is_counted, "the stream to be parked", PATIENCE_S)


async def test_a_record_in_a_form_of_the_future_parks_its_stream_which_the_log_can_tell(group: Group) -> None:
    host, _ = group.start()
    assert not host.serves(6, group.streams[6][1])
    await group.hear(await group.happen(1))
    assert host.serves(6, group.streams[6][1])
    unread = await group.append(6)
    await group.send([(b"\xfe" + wire.pack(unread)[1:], unread.stream_id.bytes, 6)])

    async def is_parked() -> bool:
        return bool(await group.parked.streams())

    await until(is_parked, "the stream to be parked", PATIENCE_S)
    (parked,) = await group.parked.streams()
    assert (parked.stream_id, parked.stuck.shard, parked.stuck.position) == (unread.stream_id, 6, 0)
    assert "254" in parked.stuck.error
    assert not host.serves(6, parked.stream_id) and host.serves(2, group.streams[2][1])
    later = await group.append(6)
    await group.send([(wire.pack(later), later.stream_id.bytes, 6)])
    await group.hear(await group.happen(1, [2]))
    assert (6, unread.position) not in group.told
    await group.parked.ask("plans", unread.stream_id, Asked("retry", "ada"))
    await group.hear([(6, unread.position), (6, later.position)])
    assert [place for place in group.firsts() if place[0] == 6] == [(6, 1), (6, 2), (6, 3)]
    assert await group.parked.streams() == []


@pytest.mark.parametrize(
    ("value", "key"),
    [(b"hello", None), (b"", b"short"), (b"\x01garbage", bytes(range(16))), (b"\xfe", bytes(range(16)))],
)
async def test_a_record_that_is_not_of_the_log_is_put_aside(
    group: Group, value: bytes, key: bytes | None
) -> None:
    host, _ = group.start()
    await group.send([(value, key, 3)])
    (letter,) = await group.letters(1)
    assert (letter.value, letter.key) == (value, key)
    await group.hear(await group.happen(2))
    assert await group.parked.streams() == []
    assert host.state.parked == 0


async def test_hosts_share_the_partitions_and_take_over_from_each_other(group: Group) -> None:
    first, first_task = group.start()
    before = await group.happen(3)
    await group.hear(before)
    second, _ = group.start()
    await group.joined(first, second, among=2)
    between = await group.happen(3)
    await group.hear(between)
    await first.drain()
    first_task.cancel()
    after = await group.happen(3)
    await group.hear(after)
    await group.joined(second)
    wanted = sorted([*before, *between, *after])
    assert sorted(group.firsts()) == wanted
    for shard in range(8):
        places = [place for place in group.firsts() if place[0] == shard]
        assert places == sorted(places)


async def test_of_two_hosts_with_one_name_only_one_goes_on(group: Group) -> None:
    # The leases are two, so that nothing but Kafka stands between them.
    host, first = group.start(Slot(MemoryLeases(), "twin"))
    await group.joined(host)
    _, second = group.start(Slot(MemoryLeases(), "twin"))
    await asyncio.wait((first, second), timeout=2 * PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
    (ended,) = [task for task in (first, second) if task.done()]
    assert "our name" in str(await failure_of(ended))
    await group.hear(await group.happen(1))


async def test_a_host_with_a_name_is_back_at_once_after_its_end(group: Group) -> None:
    leases = MemoryLeases()
    other, _ = group.start(Slot(leases, "other"))
    await group.joined(other)
    host, task = group.start(Slot(leases, "comes back"))
    await group.joined(other, host, among=2)
    had = host.state.partitions
    await host.drain()
    task.cancel()
    await asyncio.wait((task,))
    places = await group.happen(1)
    again, _ = group.start(Slot(leases, "comes back"))
    await group.joined(other, again, among=2)
    assert again.state.partitions == had
    await group.hear(places)


async def test_a_topic_that_is_made_anew_is_read_from_its_beginning_by_the_next_host(group: Group) -> None:
    host, task = group.start()
    await group.hear(await group.happen(3))
    await committed(group, 24)
    async with group.admin() as admin:
        await admin.delete_topics([group.names.topic])
    await until(lambda: made_again(group), "the topic to be made anew", PATIENCE_S)
    after = await group.happen(2)
    # Whether it notices or is told by its group: it ends, and another one begins with everything there is.
    noticed = asyncio.create_task(failure_of(task))
    heard = asyncio.create_task(group.hear(after))
    await asyncio.wait((noticed, heard), return_when=asyncio.FIRST_COMPLETED)
    if noticed.done() and not heard.done():
        assert isinstance(noticed.result(), WorkerLost)
        group.start()
    noticed.cancel()
    await heard
    assert host is not None


async def test_a_broker_that_is_killed_is_waited_for_and_nothing_is_lost(own_broker: KafkaServer) -> None:
    group = Group(own_broker.bootstrap_servers)
    try:
        await group.make_topics()
        host, task = group.start()
        await group.hear(await group.happen(3))
        await asyncio.to_thread(own_broker.kill)
        await asyncio.sleep(3.0)
        assert not task.done()
        await asyncio.to_thread(own_broker.start)
        await group.hear(await group.happen(3))
        assert not task.done()
        await host.drain()
    finally:
        await group.end()


async def test_a_host_waits_for_its_topic(broker: str) -> None:
    group = Group(broker)
    try:
        host, task = group.start()

        async def waits() -> bool:
            return group.names.topic in host.state.waits_for

        await until(waits, "the host to say what it waits for", PATIENCE_S)
        assert not host.ready()
        await group.make_topics()
        await group.hear(await group.happen(1))
        assert host.ready()
        assert not task.done()
    finally:
        await group.end()


async def test_a_partition_with_too_much_to_do_is_read_no_further_for_a_while(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_processors.runner.PENDING_MAX", 20)
    go = asyncio.Event()
    group.before = lambda record: go.wait() if record.shard == 0 else None
    host, _ = group.start()
    await group.joined(host)
    slow = await group.happen(30, [0])

    async def is_full() -> bool:
        return host.state.pending >= 20

    await until(is_full, "the partition to be full", PATIENCE_S)
    slow += await group.happen(500, [0])
    await group.hear(await group.happen(10, [1, 2, 3]))
    assert host.state.lag >= 500
    go.set()
    await group.hear(slow)
    assert [place for place in group.told if place[0] == 0] == slow

    async def is_level() -> bool:
        return host.state.lag == host.state.pending == 0

    await until(is_level, "nothing to be left", PATIENCE_S)


async def committed(group: Group, count: int) -> None:
    """Wait until the group has let go of so many records."""

    async def is_committed() -> bool:
        async with group.admin() as admin:
            offsets = await admin.list_consumer_group_offsets(group.names.group)
        return sum(each.offset for each in offsets.values()) == count

    await until(is_committed, f"{count} records to be committed", PATIENCE_S)


async def made_again(group: Group) -> bool:
    async with group.admin() as admin:
        made = await admin.create_topics([NewTopic(group.names.topic, PARTITIONS, 1)])
        return bool(made.topic_errors[0][1] == 0)
