"""What the bus keeps when Postgres, or the way to it, fails."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from adapters.crypto import new_key
from adapters.memory.object_store import MemoryObjectStore
from adapters.postgres import key_ring
from adapters.postgres.event_log import PostgresEventLog, run_script
from adapters.postgres.key_ring import PostgresKeyRing
from adapters.postgres.pool import open_pool
from commands.bus import Bus
from commands.command import Outcome
from commands.user import LogIn, RegisterUser
from domain.conversation import Conversation
from domain.credit_account import CreditAccount
from domain.event_log import LogUnavailable
from domain.ids import UserId, account_of, shard_of
from domain.user import User
from schemas.records import Records
from tests.commands.conftest import Opened
from tests.commands.write_side import (
    BY,
    TURN_NCR,
    Owner,
    account,
    known,
    log_of,
    memory_records,
    rules,
    signed_up,
)
from tests.peers.proxy import Fault, proxy_before

PATIENCE_S = 15.0
DOWN_S = 6.0  # within which a caller hears that the log cannot be reached
CANARY = "canary-7c1f9e-ünïque"
POLL_S = 0.02


async def eventually_accepted(bus: Bus, owner: Owner) -> Outcome:
    """The first command that gets through."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await bus.execute(owner.message(), by=BY)
            except LogUnavailable:
                await asyncio.sleep(POLL_S)


# --- answers that get lost


@pytest.mark.parametrize("fault", [Fault.CUT_ANSWER, Fault.CUT_REQUEST])
async def test_a_lost_answer_is_given_from_what_was_stored(
    shared_database_url: str, opened: Opened, fault: Fault
) -> None:
    async with proxy_before(shared_database_url) as proxy:
        bus = Bus(await opened(proxy.dsn), memory_records(), rules())
        owner = await signed_up(bus)
        for number in range(1, 6):
            # Everything is in memory, so that the append is what is cut.
            proxy.fault = fault
            outcome = await bus.execute(owner.message(), by=BY)
            assert proxy.fault is Fault.NONE
            # Nobody else has it: whoever asked is the one to go on.
            assert not outcome.seen
            assert outcome.result["queued"] is False
            assert (await account(bus, owner)).held_ncr == number * TURN_NCR


async def test_a_group_whose_answer_was_lost_is_served_once(shared_database_url: str, opened: Opened) -> None:
    async with proxy_before(shared_database_url) as proxy:
        log = await opened(proxy.dsn)
        bus = Bus(log, memory_records(), rules())
        owner = await signed_up(bus)
        proxy.fault = Fault.CUT_ANSWER
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*(bus.execute(owner.message(), by=BY) for _ in range(30)))
        positions = Counter(outcome.position for outcome in outcomes)
        assert len(positions) == 30
        assert (await account(bus, owner)).held_ncr == 30 * TURN_NCR
        rows = await log_of(log, owner.tenant_id)
        assert sum(row.type == "Turn.Accepted" for row in rows) == 30


# --- Postgres is away


async def test_callers_hear_soon_that_postgres_is_away_and_all_is_well_when_it_is_back(
    shared_database_url: str, opened: Opened
) -> None:
    async with proxy_before(shared_database_url) as proxy:
        bus = Bus(await opened(proxy.dsn), memory_records(), rules())
        owner = await signed_up(bus)
        command, id = owner.message(), uuid4()
        proxy.fault = Fault.HALF_OPEN
        began = time.monotonic()
        results = await asyncio.gather(bus.execute(command, by=BY, command_id=id), return_exceptions=True)
        assert [type(result) for result in results] == [LogUnavailable]
        assert time.monotonic() - began < DOWN_S
        proxy.fault = Fault.NONE
        await eventually_accepted(bus, owner)
        # Its fate was unknown; asking again with its id settles it, once.
        await bus.execute(command, by=BY, command_id=id)
        assert (await account(bus, owner)).held_ncr == 2 * TURN_NCR


async def test_a_server_that_refuses_connections_is_unavailable_at_once(
    shared_database_url: str, opened: Opened
) -> None:
    async with proxy_before(shared_database_url) as proxy:
        log = await opened(proxy.dsn)
        bus = Bus(log, memory_records(), rules())
        owner = await signed_up(bus)
        dsn = proxy.dsn
        assert dsn
    # The proxy is gone: connections are cut, and new ones refused.
    began = time.monotonic()
    results = await asyncio.gather(
        *(bus.execute(owner.message(), by=BY) for _ in range(5)), return_exceptions=True
    )
    assert {type(result) for result in results} == {LogUnavailable}
    assert time.monotonic() - began < DOWN_S
    with pytest.raises(LogUnavailable):
        await bus.read(User, uuid4(), UserId(uuid4()))


async def test_connections_ended_by_the_server_are_replaced(shared_database_url: str, opened: Opened) -> None:
    log = await opened(shared_database_url)
    bus = Bus(log, memory_records(), rules())
    owner = await signed_up(bus)
    for number in range(1, 4):
        await end_connections(shared_database_url)
        await eventually_accepted(bus, owner)
        assert (await account(bus, owner)).held_ncr == number * TURN_NCR


async def end_connections(dsn: str) -> None:
    """As a failover or an operator does."""
    query = """
        SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'oshaani'
    """
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(query)


async def test_load_goes_on_while_connections_are_ended(shared_database_url: str, opened: Opened) -> None:
    log = await opened(shared_database_url)
    records = memory_records()
    buses = [Bus(log, records, rules()), Bus(await opened(shared_database_url), records, rules())]
    owner = await signed_up(buses[0])
    commands = [(buses[n % 2], owner.message(), uuid4()) for n in range(200)]

    async def insist(bus: Bus, command: Any, id: Any) -> Outcome:
        while True:
            try:
                return await bus.execute(command, by=BY, command_id=id)
            except LogUnavailable:
                await asyncio.sleep(POLL_S)

    async def disturb() -> None:
        for _ in range(5):
            await end_connections(shared_database_url)
            await asyncio.sleep(POLL_S)

    async def send() -> None:
        for at in range(0, len(commands), 20):
            await asyncio.gather(*(insist(*one) for one in commands[at : at + 20]))

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(send(), disturb())
    fresh = Bus(log, records, rules())
    assert (await account(fresh, owner)).held_ncr == 200 * TURN_NCR
    rows = await log.read_after({shard_of(owner.tenant_id): 0}, 100_000)
    assert [row.position for row in rows] == list(range(1, len(rows) + 1))


# --- personal content


@asynccontextmanager
async def ring_on(dsn: str) -> AsyncIterator[tuple[PostgresKeyRing, AsyncConnectionPool[Any]]]:
    await run_script(dsn, key_ring.TABLES)
    async with open_pool(dsn, 2) as pool:
        yield PostgresKeyRing(pool, new_key()), pool


async def test_personal_text_is_unreadable_in_the_database_and_gone_with_its_key(
    database_url: str, postgres_dsn: str, opened: Opened
) -> None:
    log = await opened(database_url)
    async with ring_on(database_url) as (ring, pool):
        objects = MemoryObjectStore()
        records = Records(ring, objects)
        bus = Bus(log, records, rules())
        tenant = UserId(uuid4())
        register = RegisterUser(tenant_id=tenant, email=f"{CANARY}@example.com", name=CANARY)
        await bus.execute(register, by=BY)
        owner = await signed_up(bus)
        await bus.execute(owner.message(CANARY), by=BY)
        await bus.execute(owner.message(CANARY * 30_000), by=BY)
        assert await rows_with(pool, CANARY) == []
        assert all(CANARY.encode() not in content for content in objects._contents.values())

        opened_records = await records.open(await log_of(log, owner.tenant_id))
        texts = [r.event.content for r in opened_records if isinstance(r.event, Conversation.MessageSent)]
        assert [CANARY in text for text in texts] == [True, True]
        before = known(await account(bus, owner))

        await ring.destroy(owner.tenant_id)
        erased = await records.open(await log_of(log, owner.tenant_id))
        texts = [r.event.content for r in erased if isinstance(r.event, Conversation.MessageSent)]
        assert texts == [None, None]
        fresh = Bus(log, records, rules())
        assert known(await account(fresh, owner)) == before
        # Nobody else's text went with it.
        (registered,) = await records.open(await log_of(log, tenant))
        assert registered.event.name == CANARY
        # Nothing personal can be written any more, and the failure is the command's own.
        neighbour = await signed_up(fresh)
        results = await asyncio.gather(
            fresh.execute(owner.message(CANARY), by=BY),
            fresh.execute(neighbour.message(), by=BY),
            return_exceptions=True,
        )
        assert [isinstance(result, Outcome) for result in results] == [False, True]


async def rows_with(pool: AsyncConnectionPool[Any], text: str) -> list[str]:
    """The tables in which any row, as text or as bytes, holds the text."""
    found = []
    async with pool.connection() as connection:
        tables = await (
            await connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'oshaani'")
        ).fetchall()
        assert {"event", "command", "snapshot", "due"} <= {name for (name,) in tables}
        for (name,) in tables:
            query = f"SELECT count(*) FROM {name} t WHERE t::text LIKE %s OR t::text LIKE %s"
            patterns = (f"%{text}%", f"%{text.encode().hex()}%")
            row = await (await connection.execute(query, patterns)).fetchone()
            if row is not None and row[0]:
                found.append(name)
    return found


async def test_a_key_ring_that_cannot_be_reached_is_an_unavailable_log(
    database_url: str, opened: Opened
) -> None:
    log = await opened(database_url)
    await run_script(database_url, key_ring.TABLES)
    async with proxy_before(database_url) as proxy, open_pool(proxy.dsn, 1) as pool:
        bus = Bus(log, Records(PostgresKeyRing(pool, new_key()), MemoryObjectStore()), rules())
        await bus.execute(RegisterUser(tenant_id=UserId(uuid4()), email="a@b.c", name="A"), by=BY)
        proxy.fault = Fault.HALF_OPEN
        began = time.monotonic()
        results = await asyncio.gather(
            *(
                bus.execute(RegisterUser(tenant_id=UserId(uuid4()), email="a@b.c", name="A"), by=BY)
                for _ in range(3)
            ),
            return_exceptions=True,
        )
        assert {type(result) for result in results} == {LogUnavailable}
        assert time.monotonic() - began < DOWN_S
        proxy.fault = Fault.NONE
        tenant = UserId(uuid4())
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await bus.execute(RegisterUser(tenant_id=tenant, email="a@b.c", name="A"), by=BY)
                    break
                except LogUnavailable:
                    await asyncio.sleep(POLL_S)
        await bus.execute(LogIn(tenant_id=tenant), by=BY)
        assert (await bus.read(CreditAccount, account_of(tenant), tenant)).available_ncr > 0


# --- long streams


async def test_an_account_with_a_long_history_is_loaded_from_its_snapshot(
    postgres_log: PostgresEventLog,
) -> None:
    records = memory_records()
    bus = Bus(postgres_log, records, rules())
    owner = await signed_up(bus)
    await asyncio.gather(*(bus.execute(owner.message(), by=BY) for _ in range(300)))
    place = shard_of(owner.tenant_id), account_of(owner.tenant_id)
    async with asyncio.timeout(PATIENCE_S):
        while not (await postgres_log.sync({}, [place])).snapshots:  # noqa: ASYNC110 - saved behind the caller's back
            await asyncio.sleep(POLL_S)
    synced = await postgres_log.sync({}, [place])
    assert len(synced.streams[place[1]]) < 256
    fresh = Bus(postgres_log, records, rules())
    assert known(await account(fresh, owner)) == known(await account(bus, owner))
    await fresh.execute(owner.message(), by=BY)
    assert (await account(fresh, owner)).held_ncr == 301 * TURN_NCR
