"""A topic is proved to be the log, or what is wrong with it is named and mended."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.relay_check import Positions, Report, TopicMissing, lag, resend, verify
from domain.event_log import StoredEvent
from domain.leases import Mark
from schemas.topics import partition_of
from schemas.wire import pack
from tests.adapters.kafka.relay_stage import (
    ANSWERED,
    ASKED,
    CREDITS,
    FIREHOSE,
    TURNS,
    Stage,
    opened_log,
)
from tests.peers.brokers import PrivateTopics
from tests.peers.log_rows import tenant_on


@pytest.fixture
async def stage(database_url: str, broker: str, topics: PrivateTopics) -> AsyncIterator[Stage]:
    firehose, turns, credits = topics.create(FIREHOSE, TURNS, CREDITS)
    async with opened_log(database_url) as (log, leases):
        work = {turns.name: {ASKED}, credits.name: {ASKED, ANSWERED}}
        yield Stage(log, leases, KafkaConfig.at(broker), firehose.name, work)


async def checked(stage: Stage, from_positions: dict[int, int] | None = None) -> Report:
    return await verify(stage.log, stage.leases, stage.config, stage.firehose, from_positions)


async def put(stage: Stage, rows: list[StoredEvent]) -> None:
    """Records on the firehose that no relay sent."""
    async with open_producer(stage.config, "test-writer") as producer:
        for row in rows:
            partition = partition_of(row.shard, FIREHOSE.partitions)
            await producer.send_and_wait(stage.firehose, pack(row), row.stream_id.bytes, partition)


async def test_a_relayed_topic_is_the_log(stage: Stage) -> None:
    await stage.happen(1_200)
    async with stage.running():
        await stage.relayed()
    report = await checked(stage)
    assert report.is_equal
    assert (report.record_count, report.event_count, report.duplicate_count) == (1_200, 1_200, 0)
    assert report.as_json()["is_equal"] is True
    for topic, types in stage.work.items():
        assert (await verify(stage.log, stage.leases, stage.config, topic, types=types)).is_equal


async def test_a_topic_can_be_proved_from_any_position(stage: Stage) -> None:
    await stage.happen(80)
    await put(stage, (await stage.all_of_log())[5:])
    assert (await checked(stage)).missing == [Positions(0, 1, 5)]
    assert not (await checked(stage, {0: 4})).is_equal
    report = await checked(stage, {0: 5})
    assert report.is_equal
    assert report.event_count == 75


async def test_what_happens_during_the_check_is_the_next_ones(stage: Stage) -> None:
    await stage.happen(16)
    ahead = [row._replace(position=row.position + 100) for row in await stage.all_of_log()]
    await put(stage, [*await stage.all_of_log(), *ahead])
    assert (await checked(stage)).is_equal


async def test_holes_changes_duplicates_and_strangers_are_named(stage: Stage) -> None:
    await stage.happen(40, tenants=[tenant_on(0)])
    rows = await stage.all_of_log()
    forged = rows[9]._replace(payload=b'{"amount":1}')
    stranger = rows[0]._replace(shard=1)
    late = rows[4:6]
    await put(stage, [*rows[:4], *rows[6:9], forged, *rows[10:30], *late, rows[0], rows[1], *rows[33:]])
    async with open_producer(stage.config, "test-writer") as producer:
        await producer.send_and_wait(stage.firehose, b"\xff not ours", b"", 0)
        await producer.send_and_wait(stage.firehose, pack(stranger), b"", 0)
    report = await checked(stage)
    assert not report.is_equal
    assert report.missing == [Positions(0, 10, 10), Positions(0, 31, 33)]
    assert report.missing_count == 4
    assert report.first_missing == {0: 10}
    assert report.duplicate_count == 2
    assert report.out_of_order_count == 2
    assert [(wrong.partition, wrong.what) for wrong in report.wrong] == [
        (0, "format 255 of a log record; this program knows 1: update it"),
        (0, "shard 1 does not belong on partition 0"),
        (0, "event 10 of shard 0 is another one in the log"),
    ]


async def test_a_work_topic_lacks_only_what_its_processor_handles(stage: Stage) -> None:
    await stage.happen(10, tenants=[tenant_on(0)])
    rows = await stage.all_of_log()
    async with open_producer(stage.config, "test-writer") as producer:
        for row in (rows[0], rows[1]):
            await producer.send_and_wait(stage.turns, pack(row), row.stream_id.bytes, 0)
    report = await verify(stage.log, stage.leases, stage.config, stage.turns, types={ASKED})
    assert report.missing == [Positions(0, 6, 6)]
    assert [wrong.what for wrong in report.wrong] == ["Test.Happened does not belong on this topic"]


async def test_a_hole_is_mended_by_sending_again(stage: Stage) -> None:
    await stage.happen(160)
    rows = await stage.all_of_log()
    # As if a relay had believed that all of it was there.
    await put(stage, [row for row in rows if (row.shard, row.position) not in {(0, 7), (0, 8), (3, 15)}])
    for number in range(stage.options.ranges):
        heads = {shard: head for shard, head in (await stage.log.heads()).items() if shard % 4 == number}
        marks = [Mark(topic, *each, 0) for topic in (stage.firehose, *stage.work) for each in heads.items()]
        await stage.leases.rewind(f"relay/{number}", marks)
    report = await checked(stage)
    assert report.missing == [Positions(0, 7, 8), Positions(3, 15, 15)]

    again = await resend(stage.leases, stage.firehose, report.first_missing)
    assert [(mark.shard, mark.position) for mark in again] == [(0, 6), (3, 14)]
    async with stage.running():
        await stage.relayed()
    report = await checked(stage)
    assert report.is_equal
    assert report.out_of_order_count == 3
    assert report.duplicate_count == 12 + 5


async def test_a_resend_while_the_relay_runs_reaches_only_its_topic(stage: Stage) -> None:
    async with stage.running():
        await stage.happen(80)
        await stage.relayed()
        await resend(stage.leases, stage.firehose, {0: 3, 1: 9})
        await stage.relayed()
        assert (await checked(stage)).duplicate_count == 8 + 2
        report = await verify(stage.log, stage.leases, stage.config, stage.turns, types={ASKED})
        assert report.is_equal and report.duplicate_count == 0


async def test_the_lag_of_a_topic_is_what_no_relay_has_brought_there(stage: Stage) -> None:
    await stage.happen(16)
    assert (await lag(stage.log, stage.leases, [stage.firehose]))[stage.firehose][0] == 2
    async with stage.running():
        await stage.relayed()
    assert set((await lag(stage.log, stage.leases, [stage.firehose]))[stage.firehose].values()) == {0}


async def test_a_topic_that_is_not_there_is_said(stage: Stage) -> None:
    with pytest.raises(TopicMissing, match="no topic 'nothing'; run `oshaani topics apply`"):
        await verify(stage.log, stage.leases, stage.config, "nothing")
