"""Following the log in a process that serves what others decide."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import pytest

from adapters.memory.event_log import MemoryEventLog
from commands.bus import Bus
from domain.event_log import LogUnavailable
from oshaani.log_tail import LogTail
from schemas.hints import Hint, News
from schemas.records import AnyRecord, Records
from tests.commands.write_side import Owner, memory_records, rules, signed_up

PATIENCE_S = 5.0
LOOK_S = 0.01


class Process:
    """A process with a bus of its own, which follows the log."""

    def __init__(
        self,
        log: MemoryEventLog,
        records: Records,
        is_followed: Callable[[UUID], bool] = lambda turn_id: True,
    ) -> None:
        self.heard: list[AnyRecord] = []
        self.own: list[AnyRecord] = []
        self.tail = LogTail(log, records, self.heard.extend, is_followed)
        self.bus = Bus(log, records, rules(), on_commit=self._committed)

    def _committed(self, records: list[AnyRecord]) -> None:
        self.own.extend(records)
        self.tail.offer(records)


@asynccontextmanager
async def following(process: Process) -> AsyncIterator[Process]:
    task = asyncio.create_task(process.tail.run())
    await eventually(lambda: bool(process.tail._seen))
    try:
        yield process
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def eventually(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)


def places(records: list[AnyRecord]) -> list[tuple[int, int]]:
    return [(record.shard, record.position) for record in records]


async def talk(owner: Owner, bus: Bus, times: int) -> None:
    for _ in range(times):
        await bus.execute(owner.message("Is it so?", conversation_id=uuid4()), by="user:test")


async def test_what_another_process_commits_is_heard_once_and_in_order():
    log, records = MemoryEventLog(), memory_records()
    here, there = Process(log, records), Process(log, records)
    async with following(here):
        await talk(await signed_up(there.bus), there.bus, 5)
        await eventually(lambda: len(here.heard) >= len(there.own))
    assert places(here.heard) == places(there.own)


async def test_what_this_process_commits_is_not_heard_again():
    log, records = MemoryEventLog(), memory_records()
    here, there = Process(log, records), Process(log, records)
    async with following(here):
        owner = await signed_up(there.bus)
        for _ in range(5):
            await talk(owner, here.bus, 1)
            await talk(owner, there.bus, 1)
        await eventually(lambda: set(places(there.own)) <= set(places(here.heard)))
    assert not set(places(here.own)) & set(places(here.heard))
    assert not here.tail._ours


async def test_what_was_there_before_is_not_told():
    log, records = MemoryEventLog(), memory_records()
    here, there = Process(log, records), Process(log, records)
    owner = await signed_up(there.bus)
    before = set(places(there.own))
    async with following(here):
        await talk(owner, there.bus, 1)
        await eventually(lambda: len(here.heard) >= len(there.own) - len(before))
    assert not before & set(places(here.heard))


async def test_personal_text_is_opened_only_where_somebody_wants_it():
    log, records = MemoryEventLog(), memory_records()
    wanted = Process(log, records)
    unwanted = Process(log, records, is_followed=lambda turn_id: False)
    there = Process(log, records)
    async with following(wanted), following(unwanted):
        await talk(await signed_up(there.bus), there.bus, 1)
        await eventually(lambda: len(unwanted.heard) == len(wanted.heard) == len(there.own))

    def contents(process: Process) -> list[str | None]:
        return [r.event.content for r in process.heard if r.type == "Conversation.MessageSent"]

    assert contents(wanted) == ["Is it so?"]
    assert contents(unwanted) == [None]


async def test_only_a_hint_about_a_turn_that_is_followed_is_acted_on_at_once():
    log, records, followed = MemoryEventLog(), memory_records(), uuid4()
    here = Process(log, records, is_followed=lambda turn_id: turn_id == followed)
    async with following(here):

        async def is_woken(turns: frozenset[UUID] | None, head: int = 7) -> bool:
            here.tail._wake.clear()
            await here.tail.hear(Hint({3: head}, turns, ()))
            return here.tail._wake.is_set()

        assert not await is_woken(frozenset({uuid4()}))
        assert not await is_woken(frozenset())
        assert await is_woken(frozenset({uuid4(), followed}))
        assert await is_woken(None)
        assert not await is_woken(frozenset({followed}), head=0)


async def test_what_a_hint_brings_is_not_read(monkeypatch: pytest.MonkeyPatch):
    log, records = MemoryEventLog(), memory_records()
    here, there = Process(log, records), Process(log, records)
    owner = await signed_up(there.bus)
    async with following(here):
        with monkeypatch.context() as broken:
            broken.setattr(log, "read_after", _away)
            news = News()
            there.bus.on_append = news.add
            before = len(there.own)
            for _ in range(3):
                await talk(owner, there.bus, 1)
                hint = news.take()
                assert hint is not None
                await here.tail.hear(hint)
                await here.tail.hear(hint)
                assert places(here.heard) == places(there.own)[before:]


async def test_what_hints_left_out_is_read():
    log, records = MemoryEventLog(), memory_records()
    here, there = Process(log, records), Process(log, records)
    owner = await signed_up(there.bus)
    before = len(there.own)
    async with following(here):
        news = News()
        there.bus.on_append = news.add
        await talk(owner, there.bus, 1)
        news.take()
        await talk(owner, there.bus, 1)
        hint = news.take()
        assert hint is not None
        await here.tail.hear(hint)
        assert not here.heard
        await eventually(lambda: places(here.heard) == places(there.own)[before:])


async def _away(*arguments: object) -> None:
    raise LogUnavailable("away")


async def test_an_outage_of_the_log_loses_nothing():
    class Flaky(MemoryEventLog):
        failures = 3

        async def read_after(self, cursors, limit):  # type: ignore[no-untyped-def]
            if self.failures:
                self.failures -= 1
                raise LogUnavailable("away")
            return await super().read_after(cursors, limit)

    log, records = Flaky(), memory_records()
    here, there = Process(log, records), Process(log, records)
    async with following(here):
        await talk(await signed_up(there.bus), there.bus, 1)
        await eventually(lambda: len(here.heard) == len(there.own))
    assert log.failures == 0
