"""What every host of processors keeps: the embedded one on the log, and Faust on a real broker."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, Protocol
from uuid import UUID, uuid4

import pytest

from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.memory.event_log import MemoryEventLog
from adapters.memory.parked_records import MemoryParkedRecords
from commands.bus import Bus
from commands.credit_account import ChangePlan, GrantCredits
from domain.credit_account import CreditAccount
from domain.event_log import Batch, LogUnavailable, StoredEvent
from domain.ids import SHARDS, account_of, derived
from domain.parked import Asked
from oshaani.processor_host import ProcessorHost
from schemas import wire
from schemas.records import AnyRecord
from schemas.topics import Topic, dead_letters, partition_of
from stream_processors.faust_app import FaustHost, Names
from stream_processors.processor import Processor
from stream_processors.runner import ATTEMPTS_MAX, Supplies
from tests.commands.write_side import BY, EVERYTHING, Owner, account, memory_records, rules, signed_up
from tests.peers.brokers import PrivateTopics
from tests.peers.log_rows import tenant_on
from tests.stream_processors.stage import until

NAME = "plans"
PARTITIONS = 4
PLANS = ("professional", "starter")  # the first differs from what everybody begins with
BONUS_NCR = 7
PATIENCE_S = 20.0
HANDLED = "CreditAccount.PlanChanged"

Handle = Callable[[AnyRecord], Any]


class Host(Protocol):
    """What the suite needs of a host."""

    async def run(self) -> None: ...
    async def drain(self) -> None: ...


@dataclass
class Means:
    """What the handlers of this suite use."""

    bus: Bus


class Hosting:
    """A log, owners who change their plans, and a processor that is told of it, under one host after another."""

    patch: pytest.MonkeyPatch

    def __init__(self) -> None:
        self.log, self.records, self.parked = MemoryEventLog(), memory_records(), MemoryParkedRecords()
        self.bus = Bus(self.log, self.records, rules())
        self.told: list[tuple[UUID, int]] = []
        self.tries: Counter[int] = Counter()
        self.before: Handle = lambda record: None
        self.order: Literal["stream", "tenant"] = "stream"
        self.follows: Callable[[AnyRecord], Awaitable[None] | None] = lambda record: None
        self.running: list[tuple[Host, asyncio.Task[None]]] = []
        self.plans: dict[UUID, Iterator[str]] = defaultdict(lambda: cycle(PLANS))
        self.carried = dict.fromkeys(range(SHARDS), 0)

    # --- the host

    def host(self) -> Host:
        plans = Processor(NAME, order=self.order)

        @plans.on(CreditAccount.PlanChanged)
        async def plan_changed(record: AnyRecord, work: Any) -> Awaitable[None] | None:
            self.tries[record.position] += 1
            outcome = self.before(record)
            if outcome is not None:
                await outcome
            self.told.append((record.stream_id, record.position))
            return self.follows(record)

        work: Any = Means(self.bus)
        return self.new_host(plans, Supplies(work, self.log, self.records, self.parked))

    def new_host(self, processor: Processor, supplies: Supplies) -> Host:
        return ProcessorHost(supplies.log, supplies.records, (processor,), supplies.work, supplies.parked)

    def start(self) -> Host:
        host = self.host()
        self.running.append((host, asyncio.create_task(host.run())))
        return host

    async def stop(self) -> None:
        """As a signal does."""
        host, task = self.running.pop()
        await host.drain()
        task.cancel()
        await asyncio.wait((task,))

    async def end(self) -> None:
        while self.running:
            await self.stop()

    async def carry(self) -> None:
        """Bring what is in the log where the host reads it."""

    # --- what there is to tell

    async def owner(self, shard: int = 5) -> Owner:
        return await signed_up(self.bus, tenant_on(shard))

    async def change(self, owner: Owner, count: int = 1) -> list[int]:
        positions = []
        for _ in range(count):
            command = ChangePlan(tenant_id=owner.tenant_id, plan=next(self.plans[owner.tenant_id]))
            positions.append((await self.bus.execute(command, by=BY)).position)
        await self.carry()
        return positions

    async def append(self, *rows: StoredEvent) -> None:
        shard = rows[0].shard
        await self.log.append(Batch({shard: rows[0].position - 1}, list(rows)))
        await self.carry()

    def of(self, owner: Owner) -> list[int]:
        """What was told of an owner, in that order."""
        stream_id = account_of(owner.tenant_id)
        return [position for stream, position in self.told if stream == stream_id]

    async def hears(self, owner: Owner, positions: Sequence[int]) -> None:
        async def heard() -> bool:
            return set(positions) <= set(self.of(owner))

        await until(heard, f"{len(positions)} records to be handled", PATIENCE_S)

    async def waits(self, count: int = 1) -> None:
        async def is_parked() -> bool:
            return len(await self.parked.streams()) == count

        await until(is_parked, f"{count} parked streams", PATIENCE_S)


class FaustHosting(Hosting):
    """The same on Kafka: the test carries what is in the log to the work topic."""

    def __init__(self, servers: str, topics: PrivateTopics) -> None:
        super().__init__()
        self.servers = servers
        like = Topic("work", PARTITIONS, 3_600, False, "")
        (topic,) = topics.create(like)
        group = f"{topics.prefix}group"
        letters = dead_letters(topic.name, group)
        topics.create(Topic(letters.name.removeprefix(topics.prefix), 1, 3_600, False, ""))
        self.names = Names(topic.name, group, letters.name)

    def new_host(self, processor: Processor, supplies: Supplies) -> Host:
        return FaustHost(processor, supplies, WorkerKafka(KafkaConfig.at(self.servers)), names=self.names)

    async def carry(self) -> None:
        rows = await self.log.read_after(self.carried, EVERYTHING)
        await self.publish([row for row in rows if row.type not in OTHERS])
        for row in rows:
            self.carried[row.shard] = row.position

    async def publish(self, rows: Sequence[StoredEvent]) -> None:
        async with open_producer(KafkaConfig.at(self.servers), "carrier") as producer:
            for row in rows:
                partition = partition_of(row.shard, PARTITIONS)
                await producer.send(self.names.topic, wire.pack(row), row.stream_id.bytes, partition)


# The relay brings only what the processor handles, and what nobody knows.
OTHERS = {
    "User.Registered",
    "User.LoggedIn",
    "CreditAccount.Opened",
    "CreditAccount.CreditsGranted",
    "CreditAccount.CreditsCharged",
    "Agent.Created",
}


@pytest.fixture(params=["embedded", "faust"])
async def hosting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosting]:
    monkeypatch.setattr("oshaani.processor_host.POLL_S", 0.02)
    monkeypatch.setattr("oshaani.processor_host.SAVE_S", 0.02)
    monkeypatch.setattr("stream_processors.runner.BACKOFF_FIRST_S", 0.02)
    monkeypatch.setattr("stream_processors.runner.ASK_S", 0.05)
    if request.param == "embedded":
        hosting = Hosting()
    else:
        topics = request.getfixturevalue("topics")
        hosting = FaustHosting(request.getfixturevalue("broker"), topics)
    hosting.patch = monkeypatch
    yield hosting
    await hosting.end()


async def test_every_record_is_handled_in_the_order_of_its_stream(hosting: Hosting) -> None:
    owners = [await hosting.owner(shard) for shard in (0, 1, 1, 2, 7, 31)]
    hosting.before = lambda record: asyncio.sleep(0)
    before = [(owner, await hosting.change(owner, 5)) for owner in owners]
    hosting.start()
    after = [(owner, await hosting.change(owner, 5)) for owner in owners]
    expected: dict[Owner, list[int]] = defaultdict(list)
    for owner, positions in (*before, *after):
        expected[owner] += positions
        await hosting.hears(owner, positions)
    assert {owner: hosting.of(owner) for owner in owners} == expected


async def test_a_slow_record_holds_up_no_other_stream(hosting: Hosting) -> None:
    slow, other, elsewhere = await hosting.owner(3), await hosting.owner(3), await hosting.owner(4)
    go = asyncio.Event()
    first, second = await hosting.change(slow, 2)
    hosting.before = lambda record: go.wait() if record.position == first else None
    hosting.start()
    for owner in (other, elsewhere):
        await hosting.hears(owner, await hosting.change(owner, 3))
    assert hosting.of(slow) == []
    go.set()
    await hosting.hears(slow, [first, second])
    assert hosting.of(slow) == [first, second]


async def test_a_processor_may_have_the_streams_of_a_tenant_in_one_order(hosting: Hosting) -> None:
    hosting.order = "tenant"
    owner = await hosting.owner(5)
    (last,) = await hosting.change(owner)
    (row,) = await hosting.log.read_after({5: last - 1}, 1)
    rows = [
        row._replace(position=last + n, stream_id=uuid4(), stream_version=1, command_id=uuid4())
        for n in range(1, 11)
    ]
    # The first ones take longest.
    hosting.before = lambda record: asyncio.sleep(0.002 * (last + 10 - record.position))
    hosting.start()
    await hosting.append(*rows)

    async def all_told() -> bool:
        return len(hosting.told) == 11

    await until(all_told, "all records", PATIENCE_S)
    assert [position for _, position in hosting.told] == list(range(last, last + 11))


async def test_what_is_to_follow_delays_no_other_record_and_is_done_again_when_it_did_not_come_about(
    hosting: Hosting,
) -> None:
    owner = await hosting.owner()
    acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def published() -> None:
        await acknowledged

    hosting.follows = lambda record: published()
    for module in ("oshaani.processor_host", "stream_processors.faust_app"):
        hosting.patch.setattr(f"{module}.DRAIN_S", 0.01)
    positions = await hosting.change(owner, 3)
    hosting.start()
    await hosting.hears(owner, positions)
    await hosting.stop()
    acknowledged = asyncio.get_running_loop().create_future()
    acknowledged.set_result(None)
    hosting.start()

    async def all_told_twice() -> bool:
        return hosting.of(owner) == [*positions, *positions]

    await until(all_told_twice, "all records again", PATIENCE_S)


async def test_a_failing_record_is_tried_again_and_again_with_pauses(hosting: Hosting) -> None:
    owner = await hosting.owner()
    first, second = await hosting.change(owner, 2)
    times: list[float] = []

    def fail(record: AnyRecord) -> None:
        if record.position == first and len(times) < ATTEMPTS_MAX - 1:
            times.append(asyncio.get_running_loop().time())
            raise ZeroDivisionError("not yet")

    hosting.before = fail
    hosting.start()
    await hosting.hears(owner, [first, second])
    assert hosting.of(owner) == [first, second]
    assert hosting.tries[first] == ATTEMPTS_MAX
    assert times[-1] - times[0] > 0.02 * (1 + 2 + 4 + 8) / 2
    assert await hosting.parked.streams() == []


async def test_poison_parks_its_stream_and_nothing_else(hosting: Hosting) -> None:
    poisoned, other = await hosting.owner(9), await hosting.owner(9)
    positions = await hosting.change(poisoned, 3)
    hosting.before = poison_at(positions[1])
    hosting.start()
    await hosting.waits()
    (parked,) = await hosting.parked.streams()
    assert (parked.processor, parked.stream_id) == (NAME, account_of(poisoned.tenant_id))
    assert (parked.stuck.shard, parked.stuck.position, parked.stuck.type) == (9, positions[1], HANDLED)
    assert "poison" in parked.stuck.error
    await hosting.change(poisoned, 2)
    await hosting.hears(other, await hosting.change(other, 5))
    assert hosting.of(poisoned) == positions[:1]
    assert hosting.tries[positions[1]] == ATTEMPTS_MAX


@pytest.mark.parametrize("what", ["retry", "skip"])
async def test_a_parked_stream_goes_on_in_order_when_an_operator_asks_for_it(
    hosting: Hosting, what: Any
) -> None:
    owner, other = await hosting.owner(9), await hosting.owner(9)
    positions = await hosting.change(owner, 3)
    hosting.before = poison_at(positions[1])
    hosting.start()
    await hosting.waits()
    # Another life of the host knows as well that the stream waits.
    await hosting.stop()
    hosting.start()
    positions += await hosting.change(owner, 2)
    await hosting.hears(other, await hosting.change(other, 1))
    assert hosting.of(owner) == positions[:1]
    wanted = positions
    if what == "retry":
        hosting.before = lambda record: None
    else:
        wanted = [position for position in positions if position != positions[1]]
    await hosting.parked.ask(NAME, account_of(owner.tenant_id), Asked(what, "ada", "a test"))
    await hosting.waits(0)
    later = await hosting.change(owner, 2)
    await hosting.hears(owner, later)
    assert hosting.of(owner) == [*wanted, *later]
    left_out = [each.stuck.position for each in await hosting.parked.skipped()]
    assert left_out == ([positions[1]] if what == "skip" else [])


async def test_a_stream_that_fails_again_waits_where_it_fails(hosting: Hosting) -> None:
    owner = await hosting.owner(2)
    positions = await hosting.change(owner, 4)
    hosting.before = poison_at(positions[1], positions[3])
    hosting.start()
    await hosting.waits()
    await hosting.parked.ask(NAME, account_of(owner.tenant_id), Asked("skip", "ada", "a test"))

    async def stands_later() -> bool:
        (parked,) = await hosting.parked.streams()
        return parked.stuck.position == positions[3] and parked.asked is None

    await until(stands_later, "the stream to be parked again", PATIENCE_S)
    assert hosting.of(owner) == [positions[0], positions[2]]


async def test_an_event_from_the_future_parks_its_stream(hosting: Hosting) -> None:
    owner, other = await hosting.owner(6), await hosting.owner(6)
    before = await hosting.change(owner, 1)
    (row,) = await hosting.log.read_after({6: before[-1] - 1}, 1)
    of_others = row._replace(stream_version=1)
    future = of_others._replace(position=row.position + 1, stream_id=uuid4(), type="CreditAccount.Celebrated")
    newer = of_others._replace(
        position=row.position + 2, stream_id=uuid4(), schema_version=row.schema_version + 1
    )
    await hosting.append(future, newer)
    hosting.start()
    await hosting.waits(2)
    found = {parked.stream_id: parked.stuck for parked in await hosting.parked.streams()}
    assert found[future.stream_id].position == future.position
    assert "CreditAccount.Celebrated" in found[future.stream_id].error
    assert found[newer.stream_id].position == newer.position
    await hosting.hears(other, await hosting.change(other, 2))
    assert hosting.of(owner) == before


async def test_an_outage_of_the_log_is_waited_for_and_loses_nothing(hosting: Hosting) -> None:
    owners = [await hosting.owner(shard) for shard in (1, 1, 8)]
    expected = {owner: await hosting.change(owner, 3) for owner in owners}
    away = True

    def use_the_log(record: AnyRecord) -> None:
        if away:
            raise LogUnavailable("away")

    hosting.before = use_the_log
    hosting.start()
    first = {positions[0] for positions in expected.values()}

    async def tried_often() -> bool:
        return all(hosting.tries[position] > ATTEMPTS_MAX // 2 for position in first)

    await until(tried_often, "the host to try again", PATIENCE_S)
    assert hosting.told == []
    away = False
    for owner, positions in expected.items():
        await hosting.hears(owner, positions)
    assert {owner: hosting.of(owner) for owner in owners} == expected
    assert await hosting.parked.streams() == []


async def test_what_runs_may_come_to_its_end_when_the_host_stops(hosting: Hosting) -> None:
    owner = await hosting.owner()
    first, second = await hosting.change(owner, 2)
    began, go = asyncio.Event(), asyncio.Event()

    async def wait(record: AnyRecord) -> None:
        began.set()
        await go.wait()

    hosting.before = wait
    hosting.start()
    async with asyncio.timeout(PATIENCE_S):
        await began.wait()
    stopping = asyncio.create_task(hosting.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    go.set()
    async with asyncio.timeout(PATIENCE_S):
        await stopping
    assert hosting.of(owner) == [first]
    hosting.start()
    await hosting.hears(owner, [second])
    # The first was acknowledged before the end.
    assert hosting.of(owner) == [first, second]


async def test_what_was_not_finished_comes_again_and_does_no_harm_behind_the_fence(hosting: Hosting) -> None:
    owner = await hosting.owner()
    positions = await hosting.change(owner, 5)
    stuck = asyncio.Event()

    async def bonus(record: AnyRecord) -> None:
        grant_id = derived(record.event_id, "bonus")
        command = GrantCredits(
            tenant_id=owner.tenant_id, grant_id=grant_id, kind="promotion", amount_ncr=BONUS_NCR
        )
        await hosting.bus.execute(command, by=BY, command_id=derived(grant_id, "grant"))
        if record.position == positions[2] and not stuck.is_set():
            stuck.set()
            await asyncio.Event().wait()

    hosting.before = bonus
    had_ncr = (await account(hosting.bus, owner)).available_ncr
    for module in ("oshaani.processor_host", "stream_processors.faust_app"):
        hosting.patch.setattr(f"{module}.DRAIN_S", 0.01)
    hosting.start()
    async with asyncio.timeout(PATIENCE_S):
        await stuck.wait()
    await hosting.stop()
    assert hosting.of(owner) == positions[:2]
    hosting.start()
    await hosting.hears(owner, positions)
    assert hosting.tries[positions[2]] == 2
    assert (await account(hosting.bus, owner)).available_ncr - had_ncr == len(positions) * BONUS_NCR


def poison_at(*positions: int) -> Handle:
    def fail(record: AnyRecord) -> None:
        if record.position in positions:
            raise ZeroDivisionError("poison")

    return fail
