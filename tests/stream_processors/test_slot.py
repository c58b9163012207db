"""No two living processes have one name."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from adapters.memory.leases import MemoryLeases
from domain.event_log import LogUnavailable
from stream_processors import slot as slots
from stream_processors.slot import TTL_S, Slot, SlotLost

PATIENCE_S = 5.0
NAME = "agent_turns-0"
LEASE = f"slot/{NAME}"
ELSEWHERE = "another-host/1/1.0"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RENEW_S", "TAKE_S"):
        monkeypatch.setattr(slots, name, 0.01)


async def soon(work: asyncio.Task[None]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await work


async def test_a_name_that_is_free_is_taken_kept_and_given_back() -> None:
    leases = MemoryLeases()
    slot = Slot(leases, NAME)
    await slot.take()
    keeping = asyncio.create_task(slot.keep())
    await asyncio.sleep(0.05)
    assert await leases.acquire(LEASE, ELSEWHERE, TTL_S) is None
    keeping.cancel()
    await slot.give_back()
    assert await leases.acquire(LEASE, ELSEWHERE, TTL_S) is not None


async def test_a_name_that_another_process_has_is_waited_for() -> None:
    leases = MemoryLeases()
    await leases.acquire(LEASE, ELSEWHERE, TTL_S)
    taking = asyncio.create_task(Slot(leases, NAME).take())
    await asyncio.sleep(0.05)
    assert not taking.done()
    await leases.release(LEASE, ELSEWHERE)
    await soon(taking)


async def test_the_name_of_a_process_that_died_on_this_machine_is_taken_at_once() -> None:
    leases = MemoryLeases()
    mine = Slot(leases, NAME)._holder
    program = "from stream_processors.slot import _this_process; print(_this_process())"
    told = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    dead = told.stdout.strip()
    assert dead.partition("/")[0] == mine.partition("/")[0]
    await leases.acquire(LEASE, dead, 3_600.0)
    await soon(asyncio.create_task(Slot(leases, NAME).take()))


async def test_the_name_of_a_process_whose_number_another_has_now_is_taken_at_once() -> None:
    leases = MemoryLeases()
    mine = Slot(leases, NAME)._holder
    await leases.acquire(LEASE, f"{mine.rpartition('/')[0]}/1.0", 3_600.0)
    await soon(asyncio.create_task(Slot(leases, NAME).take()))


async def test_whoever_loses_the_name_is_told() -> None:
    leases = MemoryLeases()
    slot = Slot(leases, NAME)
    await slot.take()
    keeping = asyncio.create_task(slot.keep())
    await slot.give_back()
    await leases.acquire(LEASE, ELSEWHERE, TTL_S)
    with pytest.raises(SlotLost, match=ELSEWHERE):
        await soon(keeping)


async def test_an_outage_of_the_database_costs_nobody_the_name() -> None:
    class Away(MemoryLeases):
        away = True

        async def acquire(
            self, name: str, holder: str, ttl_s: float, *, from_earlier_life: bool = False
        ) -> int | None:
            if self.away:
                raise LogUnavailable("away")
            return await super().acquire(name, holder, ttl_s, from_earlier_life=from_earlier_life)

    leases = Away()
    slot = Slot(leases, NAME)
    taking = asyncio.create_task(slot.take())
    await asyncio.sleep(0.05)
    leases.away = False
    await soon(taking)
    keeping = asyncio.create_task(slot.keep())
    leases.away = True
    await asyncio.sleep(0.05)
    leases.away = False
    await asyncio.sleep(0.05)
    assert not keeping.done()
    keeping.cancel()
