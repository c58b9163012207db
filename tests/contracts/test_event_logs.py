"""What every event log keeps."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from adapters.memory.event_log import MemoryEventLog
from adapters.postgres.event_log import CALL_S, PostgresEventLog
from adapters.postgres.pool import CONNECT_S
from domain.event_log import (
    STREAM_EVENTS_MAX,
    SYNC_EVENTS_MAX,
    Batch,
    CommandSeen,
    DueRow,
    EventLog,
    HeadMoved,
    LogUnavailable,
    Snapshot,
    StoredEvent,
)
from domain.ids import SHARDS, shard_of
from tests.peers.log_rows import batch_after, due, happened, served, stored, tenant_on
from tests.peers.proxy import Fault, proxy_before

PATIENCE_S = 5.0
POLL_S = 0.02
MARGIN_S = 2.0
MEGABYTE = 1_000_000
DUE_MAX = 10_000
NEVER_S = 3_600.0
ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def now() -> datetime:
    return datetime.now(UTC)


def in_seconds(seconds: float) -> datetime:
    return now() + timedelta(seconds=seconds)


async def until(ask: Callable[[], Awaitable[T]], within_s: float = PATIENCE_S) -> T:
    """What `ask` answers as soon as that is true."""
    async with asyncio.timeout(within_s):
        while not (answer := await ask()):  # noqa: ASYNC110 - a log tells nobody; it is asked
            await asyncio.sleep(POLL_S)
    return answer


async def opened(dsn: str) -> PostgresEventLog:
    log = PostgresEventLog(dsn)
    await log.migrate()
    await log.open()
    return log


@pytest.fixture(scope="module")
def shared_url(postgres_dsn: str) -> Iterator[str]:
    """One database for the whole suite: its tests tell their events apart by tenant."""
    name = f"oshaani_test_{uuid4().hex}"
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield urlunsplit(urlsplit(postgres_dsn)._replace(path=f"/{name}"))
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
async def postgres(shared_url: str) -> AsyncIterator[PostgresEventLog]:
    log = await opened(shared_url)
    async with await psycopg.AsyncConnection.connect(shared_url, autocommit=True) as connection:
        await connection.execute("DELETE FROM oshaani.due")
        await connection.execute("DELETE FROM oshaani.worker")
    yield log
    await log.close()


@pytest.fixture(params=["memory", "postgres"])
def log(request: pytest.FixtureRequest) -> EventLog:
    if request.param == "memory":
        return MemoryEventLog()
    postgres: EventLog = request.getfixturevalue("postgres")
    return postgres


@pytest.fixture
def tenant() -> UUID:
    return uuid4()


async def all_of(log: EventLog, shard: int, after: int = 0) -> list[StoredEvent]:
    return await log.read_after({shard: after}, 100_000)


# --- appending


async def test_positions_are_dense_and_in_commit_order_per_shard(log: EventLog) -> None:
    one, other = tenant_on(3), tenant_on(4)
    before = await log.heads()
    streams = [uuid4() for _ in range(3)]
    for version in (1, 2, 3):
        for stream_id in streams:
            await happened(log, one, stream_id, version)
        await happened(log, other, streams[0], version)
    events = await all_of(log, 3, before[3])
    assert [event.position for event in events] == list(range(before[3] + 1, before[3] + 10))
    assert [(event.stream_id, event.stream_version) for event in events] == [
        (stream_id, version) for version in (1, 2, 3) for stream_id in streams
    ]
    assert (await log.heads())[3] == before[3] + 9
    assert (await log.heads())[4] == before[4] + 3


async def test_every_shard_has_a_head(log: EventLog) -> None:
    assert sorted(await log.heads()) == list(range(SHARDS))


async def test_writers_that_decide_again_when_the_head_moved_lose_nothing(
    log: EventLog, tenant: UUID
) -> None:
    async def write(stream_id: UUID) -> None:
        version = 1
        while version <= 5:
            with suppress(HeadMoved):
                await happened(log, tenant, stream_id, version)
                version += 1

    before = (await log.heads())[shard_of(tenant)]
    streams = [uuid4() for _ in range(8)]
    await asyncio.wait_for(asyncio.gather(*(write(stream_id) for stream_id in streams)), PATIENCE_S)
    events = await all_of(log, shard_of(tenant), before)
    assert [event.position for event in events] == list(range(before + 1, before + 41))
    for stream_id in streams:
        assert [e.stream_version for e in events if e.stream_id == stream_id] == [1, 2, 3, 4, 5]


async def test_bytes_come_back_as_they_went_in(log: EventLog, tenant: UUID) -> None:
    head = (await log.heads())[shard_of(tenant)]
    event = stored(tenant, head + 1, uuid4(), 1, bytes(range(256)), uuid4())._replace(
        schema_version=7,
        personal=b"\x00sealed\xff",
        subject_id=uuid4(),
        correlation_id=uuid4(),
        causation_id=uuid4(),
        actor="user:Zażółć 🦊 'quoted' {braces} \\ \" NULL",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    bare = stored(tenant, head + 2, event.stream_id, 2, b"")._replace(personal=b"", traceparent="")
    at = await log.append(Batch({event.shard: head}, [event, bare]))
    expected = [event._replace(recorded_at=at), bare._replace(recorded_at=at)]
    for found in (
        await log.read_stream(event.shard, event.stream_id, 2),
        await all_of(log, event.shard, head),
        (await log.sync({}, [(event.shard, event.stream_id)])).streams[event.stream_id],
    ):
        assert found == expected
        assert {type(part) for each in found for part in (each.payload, each.personal)} == {bytes}


async def test_payloads_of_a_megabyte_go_through(log: EventLog, tenant: UUID) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    head = (await log.heads())[shard]
    payloads = [os.urandom(MEGABYTE), b"x" * MEGABYTE, os.urandom(MEGABYTE)]
    events = [stored(tenant, head + n, stream_id, n, payload) for n, payload in enumerate(payloads, 1)]
    await asyncio.wait_for(log.append(Batch({shard: head}, events)), PATIENCE_S)
    assert [event.payload for event in await log.read_stream(shard, stream_id, 3)] == payloads


async def test_the_time_of_record_is_of_the_logs_clock_and_never_runs_backwards(
    log: EventLog, tenant: UUID
) -> None:
    stream_id, before = uuid4(), now()
    times = [(await happened(log, tenant, stream_id, version))[0].recorded_at for version in range(1, 6)]
    events = await log.read_stream(shard_of(tenant), stream_id, 5)
    assert [event.recorded_at for event in events] == times
    known = [at for at in times if at is not None]
    assert known == sorted(known)
    assert all(at.utcoffset() == timedelta(0) for at in known)
    assert before - timedelta(seconds=MARGIN_S) < known[0] <= known[-1] < in_seconds(MARGIN_S)


async def test_the_clock_of_a_log_in_memory_can_be_chosen(tenant: UUID) -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=UTC)
    log = MemoryEventLog(lambda: noon)
    assert [event.recorded_at for event in await happened(log, tenant, uuid4(), 1)] == [noon]


async def test_a_batch_is_all_or_nothing(log: EventLog) -> None:
    one, other, taken, fresh, command_id = tenant_on(5), tenant_on(6), uuid4(), uuid4(), uuid4()
    await happened(log, one, taken, 1)
    heads = await log.heads()
    batch = Batch(
        {5: heads[5], 6: heads[6]},
        [stored(other, heads[6] + 1, fresh, 1), stored(one, heads[5] + 1, taken, 1)],
        [served(other, command_id, position=heads[6] + 1)],
        [due(other, fresh, now())],
    )
    with pytest.raises(HeadMoved):
        await log.append(batch)
    assert await log.heads() == heads
    assert await log.read_stream(6, fresh, 1) == []
    assert await log.commands([(6, command_id)]) == {}
    assert await mine(log, other) == []


async def test_a_moved_head_writes_nothing(log: EventLog, tenant: UUID) -> None:
    shard, late, command_id = shard_of(tenant), uuid4(), uuid4()
    batch = await batch_after(log, tenant, (late, 1))
    batch.commands.append(served(tenant, command_id))
    await happened(log, tenant, uuid4(), 1)
    heads = await log.heads()
    for head in (batch.heads[shard], heads[shard] + 1):
        moved = Batch({shard: head}, [batch.events[0]._replace(position=head + 1)], batch.commands)
        with pytest.raises(HeadMoved):
            await log.append(moved)
    assert await log.heads() == heads
    assert await log.read_stream(shard, late, 1) == []
    assert await log.commands([(shard, command_id)]) == {}


async def test_the_head_of_each_shard_of_a_batch_is_proved_also_of_those_without_events(
    log: EventLog,
) -> None:
    one, other = tenant_on(7), tenant_on(8)
    batch = await batch_after(log, one, (uuid4(), 1))
    batch.heads[8] = (await log.heads())[8]
    await happened(log, other, uuid4(), 1)
    with pytest.raises(HeadMoved):
        await log.append(batch)
    assert (await log.heads())[7] == batch.heads[7]


async def test_what_was_based_on_other_streams_than_those_that_changed_is_written_behind_them(
    log: EventLog,
) -> None:
    one, other = tenant_on(9), tenant_on(10)
    on_one, on_other, elsewhere, commands = uuid4(), uuid4(), uuid4(), [uuid4(), uuid4(), uuid4()]
    batch = await batch_after(log, one, (on_one, 1), (on_one, 2))
    heads = await log.heads()
    batch.heads |= {10: heads[10]}
    batch.events.append(stored(other, heads[10] + 1, on_other, 1))
    batch.commands += [
        served(one, commands[0], position=heads[9] + 2),
        served(one, commands[1], "insufficient_credits"),
        served(other, commands[2], position=heads[10] + 1),
    ]
    batch.due.append(due(one, on_one, now()))
    batch.based_on = [on_one, on_other, uuid4()]
    await happened(log, one, elsewhere, 1, 2, 3)
    at = await log.append(batch)
    assert (batch.moved, batch.heads) == ({9: 3, 10: 0}, {9: heads[9] + 3, 10: heads[10]})
    assert [event.position for event in batch.events] == [heads[9] + 4, heads[9] + 5, heads[10] + 1]
    assert [row.position for row in batch.commands] == [heads[9] + 5, 0, heads[10] + 1]
    assert await log.heads() == heads | {9: heads[9] + 5, 10: heads[10] + 1}
    rows = await log.read_after({9: heads[9], 10: heads[10]}, 10)
    assert [row.position - heads[row.shard] for row in rows] == [1, 2, 3, 4, 5, 1]
    assert rows[3:] == [event._replace(recorded_at=at) for event in batch.events]
    found = await log.commands([(shard_of(one), commands[0]), (9, commands[1]), (10, commands[2])])
    assert [found[id] for id in commands] == batch.commands
    assert [row.id for row in await mine(log, one)] == [on_one]


async def test_what_was_based_on_a_stream_that_changed_is_not_written(log: EventLog) -> None:
    one, other = tenant_on(11), tenant_on(12)
    fresh, seen, command_id = uuid4(), uuid4(), uuid4()
    await happened(log, other, seen, 1)
    batch = await batch_after(log, one, (fresh, 1))
    batch.heads |= {12: (await log.heads())[12]}
    batch.commands.append(served(one, command_id, position=batch.events[0].position))
    batch.based_on = [fresh, seen]
    await happened(log, one, uuid4(), 1)
    await happened(log, other, uuid4(), 1)
    await happened(log, other, seen, 2)
    heads = await log.heads()
    with pytest.raises(HeadMoved):
        await log.append(batch)
    assert await log.heads() == heads
    assert await log.read_stream(11, fresh, 1) == []
    assert await log.commands([(11, command_id)]) == {}
    assert batch.moved == {}


async def test_a_head_that_the_log_has_not_reached_is_wrong_whatever_it_was_based_on(
    log: EventLog, tenant: UUID
) -> None:
    batch = await batch_after(log, tenant, (uuid4(), 1))
    (shard,) = batch.heads
    batch.heads[shard] += 1
    batch.events = [batch.events[0]._replace(position=batch.heads[shard] + 1)]
    batch.based_on = []
    with pytest.raises(HeadMoved):
        await log.append(batch)


async def test_what_is_far_behind_is_not_written_whatever_it_was_based_on(
    log: EventLog, tenant: UUID
) -> None:
    batch = await batch_after(log, tenant, (uuid4(), 1))
    batch.based_on = []
    await happened(log, tenant, uuid4(), *range(1, SYNC_EVENTS_MAX + 2))
    with pytest.raises(HeadMoved):
        await log.append(batch)


async def test_a_command_that_was_seen_is_seen_also_behind_what_others_wrote(
    log: EventLog, tenant: UUID
) -> None:
    command_id, stream_id = uuid4(), uuid4()
    batch = await batch_after(log, tenant, (stream_id, 1))
    batch.commands.append(served(tenant, command_id, position=batch.events[0].position))
    batch.based_on = [stream_id]
    before = await batch_after(log, tenant, (uuid4(), 1))
    before.commands.append(served(tenant, command_id, position=before.events[0].position))
    await log.append(before)
    with pytest.raises(CommandSeen):
        await log.append(batch)
    assert await log.read_stream(shard_of(tenant), stream_id, 1) == []


async def test_a_version_of_a_stream_is_written_once(log: EventLog, tenant: UUID) -> None:
    stream_id = uuid4()
    await happened(log, tenant, stream_id, 1, 2)
    heads = await log.heads()
    with pytest.raises(HeadMoved):
        await happened(log, tenant, stream_id, 2)
    with pytest.raises(HeadMoved):
        await happened(log, tenant, stream_id, 3, 3)
    assert await log.heads() == heads
    await happened(log, tenant, stream_id, 3)


# --- commands


async def test_a_seen_command_writes_nothing(log: EventLog, tenant: UUID) -> None:
    shard, command_id, stream_id = shard_of(tenant), uuid4(), uuid4()
    first = await batch_after(log, tenant, (stream_id, 1))
    first.commands.append(served(tenant, command_id, position=first.events[0].position))
    await log.append(first)
    heads = await log.heads()
    again = await batch_after(log, tenant, (stream_id, 2))
    fresh = uuid4()
    again.commands += [served(tenant, fresh), served(tenant, command_id, outcome="other")]
    with pytest.raises(CommandSeen):
        await log.append(again)
    assert await log.heads() == heads
    assert await log.commands([(shard, command_id), (shard, fresh)]) == {command_id: first.commands[0]}


async def test_a_refusal_that_is_not_remembered_may_be_tried_again(log: EventLog, tenant: UUID) -> None:
    shard, command_id = shard_of(tenant), uuid4()
    for outcome in ("insufficient_credits", "plan_limit_exceeded"):
        refused = await batch_after(log, tenant)
        refused.commands.append(served(tenant, command_id, outcome, remembered=False))
        await log.append(refused)
        assert (await log.commands([(shard, command_id)]))[command_id].outcome == outcome
    accepted = await batch_after(log, tenant, (uuid4(), 1))
    accepted.commands.append(served(tenant, command_id, position=accepted.events[0].position))
    await log.append(accepted)
    assert await log.commands([(shard, command_id)]) == {command_id: accepted.commands[0]}
    with pytest.raises(CommandSeen):
        await log.append(
            Batch({shard: accepted.heads[shard] + 1}, commands=[served(tenant, command_id, remembered=False)])
        )


async def test_commands_nobody_asked_are_not_known(log: EventLog, tenant: UUID) -> None:
    assert await log.commands([(shard_of(tenant), uuid4())]) == {}
    assert await log.commands([]) == {}


# --- reading


async def test_sync_gives_newer_events_and_whole_streams(log: EventLog) -> None:
    one, other, stream_id, elsewhere, unknown = tenant_on(9), tenant_on(10), uuid4(), uuid4(), uuid4()
    old = await happened(log, one, stream_id, 1)
    heads = await log.heads()
    new = await happened(log, one, stream_id, 2)
    far = await happened(log, other, elsewhere, 1)
    synced = await log.sync({9: heads[9], 10: heads[10]}, [(9, stream_id), (10, elsewhere), (9, unknown)])
    assert synced.heads == {9: heads[9] + 1, 10: heads[10] + 1}
    assert synced.newer == [*new, *far]
    assert synced.streams == {stream_id: [*old, *new], elsewhere: far, unknown: []}


async def test_sync_tells_the_heads_of_the_streams_shards_too(log: EventLog) -> None:
    heads = await log.heads()
    synced = await log.sync({}, [(11, uuid4())])
    assert (synced.heads, synced.newer) == ({11: heads[11]}, [])
    assert (await log.sync({}, [])).heads == {}


async def test_sync_is_of_one_instant(log: EventLog, tenant: UUID) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    start = (await log.heads())[shard]
    done = asyncio.Event()

    async def write() -> None:
        for version in range(1, 41):
            await happened(log, tenant, stream_id, version)
            await asyncio.sleep(0)
        done.set()

    writing = asyncio.create_task(write())
    while not done.is_set():
        synced = await log.sync({shard: start}, [(shard, stream_id)])
        assert len(synced.newer) == synced.heads[shard] - start
        assert synced.newer == synced.streams[stream_id]
        await asyncio.sleep(0)
    await asyncio.wait_for(writing, PATIENCE_S)


async def test_sync_reports_a_shard_too_far_ahead_without_its_events(log: EventLog, tenant: UUID) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    start = (await log.heads())[shard]
    await happened(log, tenant, stream_id, *range(1, SYNC_EVENTS_MAX + 2))
    synced = await log.sync({shard: start}, [])
    assert (synced.heads[shard], synced.newer) == (start + SYNC_EVENTS_MAX + 1, [])
    synced = await log.sync({shard: start + 1}, [])
    assert len(synced.newer) == SYNC_EVENTS_MAX


async def test_read_after_pages_in_order(log: EventLog) -> None:
    tenants = {shard: tenant_on(shard) for shard in (12, 13)}
    heads = await log.heads()
    start = cursors = {shard: heads[shard] for shard in tenants}
    written: list[StoredEvent] = []
    for tenant_id in tenants.values():
        written += await happened(log, tenant_id, uuid4(), *range(1, 6))
    found: list[StoredEvent] = []
    while page := await log.read_after(cursors, 3):
        assert len(page) <= 3
        found += page
        cursors = {**cursors, **{event.shard: event.position for event in page}}
    assert found == written
    assert cursors == {shard: head + 5 for shard, head in start.items()}
    assert await log.read_after({}, 3) == []


async def test_read_stream_gives_the_last_events_ascending(log: EventLog, tenant: UUID) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    events = await happened(log, tenant, stream_id, *range(1, 6))
    await happened(log, tenant, uuid4(), 1)
    assert await log.read_stream(shard, stream_id, 2) == events[3:]
    assert await log.read_stream(shard, stream_id, 100) == events
    assert await log.read_stream(shard, stream_id, 0) == []
    assert await log.read_stream(shard, uuid4(), 2) == []


async def test_read_stream_after_pages_through_a_stream(log: EventLog, tenant: UUID) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    events = await happened(log, tenant, stream_id, *range(1, 6))
    await happened(log, tenant, uuid4(), 1)
    assert await log.read_stream_after(shard, stream_id, 0, 2) == events[:2]
    assert await log.read_stream_after(shard, stream_id, 2, 100) == events[2:]
    assert await log.read_stream_after(shard, stream_id, 5, 2) == []
    assert await log.read_stream_after(shard, uuid4(), 0, 2) == []


async def test_sync_gives_the_first_events_of_a_very_long_stream(log: EventLog, tenant: UUID) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    events = await happened(log, tenant, stream_id, *range(1, STREAM_EVENTS_MAX + 3))
    synced = await log.sync({}, [(shard, stream_id)])
    assert synced.streams[stream_id] == events[:STREAM_EVENTS_MAX]
    assert await log.read_stream_after(shard, stream_id, STREAM_EVENTS_MAX, 100) == events[STREAM_EVENTS_MAX:]
    async with log.locked([shard]) as locked:
        head = synced.heads[shard]
        await locked.append(
            Batch({shard: head}, [stored(tenant, head + 1, stream_id, STREAM_EVENTS_MAX + 3)])
        )
        assert (await locked.sync({}, [(shard, stream_id)])).streams[stream_id] == events[:STREAM_EVENTS_MAX]


# --- snapshots and cursors


def snapshot_of(tenant: UUID, stream_id: UUID, version: int, schema: str = "Test/1") -> Snapshot:
    return Snapshot(shard_of(tenant), stream_id, version, tenant, schema, b"\x00state\xff")


async def test_a_stream_begins_after_its_snapshot(log: EventLog, tenant: UUID) -> None:
    shard, stream_id, other = shard_of(tenant), uuid4(), uuid4()
    events = await happened(log, tenant, stream_id, *range(1, 6))
    rest = await happened(log, tenant, other, 1)
    await log.save_snapshot(snapshot_of(tenant, stream_id, 3))
    synced = await log.sync({}, [(shard, stream_id), (shard, other)])
    assert synced.snapshots == {stream_id: snapshot_of(tenant, stream_id, 3)}
    assert synced.streams == {stream_id: events[3:], other: rest}
    assert await log.read_stream(shard, stream_id, 5) == events


async def test_a_snapshot_is_replaced_by_a_newer_one_or_one_of_another_form(
    log: EventLog, tenant: UUID
) -> None:
    stream_id = uuid4()
    await happened(log, tenant, stream_id, *range(1, 6))
    for saved, kept in [
        (snapshot_of(tenant, stream_id, 3), snapshot_of(tenant, stream_id, 3)),
        (snapshot_of(tenant, stream_id, 2), snapshot_of(tenant, stream_id, 3)),
        (snapshot_of(tenant, stream_id, 4), snapshot_of(tenant, stream_id, 4)),
        (snapshot_of(tenant, stream_id, 1, "Test/2"), snapshot_of(tenant, stream_id, 1, "Test/2")),
    ]:
        await log.save_snapshot(saved)
        synced = await log.sync({}, [(shard_of(tenant), stream_id)])
        assert synced.snapshots == {stream_id: kept}


async def test_a_reader_finds_how_far_it_has_come_and_never_goes_back(log: EventLog) -> None:
    reader, other = f"reader-{uuid4()}", f"reader-{uuid4()}"
    assert await log.cursor(reader) == {}
    await log.save_cursor(reader, {1: 10, 2: 20})
    await log.save_cursor(reader, {1: 11, 2: 19, 3: 0})
    await log.save_cursor(other, {1: 1})
    assert await log.cursor(reader) == {1: 11, 2: 20, 3: 0}
    assert await log.cursor(other) == {1: 1}


# --- locking


async def test_a_lock_keeps_others_out_and_its_append_is_visible_after(log: EventLog, tenant: UUID) -> None:
    shard, mine_id, theirs_id = shard_of(tenant), uuid4(), uuid4()
    start = (await log.heads())[shard]
    other = await batch_after(log, tenant, (theirs_id, 1))
    async with log.locked([shard]) as locked:
        theirs = asyncio.create_task(log.append(other))
        synced = await locked.sync({shard: start}, [(shard, mine_id)])
        assert (synced.heads, synced.newer, synced.streams) == ({shard: start}, [], {mine_id: []})
        first = stored(tenant, start + 1, mine_id, 1)
        at = await locked.append(Batch({shard: start}, [first], [served(tenant, mine_id)]))
        synced = await locked.sync({shard: start}, [(shard, mine_id)])
        assert synced.heads == {shard: start + 1}
        assert synced.newer == synced.streams[mine_id] == [first._replace(recorded_at=at)]
        await locked.append(Batch({shard: start + 1}, [stored(tenant, start + 2, mine_id, 2)]))
        assert (await log.heads())[shard] == start
        assert await log.read_stream(shard, mine_id, 2) == []
        assert not theirs.done()
    with pytest.raises(HeadMoved):
        await asyncio.wait_for(theirs, PATIENCE_S)
    assert [event.stream_id for event in await all_of(log, shard, start)] == [mine_id, mine_id]
    assert list(await log.commands([(shard, mine_id)])) == [mine_id]


async def test_a_lock_that_ends_with_an_error_writes_nothing_and_lets_others_in(
    log: EventLog, tenant: UUID
) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    start = (await log.heads())[shard]
    with pytest.raises(ZeroDivisionError):
        async with log.locked([shard]) as locked:
            batch = Batch({shard: start}, [stored(tenant, start + 1, stream_id, 1)])
            batch.commands.append(served(tenant, stream_id))
            batch.due.append(due(tenant, stream_id, now()))
            await locked.append(batch)
            raise ZeroDivisionError
    assert (await log.heads())[shard] == start
    assert await log.commands([(shard, stream_id)]) == {}
    assert await mine(log, tenant) == []
    await asyncio.wait_for(happened(log, tenant, stream_id, 1), PATIENCE_S)


async def test_a_locked_append_is_refused_like_any_other(log: EventLog, tenant: UUID) -> None:
    shard, command_id = shard_of(tenant), uuid4()
    first = await batch_after(log, tenant, (uuid4(), 1))
    first.commands.append(served(tenant, command_id))
    await log.append(first)
    head = first.heads[shard] + 1
    with pytest.raises(HeadMoved):
        async with log.locked([shard]) as locked:
            await locked.append(first)
    with pytest.raises(CommandSeen):
        async with log.locked([shard]) as locked:
            await locked.append(Batch({shard: head}, commands=[served(tenant, command_id)]))
    assert (await log.heads())[shard] == head


async def test_locks_of_the_same_shards_in_any_order_do_not_wait_for_each_other_in_a_circle(
    log: EventLog, request: pytest.FixtureRequest
) -> None:
    logs = [log, log]
    if isinstance(log, PostgresEventLog):
        logs[1] = await opened(request.getfixturevalue("shared_url"))
    tenants = [tenant_on(14), tenant_on(15)]

    async def write(through: EventLog, shards: list[int]) -> None:
        for _ in range(10):
            async with through.locked(shards) as locked:
                heads = (await locked.sync(dict.fromkeys(shards, 0), [])).heads
                events = [stored(tenant, heads[shard_of(tenant)] + 1, uuid4(), 1) for tenant in tenants]
                await locked.append(Batch(heads, events))

    before = await log.heads()
    await asyncio.wait_for(asyncio.gather(write(logs[0], [14, 15]), write(logs[1], [15, 14])), PATIENCE_S)
    after = await log.heads()
    assert (after[14] - before[14], after[15] - before[15]) == (20, 20)
    if isinstance(logs[1], PostgresEventLog):
        await logs[1].close()


# --- due work

ALIVE, DEAD, SWEEPER = "turns-1/a", "turns-2/a", "turns-3/a"


async def put(log: EventLog, tenant: UUID, id: UUID, due_at: datetime | None, claimed_by: str = "") -> None:
    batch = await batch_after(log, tenant)
    batch.due.append(due(tenant, id, due_at, claimed_by))
    await log.append(batch)


async def mine(
    log: EventLog, tenant: UUID, worker: str = SWEEPER, dead_after_s: float = NEVER_S
) -> list[DueRow]:
    """The rows due of one tenant."""
    return [row for row in await log.due(worker, DUE_MAX, dead_after_s) if row.tenant_id == tenant]


async def test_work_appears_when_it_is_due_and_not_before(log: EventLog, tenant: UUID) -> None:
    id, due_at = uuid4(), in_seconds(0.5)
    await put(log, tenant, id, due_at)
    assert await mine(log, tenant) == []
    assert await until(lambda: mine(log, tenant)) == [DueRow("turn", id, id, tenant, "")]
    assert now() >= due_at
    assert await mine(log, tenant) == [DueRow("turn", id, id, tenant, "")]


async def test_work_is_moved_and_removed_by_the_append_that_makes_it_so(log: EventLog, tenant: UUID) -> None:
    id, other = uuid4(), uuid4()
    await put(log, tenant, id, in_seconds(NEVER_S))
    await put(log, tenant, other, now())
    await put(log, tenant, id, in_seconds(-1))
    assert [row.id for row in await mine(log, tenant)] == [id, other]
    await put(log, tenant, id, None)
    await put(log, tenant, id, None)
    assert [row.id for row in await mine(log, tenant)] == [other]


async def test_the_last_change_of_a_row_within_a_batch_counts(log: EventLog, tenant: UUID) -> None:
    moved, ended, begun = uuid4(), uuid4(), uuid4()
    batch = await batch_after(log, tenant)
    batch.due += [
        *(due(tenant, moved, now()), due(tenant, moved, now(), ALIVE)),
        *(due(tenant, ended, now()), due(tenant, ended, None)),
        *(due(tenant, begun, None), due(tenant, begun, now())),
    ]
    await log.append(batch)
    assert {row.id: row.lost_worker for row in await mine(log, tenant)} == {moved: ALIVE, begun: ""}


async def test_the_most_overdue_comes_first_and_no_more_than_asked_for(log: EventLog, tenant: UUID) -> None:
    ids = [uuid4() for _ in range(5)]
    for age_s, id in enumerate(ids):
        await put(log, tenant, id, in_seconds(-NEVER_S - age_s))
    assert [row.id for row in await log.due(SWEEPER, 3, NEVER_S)] == [ids[4], ids[3], ids[2]]


async def test_work_of_a_living_worker_is_left_alone(log: EventLog, tenant: UUID) -> None:
    await log.beat(ALIVE)
    await put(log, tenant, uuid4(), in_seconds(NEVER_S), ALIVE)
    assert await mine(log, tenant, SWEEPER, dead_after_s=PATIENCE_S) == []
    assert await mine(log, tenant, ALIVE, dead_after_s=PATIENCE_S) == []


async def test_work_of_a_worker_that_overran_its_time_is_due_with_its_name(
    log: EventLog, tenant: UUID
) -> None:
    id = uuid4()
    await log.beat(ALIVE)
    await put(log, tenant, id, in_seconds(-1), ALIVE)
    for worker in (SWEEPER, ALIVE):
        assert await mine(log, tenant, worker) == [DueRow("turn", id, id, tenant, ALIVE)]


async def test_work_of_a_dead_worker_is_taken_over(log: EventLog, tenant: UUID) -> None:
    id, dead_after_s = uuid4(), 0.2
    await log.beat(DEAD)
    await put(log, tenant, id, in_seconds(NEVER_S), DEAD)
    assert await mine(log, tenant, dead_after_s=NEVER_S) == []
    found = await until(lambda: mine(log, tenant, dead_after_s=dead_after_s))
    assert found == [DueRow("turn", id, id, tenant, DEAD)]
    await log.beat(DEAD)
    assert await mine(log, tenant, dead_after_s=PATIENCE_S) == []


async def test_a_worker_that_never_beat_is_dead_to_others_but_not_to_itself(
    log: EventLog, tenant: UUID
) -> None:
    await put(log, tenant, uuid4(), in_seconds(NEVER_S), DEAD)
    assert [row.lost_worker for row in await mine(log, tenant)] == [DEAD]
    assert await mine(log, tenant, DEAD) == []


async def test_work_of_an_earlier_life_of_the_same_slot_is_taken_over_at_once(
    log: EventLog, tenant: UUID
) -> None:
    id = uuid4()
    await log.beat("turns-1/a")
    await put(log, tenant, id, in_seconds(NEVER_S), "turns-1/a")
    await log.beat("turns-1/b")
    assert await mine(log, tenant, "turns-1/b") == [DueRow("turn", id, id, tenant, "turns-1/a")]
    for other in ("turns-1/a", "turns-10/b", "turns/b"):
        assert await mine(log, tenant, other) == []


@pytest.mark.parametrize("claimed_by", ["", DEAD])
async def test_one_of_two_sweepers_wins(log: EventLog, tenant: UUID, claimed_by: str) -> None:
    await put(log, tenant, uuid4(), in_seconds(NEVER_S if claimed_by else -1), claimed_by)
    seen = [(await mine(log, tenant, worker))[0] for worker in (ALIVE, SWEEPER)]
    won = await asyncio.gather(
        log.claim_due(seen[0], ALIVE, in_seconds(30)), log.claim_due(seen[1], SWEEPER, in_seconds(60))
    )
    assert sorted(won) == [False, True]
    assert await mine(log, tenant) == []


@pytest.mark.parametrize("claimed_by", ["", DEAD])
async def test_what_a_sweeper_claimed_and_did_not_do_is_due_again(
    log: EventLog, tenant: UUID, claimed_by: str
) -> None:
    await put(log, tenant, uuid4(), in_seconds(NEVER_S if claimed_by else -1), claimed_by)
    (row,) = await mine(log, tenant)
    assert await log.claim_due(row, SWEEPER, in_seconds(0.5))
    assert await mine(log, tenant) == []
    assert await until(lambda: mine(log, tenant)) == [row]
    assert await log.claim_due(row, ALIVE, in_seconds(30))


async def test_work_that_was_dealt_with_since_it_was_seen_cannot_be_claimed(
    log: EventLog, tenant: UUID
) -> None:
    id = uuid4()
    await put(log, tenant, id, now())
    (row,) = await mine(log, tenant)
    for due_at, claimed_by in [(in_seconds(NEVER_S), ""), (in_seconds(NEVER_S), ALIVE), (None, "")]:
        await put(log, tenant, id, due_at, claimed_by)
        assert not await log.claim_due(row, SWEEPER, in_seconds(30))


async def test_an_append_ends_what_a_sweeper_claimed(log: EventLog, tenant: UUID) -> None:
    id = uuid4()
    await put(log, tenant, id, now())
    (row,) = await mine(log, tenant)
    assert await log.claim_due(row, SWEEPER, in_seconds(NEVER_S))
    await put(log, tenant, id, now())
    assert await mine(log, tenant) == [row]


# --- Postgres alone: other processes, and networks


async def test_a_follower_misses_nothing_while_processes_write_and_fail(
    postgres: PostgresEventLog, shared_url: str
) -> None:
    processes, writers, batches, deadline_s = 2, 8, 50, 30.0
    shards = (20, 21)
    tenants = [str(tenant_on(shard)) for shard in shards]
    heads = await postgres.heads()
    cursors = {shard: heads[shard] for shard in shards}
    program = [sys.executable, "-m", "tests.peers.log_writer", shared_url, str(writers), str(batches)]
    running = [
        await asyncio.create_subprocess_exec(*program, *tenants, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
        for _ in range(processes)
    ]
    followed: list[StoredEvent] = []

    async def follow() -> None:
        while page := await postgres.read_after(cursors, 7):
            for event in page:
                assert event.position == cursors[event.shard] + 1
                cursors[event.shard] = event.position
            followed.extend(page)

    async def finished() -> list[str]:
        outputs = await asyncio.gather(*(process.communicate() for process in running))
        assert [process.returncode for process in running] == [0] * processes
        return [line for output, _ in outputs for line in output.decode().split()]

    try:
        async with asyncio.timeout(deadline_s):
            done = asyncio.create_task(finished())
            while not done.done():
                await follow()
                await asyncio.sleep(POLL_S / 10)
            accepted = await done
            await follow()
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                process.kill()
    assert len(accepted) == len(set(accepted)) == processes * writers * batches
    assert {str(event.command_id) for event in followed} == set(accepted)
    assert len(followed) == processes * writers * sum(n % 3 + 1 for n in range(batches))
    versions: dict[UUID, int] = {}
    for event in followed:
        versions[event.stream_id] = versions.get(event.stream_id, 0) + 1
        assert event.stream_version == versions[event.stream_id]


@pytest.mark.parametrize("fault", [Fault.CUT_REQUEST, Fault.CUT_ANSWER])
@pytest.mark.parametrize("under_lock", [False, True])
async def test_an_append_whose_connection_is_cut_is_in_doubt_and_commands_tell_the_truth(
    postgres: PostgresEventLog, shared_url: str, tenant: UUID, fault: Fault, under_lock: bool
) -> None:
    shard, stream_id, command_id = shard_of(tenant), uuid4(), uuid4()
    async with proxy_before(shared_url) as proxy:
        log = await opened(proxy.dsn)
        await happened(log, tenant, stream_id, 1)
        batch = await batch_after(log, tenant, (stream_id, 2))
        batch.commands.append(served(tenant, command_id, position=batch.events[0].position))
        began_s = time.monotonic()
        with pytest.raises(LogUnavailable):
            if under_lock:
                async with log.locked([shard]) as locked:
                    await locked.append(batch)
                    proxy.fault = fault
            else:
                proxy.fault = fault
                await log.append(batch)
        assert time.monotonic() - began_s < CALL_S
        assert proxy.fault is Fault.NONE

        written = fault is Fault.CUT_ANSWER
        assert list(await log.commands([(shard, command_id)])) == [command_id] * written
        assert len(await postgres.read_stream(shard, stream_id, 9)) == 1 + written
        if written:
            with pytest.raises(HeadMoved):
                await log.append(batch)
        else:
            await log.append(batch)
        await happened(log, tenant, stream_id, 3)
        assert [event.stream_version for event in await log.read_stream(shard, stream_id, 9)] == [1, 2, 3]
        await log.close()


async def test_a_half_open_connection_ends_every_call_within_its_deadline(
    postgres: PostgresEventLog, shared_url: str, tenant: UUID
) -> None:
    shard, stream_id = shard_of(tenant), uuid4()
    calls: list[Callable[[], Awaitable[object]]]
    async with proxy_before(shared_url) as proxy:
        log = await opened(proxy.dsn)
        await happened(log, tenant, stream_id, 1)
        batch = await batch_after(log, tenant, (stream_id, 2))
        proxy.fault = Fault.HALF_OPEN
        calls = [lambda: log.append(batch), log.heads, lambda: log.beat(ALIVE)]

        async def seconds_of(call: Callable[[], Awaitable[object]]) -> float:
            began_s = time.monotonic()
            with pytest.raises(LogUnavailable):
                await call()
            return time.monotonic() - began_s

        durations_s = await asyncio.gather(*(seconds_of(call) for call in calls))
        assert max(durations_s) < max(CALL_S, CONNECT_S) + MARGIN_S

        proxy.fault = Fault.NONE
        await until(lambda: reachable(log))
        heads = await log.heads()
        await happened(log, tenant, uuid4(), 1)
        assert (await log.heads())[shard] == heads[shard] + 1
        await log.close()


async def reachable(log: EventLog) -> bool:
    with suppress(LogUnavailable):
        await log.heads()
        return True
    return False


async def test_a_server_that_is_not_there_is_unavailable_within_the_deadline(
    shared_url: str, tenant: UUID
) -> None:
    async with proxy_before(shared_url) as proxy:
        dsn = proxy.dsn
    log = PostgresEventLog(dsn)
    with pytest.raises(LogUnavailable):
        await asyncio.wait_for(log.append(Batch({shard_of(tenant): 0})), CONNECT_S + MARGIN_S)
    await log.close()


async def test_times_are_utc_whatever_the_servers_time_zone(database_url: str, tenant: UUID) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        database = sql.Identifier(connection.info.dbname)
        await connection.execute(
            sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Kathmandu'").format(database)
        )
    log = await opened(database_url)
    at = await log.append(await batch_after(log, tenant, (tenant, 1)))
    (event,) = await log.read_stream(shard_of(tenant), tenant, 1)
    await log.close()
    assert at.utcoffset() == timedelta(0)
    assert event.recorded_at == at
    assert event.recorded_at.utcoffset() == timedelta(0)
