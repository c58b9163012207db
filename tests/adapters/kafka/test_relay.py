"""The relay on the real broker: everything of the log reaches the topics, in order, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from adapters.kafka.broker import KafkaServer
from adapters.kafka.clients import KafkaConfig
from adapters.kafka.relay import Relay
from domain.crash_points import DISTRIBUTED_POINTS
from domain.event_log import LogUnavailable
from domain.leases import Mark
from schemas.topics import Topic, partition_of
from schemas.wire import MESSAGE_BYTES_MAX, unpack
from tests.adapters.kafka.relay_stage import (
    ANSWERED,
    ASKED,
    CREDITS,
    FIREHOSE,
    PATIENCE_S,
    TTL_S,
    TURNS,
    Stage,
    opened_log,
    until,
)
from tests.peers.brokers import ADMIN_S, PrivateTopics
from tests.peers.log_rows import tenant_on

ROOT = Path(__file__).parents[3]
GATHER_S = 0.1


@pytest.fixture
async def stage(database_url: str, broker: str, topics: PrivateTopics) -> AsyncIterator[Stage]:
    firehose, turns, credits = topics.create(FIREHOSE, TURNS, CREDITS)
    async with opened_log(database_url) as (log, leases):
        work = {turns.name: {ASKED}, credits.name: {ASKED, ANSWERED}}
        yield Stage(log, leases, KafkaConfig.at(broker), firehose.name, work, {credits.name: GATHER_S})


def make(servers: str, *topics: Topic) -> None:
    admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
    wanted = [NewTopic(topic.name, topic.partitions, 1, config=topic.settings) for topic in topics]
    for made in admin.create_topics(wanted, operation_timeout=ADMIN_S).values():
        made.result(ADMIN_S)


def delete(servers: str, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
    for deleted in admin.delete_topics([name], operation_timeout=ADMIN_S).values():
        deleted.result(ADMIN_S)


async def remake_firehose(stage: Stage) -> None:
    """Delete the topic and make it again, as an operator in need might do."""
    servers = stage.config.bootstrap_servers[0]
    await asyncio.to_thread(delete, servers, stage.firehose)
    await asyncio.to_thread(make, servers, replace(FIREHOSE, name=stage.firehose))


async def holds_all(*relays: Relay) -> None:
    async def shared() -> bool:
        return sorted(n for relay in relays for n in relay.held_ranges) == [0, 1, 2, 3]

    await until(shared, "all ranges held")


async def test_everything_arrives_once_and_in_order_by_shard(stage: Stage) -> None:
    await stage.happen(1_500)
    async with stage.running():
        await stage.happen(300)
        await stage.relayed()
    by_shard = await stage.rows(stage.firehose)
    expected = await stage.all_of_log()
    assert len(expected) == 1_800
    assert [row for shard in sorted(by_shard) for row in by_shard[shard]] == expected


async def test_a_record_is_on_the_partition_of_its_shard_under_the_key_of_its_stream(stage: Stage) -> None:
    await stage.happen(50)
    async with stage.running():
        await stage.relayed()
    records = await stage.records(stage.firehose)
    assert len(records) == 50
    for record in records:
        row = unpack(record.value)
        assert record.partition == partition_of(row.shard, FIREHOSE.partitions)
        assert record.key == row.stream_id.bytes


async def test_work_topics_get_only_their_types(stage: Stage) -> None:
    await stage.happen(500)
    async with stage.running():
        await stage.relayed()
    expected = await stage.all_of_log()
    for topic, types in stage.work.items():
        by_shard = await stage.rows(topic)
        assert [row for shard in sorted(by_shard) for row in by_shard[shard]] == [
            row for row in expected if row.type in types
        ]


async def test_what_nobody_waits_for_is_gathered(stage: Stage) -> None:
    (patient,) = stage.gather_s
    async with stage.running() as relay:
        await stage.happen(1, tenants=stage.tenants[:1])
        await stage.relayed()
        began_s = time.monotonic()
        for _ in range(20):
            await stage.happen(1, tenants=stage.tenants[:1])
            relay.wake()
            await until(partial(has_come, stage), "the firehose")
        await stage.relayed()
        took_s = time.monotonic() - began_s
    records = await stage.records(patient)
    assert len(records) == 21
    # The broker gives all records of a batch the same time.
    batches = {record.timestamp for record in records[1:]}
    assert len(batches) <= took_s / GATHER_S + 2


async def has_come(stage: Stage) -> bool:
    """Whether all of the log is on the firehose."""
    return len(await stage.records(stage.firehose)) == len(await stage.all_of_log())


async def test_large_events_arrive(stage: Stage) -> None:
    await stage.happen(60, payload=b'"' + b"x" * 300_000 + b'"')
    async with stage.running():
        await stage.relayed()
    await stage.is_on_firehose()


async def test_an_event_that_no_topic_takes_stops_its_shard_and_no_other(stage: Stage) -> None:
    small, large = tenant_on(0), b'"' + b"x" * MESSAGE_BYTES_MAX + b'"'
    await stage.happen(3, tenants=[small])
    await stage.happen(1, large, tenants=[small])
    await stage.happen(2, tenants=[small])
    async with stage.running() as relay:
        await stage.happen(50, tenants=[tenant_on(1), tenant_on(2)])

        async def arrived() -> bool:
            return len(await stage.records(stage.firehose)) == 53

        await until(arrived, "everything else")
        assert list(relay.stuck) == [0]
        assert "event 4 of shard 0 has" in relay.stuck[0]

        async def waits_for_nothing_else() -> bool:
            return sum(relay.lag(await stage.log.heads()).values()) == 3

        await until(waits_for_nothing_else, "everything else on all topics")


async def test_what_was_committed_is_sent_at_once_when_the_relay_is_woken(stage: Stage) -> None:
    async with stage.running() as relay:
        await holds_all(relay)
        await stage.happen(8)
        relay.wake()
        await stage.relayed()
        assert relay.sent_count == 8 + 2 + 3
        assert relay.in_flight_count == 0
        assert sum(relay.lag(await stage.log.heads()).values()) == 0
        assert relay.trouble == ""


async def test_what_the_relay_is_told_is_sent_without_a_look_and_what_it_is_not_told_is_read(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage.running() as relay:
        await holds_all(relay)
        before, read_after = await stage.log.heads(), stage.log.read_after
        with monkeypatch.context() as broken:
            broken.setattr(stage.log, "read_after", _away)
            await stage.happen(8)
            told = await read_after(before, 100)
            relay.wake([*reversed(told), *told])

            async def is_sent() -> bool:
                return relay.sent_count == 8 + 2 + 3

            await until(is_sent, "what was told on the topics")
        before = await stage.log.heads()
        await stage.happen(8)
        later = await stage.log.read_after(before, 100)
        await stage.happen(8)
        relay.wake((await stage.log.read_after(before, 100))[1:])
        await stage.relayed()
        relay.wake(later)
        await stage.happen(1)
        await stage.relayed()
    await stage.is_on_firehose()


async def _away(*arguments: object) -> None:
    raise LogUnavailable("away")


async def test_a_restarted_relay_goes_on_where_it_was(stage: Stage) -> None:
    await stage.happen(100)
    async with stage.running("one/first") as first:
        await stage.relayed()
        await first.drain(5.0)
    assert await stage.leases.held() == []
    await stage.happen(100)
    async with stage.running("one/second") as second:
        await stage.relayed()
        await second.drain(5.0)
    assert len(await stage.records(stage.firehose)) == 200


async def test_two_relays_share_the_ranges_evenly(stage: Stage) -> None:
    async with stage.running() as one:
        await holds_all(one)
        await stage.happen(400)
        async with stage.running() as other:

            async def shared() -> bool:
                return len(one.held_ranges) == len(other.held_ranges) == 2

            await until(shared, "two ranges each")
            await holds_all(one, other)
            await stage.happen(400)
            await stage.relayed()
            assert one.sent_count > 0 and other.sent_count > 0
            await other.drain(5.0)
        # What was given back in order need not expire first.
        await holds_all(one)
    # Handed over in order, nothing came twice.
    assert len(await stage.records(stage.firehose)) == 800
    await stage.is_on_firehose()


async def test_more_relays_than_ranges_leave_one_in_reserve(stage: Stage) -> None:
    relays = [stage.relay(f"r{n}/x") for n in range(5)]
    tasks = [asyncio.create_task(relay.run()) for relay in relays]

    async def shared() -> bool:
        return sorted(len(relay.held_ranges) for relay in relays) == [0, 1, 1, 1, 1]

    try:
        await until(shared, "one range each")
        await holds_all(*relays)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_when_a_relay_dies_the_other_goes_on_after_its_leases_expire(stage: Stage) -> None:
    async with stage.running() as survivor:
        await holds_all(survivor)
        async with stage.running() as victim:

            async def shared() -> bool:
                return len(victim.held_ranges) == 2

            await until(shared, "the victim's share")
            await stage.happen(500)
        # Gone without a word.
        await stage.happen(500)
        await stage.relayed(within_s=5 * TTL_S + 5)
        await holds_all(survivor)
    await stage.is_on_firehose()


async def test_the_next_life_of_a_slot_need_not_wait_for_the_leases(stage: Stage) -> None:
    stage.ttl_s = 3_600.0
    async with stage.running("one/first") as first:
        await holds_all(first)
    await stage.happen(100)
    async with stage.running("one/second") as second:
        await holds_all(second)
        await stage.relayed()
    await stage.is_on_firehose()


async def test_a_zombie_saves_no_cursor_and_harms_nothing(stage: Stage) -> None:
    async with stage.running("zombie/1") as zombie:
        await holds_all(zombie)
        old = await stage.leases.acquire("relay/0", "zombie/1", TTL_S)
        assert old is not None
        for number in range(4):

            async def taken(name: str = f"relay/{number}") -> bool:
                # The other comes to power as if the first had been silent for too long.
                await stage.leases.release(name, "zombie/1")
                return await stage.leases.acquire(name, "other/1", 3_600.0) is not None

            await until(taken, "the other to take over")
        await stage.happen(200)

        async def knows() -> bool:
            return zombie.held_ranges == ()

        await until(knows, "the zombie to notice")
        assert not await stage.leases.save_marks("relay/0", old, [Mark(stage.firehose, 0, 9, 9)])
        for number in range(4):
            await stage.leases.release(f"relay/{number}", "other/1")
        await stage.relayed()
    await stage.is_on_firehose()


async def test_a_rewound_relay_sends_again_and_only_to_the_topic_that_was_rewound(stage: Stage) -> None:
    async with stage.running() as relay:
        await stage.happen(80)
        await stage.relayed()
        turns_before = len(await stage.records(stage.turns))
        mark = next(mark for mark in await stage.leases.marks() if mark[:2] == (stage.firehose, 0))
        assert mark.position == 10
        await stage.leases.rewind("relay/0", [mark._replace(position=4)])
        await stage.relayed()
        await holds_all(relay)
    rows = (await stage.rows(stage.firehose))[0]
    assert [row.position for row in rows] == [*range(1, 11), *range(5, 11)]
    assert len(await stage.records(stage.turns)) == turns_before


async def test_a_topic_made_anew_is_written_again_from_the_log(stage: Stage) -> None:
    async with stage.running() as relay:
        await stage.happen(300)
        await stage.relayed()
        await remake_firehose(stage)

        async def is_complete() -> bool:
            with suppress(AssertionError, TimeoutError):
                await stage.is_on_firehose()
                return True
            return False

        await until(is_complete, "the topic to be written again")
        await stage.happen(100)
        await stage.relayed()
        assert relay.rewound_count > 0
    await stage.is_on_firehose()
    # The other topics were not disturbed.
    expected = [row for row in await stage.all_of_log() if row.type == ASKED]
    assert len(await stage.records(stage.turns)) == len(expected)


async def test_a_topic_made_anew_while_no_relay_ran_is_written_again(stage: Stage) -> None:
    async with stage.running() as first:
        await stage.happen(300)
        await stage.relayed()
        await first.drain(5.0)
    await remake_firehose(stage)
    async with stage.running():

        async def is_complete() -> bool:
            with suppress(AssertionError, TimeoutError):
                await stage.is_on_firehose()
                return True
            return False

        await until(is_complete, "the topic to be written again")


async def test_a_missing_topic_holds_up_no_other_and_is_served_when_it_is_made(
    stage: Stage, topics: PrivateTopics
) -> None:
    missing = topics.prefix + "later"
    stage.work = {**stage.work, missing: {ANSWERED}}
    async with stage.running() as relay:
        await stage.happen(100)

        async def arrived() -> bool:
            return len(await stage.records(stage.firehose)) == 100

        await until(arrived, "the other topics")
        assert relay.missing_topics == (missing,)
        topics.create(replace(TURNS, name="later"))
        await stage.relayed()
        assert relay.missing_topics == ()
    assert len(await stage.records(missing)) == 20
    assert len(await stage.records(stage.firehose)) == 100


async def test_a_broker_that_was_away_gets_everything(database_url: str, own_broker: KafkaServer) -> None:
    config = KafkaConfig.at(own_broker.bootstrap_servers)
    async with opened_log(database_url) as (log, leases):
        await asyncio.to_thread(make, own_broker.bootstrap_servers, FIREHOSE, TURNS)
        stage = Stage(log, leases, config, FIREHOSE.name, {TURNS.name: {ASKED}})
        async with stage.running() as relay:
            for end in (own_broker.stop, own_broker.kill):
                await stage.happen(400)
                await asyncio.to_thread(end)
                for _ in range(5):
                    await stage.happen(100)
                    relay.wake()
                assert not await stage.everything_is_marked()
                await asyncio.to_thread(own_broker.start)
                await stage.relayed()
        await stage.is_on_firehose()
        assert len(await stage.records(FIREHOSE.name)) == 1_800


async def test_a_relay_that_starts_before_the_broker_waits_for_it(
    database_url: str, own_broker: KafkaServer
) -> None:
    config = KafkaConfig.at(own_broker.bootstrap_servers)
    async with opened_log(database_url) as (log, leases):
        await asyncio.to_thread(make, own_broker.bootstrap_servers, FIREHOSE, TURNS)
        await asyncio.to_thread(own_broker.stop)
        stage = Stage(log, leases, config, FIREHOSE.name, {TURNS.name: {ASKED}})
        await stage.happen(10)
        async with stage.running() as relay:

            async def waits() -> bool:
                return "waits for Kafka" in relay.trouble

            await until(waits, "the relay to say what it waits for")
            await asyncio.to_thread(own_broker.start)
            await stage.relayed()
            await until(lambda: is_well(relay), "the end of the trouble")


# --- processes that die, or sleep


@asynccontextmanager
async def relay_process(stage: Stage, dsn: str, holder: str, *crash: str) -> AsyncIterator[Process]:
    servers = ",".join(stage.config.bootstrap_servers)
    words = ["-m", "tests.programs.relay", dsn, servers, holder, stage.firehose, str(stage.ttl_s), *crash]
    process = await asyncio.create_subprocess_exec(sys.executable, *words, cwd=ROOT)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("point", [point for point in DISTRIBUTED_POINTS if point.startswith("relay.")])
async def test_a_relay_that_dies_at_any_point_loses_nothing(
    stage: Stage, database_url: str, point: str
) -> None:
    stage.work = {}
    await stage.happen(2_000)
    async with relay_process(stage, database_url, "one/first", point, "7") as victim:
        async with asyncio.timeout(PATIENCE_S):
            assert await victim.wait() == -signal.SIGKILL
    assert not await stage.everything_is_marked()
    async with stage.running("one/second"):
        await stage.relayed()
    await stage.is_on_firehose()


async def test_a_relay_that_slept_too_long_harms_nothing_when_it_wakes(
    stage: Stage, database_url: str
) -> None:
    stage.work = {}

    async def is_moving() -> bool:
        return any(mark.position > 0 for mark in await stage.leases.marks())

    async with relay_process(stage, database_url, "sleeper/1") as sleeper:
        await stage.happen(4_000)
        await until(is_moving, "the relay to be in the middle of it")
        sleeper.send_signal(signal.SIGSTOP)
        await stage.happen(1_000)
        async with stage.running() as other:
            await holds_all(other)
            sleeper.send_signal(signal.SIGCONT)
            await stage.happen(500)
            await stage.relayed()

            async def shared() -> bool:
                return len(other.held_ranges) == 2

            await until(shared, "the sleeper to get its share again")
            await stage.happen(500)
            await stage.relayed()
    await stage.is_on_firehose()


async def test_a_database_that_drops_its_connections_is_waited_for(stage: Stage, database_url: str) -> None:
    async with stage.running(), await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin:

        async def happens() -> bool:
            # The writer's own connection was dropped too.
            with suppress(LogUnavailable):
                await stage.happen(200)
                return True
            return False

        async def relayed() -> bool:
            with suppress(LogUnavailable):
                return await stage.everything_is_marked()
            return False

        for _ in range(5):
            await until(happens, "an append")
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await until(relayed, "all cursors at the heads")
    await stage.is_on_firehose()


async def is_well(relay: Relay) -> bool:
    return relay.trouble == ""
