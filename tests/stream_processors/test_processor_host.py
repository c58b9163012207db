"""Every record reaches its processors at least once, whatever happens to the host."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from typing import Any
from uuid import uuid4

import pytest

from adapters.memory.event_log import MemoryEventLog
from adapters.memory.parked_records import MemoryParkedRecords
from commands.bus import Bus
from commands.credit_account import ChangePlan
from domain.credit_account import CreditAccount
from domain.event_log import Batch, LogUnavailable
from domain.ids import UserId, account_of, shard_of
from domain.parked import Asked
from oshaani.processor_host import PAGE, READER, ProcessorHost
from schemas.records import AnyRecord
from stream_processors.processor import Processor
from stream_processors.runner import ATTEMPTS_MAX
from tests.commands.write_side import BY, Owner, memory_records, rules, signed_up
from tests.peers.log_rows import stored, tenant_on
from tests.stream_processors.stage import PATIENCE_S, until

Handle = Callable[[AnyRecord], Any]
PLANS = ("starter", "professional")


class Hosted:
    """A log, a bus that writes to it, and hosts whose processor notes the plans it was told of."""

    def __init__(self) -> None:
        self.log, self.records, self.parked = MemoryEventLog(), memory_records(), MemoryParkedRecords()
        self.bus = Bus(self.log, self.records, rules())
        self.told: list[int] = []
        self.before: Handle = lambda record: None
        self.tasks: list[asyncio.Task[None]] = []
        self.plans = cycle(PLANS)
        self.owner: Owner

    def host(self) -> ProcessorHost:
        plans = Processor("plans")

        @plans.on(CreditAccount.PlanChanged)
        async def plan_changed(record: AnyRecord, work: Any) -> None:
            await asyncio.sleep(0)
            outcome = self.before(record)
            if outcome is not None:
                await outcome
            self.told.append(record.position)

        work: Any = None
        return ProcessorHost(self.log, self.records, (plans,), work, self.parked)

    def start(self, host: ProcessorHost) -> asyncio.Task[None]:
        task = asyncio.create_task(host.run())
        self.tasks.append(task)
        return task

    async def change(self, count: int, bus: Bus | None = None, owner: Owner | None = None) -> list[int]:
        """So many changes of plan; their positions."""
        tenant_id = (owner or self.owner).tenant_id
        positions = []
        for _ in range(count):
            outcome = await (bus or self.bus).execute(
                ChangePlan(tenant_id=tenant_id, plan=next(self.plans)), by=BY
            )
            positions.append(outcome.position)
        return positions

    async def hears(self, positions: list[int]) -> None:
        async def heard() -> bool:
            return set(positions) <= set(self.told)

        await until(heard, "the records to be handled")


@pytest.fixture
async def hosted() -> Any:
    hosted = Hosted()
    hosted.owner = await signed_up(hosted.bus)
    yield hosted
    for task in hosted.tasks:
        task.cancel()
    if hosted.tasks:
        await asyncio.wait(hosted.tasks)


async def saved(hosted: Hosted, position: int) -> None:
    async def is_saved() -> bool:
        cursor = await hosted.log.cursor(READER)
        return cursor.get(shard_of(hosted.owner.tenant_id)) == position

    await until(is_saved, f"the cursor at {position}")


async def until_poisoned(host: ProcessorHost, count: int) -> None:
    async def is_poisoned() -> bool:
        return host.poisoned == count

    await until(is_poisoned, f"{count} parked streams")


async def test_records_are_handled_as_they_are_committed(hosted: Hosted) -> None:
    host = hosted.host()
    hosted.start(host)
    hosted.bus.on_commit = host.offer
    positions = await hosted.change(50)
    await hosted.hears(positions)
    assert Counter(hosted.told) == Counter(positions)
    await saved(hosted, positions[-1])
    assert host.lag(await hosted.log.heads()) == 0


async def test_what_was_not_offered_is_read_from_the_log(hosted: Hosted) -> None:
    host = hosted.host()
    hosted.start(host)
    offered: list[AnyRecord] = []

    def offer_some(records: Any) -> None:
        offered.extend(records)
        if len(offered) % 3:
            host.offer(records)

    hosted.bus.on_commit = offer_some
    positions = await hosted.change(30)
    others = await hosted.change(30, Bus(hosted.log, hosted.records, rules()))
    await hosted.hears(positions + others)
    assert Counter(hosted.told) == Counter(positions + others)


async def test_records_offered_twice_are_handled_once(hosted: Hosted) -> None:
    host = hosted.host()
    hosted.start(host)

    def offer_twice(records: Any) -> None:
        host.offer(records)
        host.offer(records)

    hosted.bus.on_commit = offer_twice
    positions = await hosted.change(10)
    await hosted.hears(positions)
    await saved(hosted, positions[-1])
    assert Counter(hosted.told) == Counter(positions)


async def test_a_new_host_goes_on_where_the_last_one_had_finished(hosted: Hosted) -> None:
    first = hosted.host()
    task = hosted.start(first)
    positions = await hosted.change(10)
    await hosted.hears(positions)
    await saved(hosted, positions[-1])
    task.cancel()
    missed = await hosted.change(5)
    hosted.start(hosted.host())
    await hosted.hears(missed)
    assert Counter(hosted.told) == Counter(positions + missed)


async def test_what_was_not_finished_is_delivered_again_after_a_restart(hosted: Hosted) -> None:
    other = await signed_up(hosted.bus, tenant_on(shard_of(hosted.owner.tenant_id)))
    (first,) = await hosted.change(1)
    rest = await hosted.change(3, owner=other)
    stuck = asyncio.Event()
    hosted.before = lambda record: stuck.wait() if record.position == first else None
    host = hosted.host()
    task = hosted.start(host)
    await hosted.hears(rest)
    assert host.lag(await hosted.log.heads()) == 4
    task.cancel()
    await host.abandon()
    hosted.before = lambda record: None
    hosted.start(hosted.host())
    await hosted.hears([first])
    assert Counter(hosted.told) == Counter([first, *rest, *rest])


async def test_what_was_begun_may_end_when_the_host_does(hosted: Hosted) -> None:
    positions = await hosted.change(2)
    go = asyncio.Event()
    began = asyncio.Event()

    async def wait(record: AnyRecord) -> None:
        began.set()
        await go.wait()

    hosted.before = wait
    host = hosted.host()
    hosted.start(host)
    await began.wait()
    draining = asyncio.create_task(host.drain())
    await asyncio.sleep(0)
    go.set()
    await draining
    assert hosted.told == positions[:1]
    await saved(hosted, positions[0])


async def test_a_record_that_cannot_be_handled_parks_its_stream_and_no_other(hosted: Hosted) -> None:
    other = await signed_up(hosted.bus, tenant_on(shard_of(hosted.owner.tenant_id)))
    positions = await hosted.change(5)
    others = await hosted.change(2, owner=other)
    tries: Counter[int] = Counter()

    def fail_one(record: AnyRecord) -> None:
        tries[record.position] += 1
        if record.position == positions[1]:
            raise ZeroDivisionError("poison")

    hosted.before = fail_one
    host = hosted.host()
    hosted.start(host)
    await hosted.hears(others)
    await until_poisoned(host, 1)
    assert tries[positions[1]] == ATTEMPTS_MAX
    (parked,) = await hosted.parked.streams()
    assert (parked.processor, parked.stream_id) == ("plans", account_of(hosted.owner.tenant_id))
    assert (parked.stuck.position, parked.stuck.type) == (positions[1], "CreditAccount.PlanChanged")
    assert "poison" in parked.stuck.error
    # What is parked is remembered elsewhere; the cursor goes on.
    await saved(hosted, others[-1])
    await hosted.hears(await hosted.change(2, owner=other))
    assert [at for at in hosted.told if at in positions] == positions[:1]


@pytest.mark.parametrize("what", ["retry", "skip"])
async def test_a_parked_stream_goes_on_in_order_when_asked_to(hosted: Hosted, what: Any) -> None:
    positions = await hosted.change(3)

    def fail_one(record: AnyRecord) -> None:
        if record.position == positions[1]:
            raise ZeroDivisionError("poison")

    hosted.before = fail_one
    host = hosted.host()
    hosted.start(host)
    await until_poisoned(host, 1)
    # After a restart it still waits, and so does what comes later.
    await host.abandon()
    hosted.tasks.pop().cancel()
    host = hosted.host()
    hosted.start(host)
    hosted.bus.on_commit = host.offer
    later = await hosted.change(2)
    await saved(hosted, later[-1])
    assert hosted.told == positions[:1]
    if what == "retry":
        hosted.before = lambda record: None
    asked = Asked(what, "ada", "for a test")
    await hosted.parked.ask("plans", account_of(hosted.owner.tenant_id), asked)
    wanted = [positions[0], *(positions[1:] if what == "retry" else positions[2:]), *later]
    await hosted.hears(wanted)
    await until_poisoned(host, 0)
    last = await hosted.change(2)
    await hosted.hears(last)
    assert hosted.told == [*wanted, *last]
    assert [each.stuck.position for each in await hosted.parked.skipped()] == (
        [] if what == "retry" else [positions[1]]
    )


async def test_a_record_whose_handler_fails_for_a_while_is_handled(hosted: Hosted) -> None:
    positions = await hosted.change(1)
    failures = [ZeroDivisionError("now"), LogUnavailable("and then"), LogUnavailable("and again")]

    def fail(record: AnyRecord) -> None:
        if failures:
            raise failures.pop()

    hosted.before = fail
    host = hosted.host()
    hosted.start(host)
    await hosted.hears(positions)
    assert host.poisoned == 0
    await saved(hosted, positions[-1])


async def test_a_log_that_is_away_is_waited_for(hosted: Hosted) -> None:
    class Away(MemoryEventLog):
        away = True

        async def read_after(self, cursors: Any, limit: int) -> Any:
            if self.away:
                raise LogUnavailable("away")
            return await super().read_after(cursors, limit)

        async def cursor(self, reader: str) -> dict[int, int]:
            if self.away:
                raise LogUnavailable("away")
            return await super().cursor(reader)

        async def save_cursor(self, reader: str, positions: Any) -> None:
            if self.away:
                raise LogUnavailable("away")
            await super().save_cursor(reader, positions)

    hosted.log = log = Away()
    hosted.bus = Bus(log, hosted.records, rules())
    hosted.owner = await signed_up(hosted.bus)
    task = hosted.start(hosted.host())
    positions = await hosted.change(3)
    await asyncio.sleep(0.05)
    log.away = False
    await hosted.hears(positions)
    log.away = True
    more = await hosted.change(3)
    await asyncio.sleep(0.05)
    assert not task.done()
    log.away = False
    await hosted.hears(more)


async def test_a_long_backlog_is_caught_up_page_by_page(hosted: Hosted) -> None:
    count = 2 * PAGE + 10
    outcomes = []
    for plan in PLANS * (count // 20):
        outcomes.append(hosted.bus.execute(ChangePlan(tenant_id=hosted.owner.tenant_id, plan=plan), by=BY))
    positions = [outcome.position for outcome in await asyncio.gather(*outcomes)]
    hosted.start(hosted.host())
    await hosted.hears([position for position in positions if position])
    assert max(Counter(hosted.told).values()) == 1


async def test_an_event_from_the_future_stops_no_other(hosted: Hosted) -> None:
    before = await hosted.change(2)
    shard = shard_of(hosted.owner.tenant_id)
    future = stored(hosted.owner.tenant_id, before[-1] + 1, uuid4(), 1)
    await hosted.log.append(Batch({shard: before[-1]}, [future._replace(type="Plan.Celebrated")]))
    host = hosted.host()
    task = hosted.start(host)
    after = await hosted.change(2)
    await hosted.hears(before + after)
    assert not task.done()
    await until_poisoned(host, 1)
    (parked,) = await hosted.parked.streams()
    assert (parked.stream_id, parked.stuck.position) == (future.stream_id, future.position)
    assert "Plan.Celebrated" in parked.stuck.error
    await saved(hosted, after[-1])


async def test_draining_saves_how_far_all_has_come(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oshaani.processor_host.SAVE_S", PATIENCE_S)
    host = hosted.host()
    hosted.start(host)
    positions = await hosted.change(3)
    await hosted.hears(positions)
    assert await hosted.log.cursor(READER) == {}
    await host.drain()
    await saved(hosted, positions[-1])


async def test_what_belongs_to_others_is_not_looked_at(hosted: Hosted) -> None:
    other = UserId(uuid4())
    await signed_up(hosted.bus, other)
    host = hosted.host()
    hosted.start(host)
    (position,) = await hosted.change(1)
    await hosted.hears([position])
    assert hosted.told == [position]
