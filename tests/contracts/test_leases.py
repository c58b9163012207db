"""What every store of leases keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import psycopg
import pytest

from adapters.memory.leases import MemoryLeases
from adapters.postgres import leases as postgres_leases
from adapters.postgres.event_log import run_script
from adapters.postgres.leases import CALL_S, PostgresLeases
from adapters.postgres.pool import open_pool
from domain.event_log import LogUnavailable
from domain.leases import Leases, Mark
from tests.peers.proxy import Fault, proxy_before

HOUR_S = 3_600.0
SHORT_S = 0.2
PATIENCE_S = 5.0
MARGIN_S = 2.0
RIVALS = 10


@pytest.fixture(params=["memory", "postgres"])
async def two(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Leases, Leases]]:
    """The same leases, seen by two processes."""
    if request.param == "memory":
        leases = MemoryLeases()
        yield leases, leases
        return
    url = request.getfixturevalue("database_url")
    await run_script(url, postgres_leases.TABLES)
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(open_pool(url, 2)) for _ in range(2)]
        yield PostgresLeases(one), PostgresLeases(other)


@pytest.fixture
def leases(two: tuple[Leases, Leases]) -> Leases:
    return two[0]


async def acquired(leases: Leases, name: str, holder: str, ttl_s: float = HOUR_S) -> int:
    """Its epoch, as soon as it can be had."""
    async with asyncio.timeout(PATIENCE_S):
        while (epoch := await leases.acquire(name, holder, ttl_s)) is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(SHORT_S / 10)
    return epoch


async def test_a_lease_is_had_by_one(two: tuple[Leases, Leases]) -> None:
    one, other = two
    assert await one.acquire("relay/0", "a", HOUR_S) == 1
    assert await other.acquire("relay/0", "b", HOUR_S) is None
    assert await other.acquire("relay/1", "b", HOUR_S) == 1
    assert [(lease.name, lease.holder, lease.epoch) for lease in await one.held()] == [
        ("relay/0", "a", 1),
        ("relay/1", "b", 1),
    ]


async def test_of_many_who_want_a_lease_at_once_one_gets_it(two: tuple[Leases, Leases]) -> None:
    for attempt in range(5):
        name = f"relay/{attempt}"
        epochs = await asyncio.gather(
            *(two[n % 2].acquire(name, f"rival {n}", HOUR_S) for n in range(RIVALS))
        )
        assert [epoch for epoch in epochs if epoch is not None] == [1]


async def test_of_many_who_want_an_expired_lease_one_gets_it(two: tuple[Leases, Leases]) -> None:
    await two[0].acquire("relay/0", "gone", 0.0)
    epochs = await asyncio.gather(
        *(two[n % 2].acquire("relay/0", f"rival {n}", HOUR_S) for n in range(RIVALS))
    )
    assert [epoch for epoch in epochs if epoch is not None] == [2]


async def test_its_holder_prolongs_a_lease_and_keeps_its_epoch(leases: Leases) -> None:
    assert await leases.acquire("relay/0", "a", SHORT_S) == 1
    first = (await leases.held())[0].expires_at
    assert await leases.acquire("relay/0", "a", HOUR_S) == 1
    assert (await leases.held())[0].expires_at > first
    assert await leases.acquire("relay/0", "b", HOUR_S) is None


async def test_an_expired_lease_that_nobody_took_is_still_its_holders(leases: Leases) -> None:
    assert await leases.acquire("relay/0", "a", 0.0) == 1
    assert await leases.held() == []
    assert await leases.acquire("relay/0", "a", HOUR_S) == 1


async def test_an_expired_lease_can_be_taken_and_its_epoch_grows(two: tuple[Leases, Leases]) -> None:
    assert await two[0].acquire("relay/0", "a", SHORT_S) == 1
    assert await acquired(two[1], "relay/0", "b") == 2


async def test_a_paused_holder_learns_that_it_lost(two: tuple[Leases, Leases]) -> None:
    one, other = two
    assert await one.acquire("relay/0", "a", 0.0) == 1
    assert await other.acquire("relay/0", "b", HOUR_S) == 2
    assert await one.acquire("relay/0", "a", HOUR_S) is None
    await other.release("relay/0", "b")
    # Taken and given back while it slept: it has the lease again, and sees that it was another's.
    assert await one.acquire("relay/0", "a", HOUR_S) == 3


async def test_a_released_lease_can_be_taken_at_once_and_its_epoch_grows(two: tuple[Leases, Leases]) -> None:
    one, other = two
    assert await one.acquire("relay/0", "a", HOUR_S) == 1
    await one.release("relay/0", "a")
    assert await one.held() == []
    assert await other.acquire("relay/0", "b", HOUR_S) == 2


async def test_nobody_releases_the_lease_of_another(leases: Leases) -> None:
    await leases.acquire("relay/0", "a", HOUR_S)
    await leases.release("relay/0", "b")
    await leases.release("relay/9", "b")
    assert [lease.holder for lease in await leases.held()] == ["a"]


async def test_the_next_life_of_a_slot_takes_over_at_once_if_it_asks_for_that(leases: Leases) -> None:
    assert await leases.acquire("relay/0", "one/first", HOUR_S) == 1
    assert await leases.acquire("relay/0", "one/second", HOUR_S) is None
    assert await leases.acquire("relay/0", "other/second", HOUR_S, from_earlier_life=True) is None
    assert await leases.acquire("relay/0", "one/second", HOUR_S, from_earlier_life=True) == 2
    assert await leases.acquire("relay/0", "one/first", HOUR_S) is None


async def test_no_epoch_comes_twice(two: tuple[Leases, Leases]) -> None:
    epochs = []
    for n in range(6):
        leases, holder = two[n % 2], str(uuid4())
        epochs.append(await acquired(leases, "relay/0", holder, 0.0 if n % 3 else HOUR_S))
        if n % 3 == 0:
            await leases.release("relay/0", holder)
    assert epochs == sorted(set(epochs))


# --- marks


async def test_marks_are_kept_under_the_epoch_of_the_lease(leases: Leases) -> None:
    epoch = await acquired(leases, "relay/0", "a")
    first = [Mark("log", 0, 3, 17), Mark("log", 4, 1, 1, began=0), Mark("work", 0, 3, 2, began=2)]
    assert await leases.save_marks("relay/0", epoch, first)
    assert await leases.save_marks("relay/0", epoch, [Mark("log", 0, 4, 18)])
    assert await leases.marks() == [Mark("log", 0, 4, 18), *first[1:]]
    assert await leases.save_marks("relay/0", epoch, [])
    assert await leases.save_marks("relay/0", epoch, [Mark("log", 0, 2, 9)])
    assert (await leases.marks())[0] == Mark("log", 0, 2, 9)


async def test_who_lost_the_lease_saves_nothing(two: tuple[Leases, Leases]) -> None:
    one, other = two
    old = await acquired(one, "relay/0", "a", 0.0)
    assert await one.save_marks("relay/0", old, [Mark("log", 0, 5, 5)])
    new = await acquired(other, "relay/0", "b")
    assert not await one.save_marks("relay/0", old, [Mark("log", 0, 6, 6), Mark("log", 4, 6, 6)])
    assert not await one.save_marks("relay/0", old, [])
    assert not await one.save_marks("relay/7", 1, [Mark("log", 3, 6, 6)])
    assert await other.marks() == [Mark("log", 0, 5, 5)]
    assert await other.save_marks("relay/0", new, [Mark("log", 0, 7, 7)])


async def test_rewinding_takes_the_lease_away(two: tuple[Leases, Leases]) -> None:
    one, other = two
    epoch = await acquired(one, "relay/0", "a")
    await one.save_marks("relay/0", epoch, [Mark("log", 0, 5, 5), Mark("log", 4, 5, 5)])
    await other.rewind("relay/0", [Mark("log", 0, 2, 5)])
    assert await one.marks() == [Mark("log", 0, 2, 5), Mark("log", 4, 5, 5)]
    assert not await one.save_marks("relay/0", epoch, [Mark("log", 0, 6, 6)])
    again = await acquired(one, "relay/0", "a")
    assert again > epoch
    assert await one.save_marks("relay/0", again, [Mark("log", 0, 3, 6)])


async def test_marks_can_be_set_before_anybody_held_the_lease(leases: Leases) -> None:
    await leases.rewind("relay/0", [Mark("log", 0, 2, 0)])
    assert await leases.marks() == [Mark("log", 0, 2, 0)]
    assert await leases.acquire("relay/0", "a", HOUR_S) == 2


# --- PostgreSQL


async def test_a_save_that_races_with_a_new_holder_is_before_it_or_refused(database_url: str) -> None:
    await run_script(database_url, postgres_leases.TABLES)
    async with open_pool(database_url, 4) as pool:
        leases = PostgresLeases(pool)
        for n in range(20):
            name = f"relay/{n}"
            old = await acquired(leases, name, "a", 0.0)

            async def take_over(name: str) -> list[Mark]:
                await acquired(leases, name, "b")
                return await leases.marks()

            mark = Mark("log", n, 1, 1)
            saved, seen = await asyncio.gather(leases.save_marks(name, old, [mark]), take_over(name))
            assert saved == (mark in seen) == (mark in await leases.marks())


async def test_a_database_that_does_not_answer_is_unavailable_in_time(database_url: str) -> None:
    await run_script(database_url, postgres_leases.TABLES)
    async with proxy_before(database_url) as proxy, open_pool(proxy.dsn, 1) as pool:
        leases = PostgresLeases(pool)
        await leases.acquire("relay/0", "a", HOUR_S)
        proxy.fault = Fault.HALF_OPEN
        async with asyncio.timeout(CALL_S + MARGIN_S):
            with pytest.raises(LogUnavailable):
                await leases.acquire("relay/0", "a", HOUR_S)


async def test_a_missing_table_is_said(database_url: str) -> None:
    async with open_pool(database_url, 1) as pool:
        with pytest.raises(LogUnavailable, match='relation "lease" does not exist'):
            await PostgresLeases(pool).held()


async def test_clocks_of_the_machines_do_not_matter(database_url: str) -> None:
    await run_script(database_url, postgres_leases.TABLES)
    async with (
        open_pool(database_url, 1) as pool,
        await psycopg.AsyncConnection.connect(database_url) as connection,
    ):
        await PostgresLeases(pool).acquire("relay/0", "a", HOUR_S)
        cursor = await connection.execute(
            "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM oshaani.lease"
        )
        row = await cursor.fetchone()
        assert row is not None
        assert HOUR_S - PATIENCE_S < row[0] <= HOUR_S
