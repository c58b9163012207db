from __future__ import annotations

import re
from collections import Counter

import pytest

from domain.ids import SHARDS
from schemas.records import PART_BYTES_MAX
from schemas.topics import (
    AGENT_STATE,
    CREDIT_BALANCE,
    LOG,
    PROCESSORS,
    PUBLIC,
    RECORD_BYTES_MAX,
    TOPICS,
    TURN_STREAM,
    USAGE_TABLE,
    dead_letters,
    divided,
    group_of,
    partition_of,
    work_topic,
)

ROW_OVERHEAD_BYTES = 64 * 1024


def test_every_topic_is_there_once_under_the_name_that_subscribers_know():
    names = [topic.name for topic in TOPICS]
    assert len(set(names)) == len(names)
    assert {"oshaani.log.v1", "oshaani.turn.stream.v1", "oshaani.work.agent_turns.v1"} <= set(names)
    assert {
        f"oshaani.{noun}.events.v1"
        for noun in ("agent", "conversation", "turn", "credit", "usage", "identity", "command")
    } == {topic.name for topic in PUBLIC.values()}
    assert {"oshaani.agent.state.v1", "oshaani.credit.balance.v1"} <= set(names)


def test_every_name_is_one_that_kafka_takes_and_that_no_other_collides_with():
    assert all(re.fullmatch(r"[a-z0-9._]{1,249}", topic.name) for topic in TOPICS)
    # Kafka's metrics take `.` and `_` for the same.
    assert max(Counter(topic.name.replace("_", ".") for topic in TOPICS).values()) == 1


def test_each_processor_has_a_work_topic_and_a_place_for_its_dead_letters():
    names = {topic.name for topic in TOPICS}
    for processor in PROCESSORS:
        work = work_topic(processor)
        assert {work.name, dead_letters(work.name, group_of(processor)).name} <= names
        assert (work.partitions, work.retention_s) == (8, 86_400)


def test_kept_is_what_each_topic_says():
    assert LOG.settings["retention.ms"] == str(7 * 86_400_000)
    assert TURN_STREAM.settings["retention.ms"] == str(600_000)
    assert all(topic.settings["retention.ms"] == str(30 * 86_400_000) for topic in PUBLIC.values())
    for topic in (AGENT_STATE, CREDIT_BALANCE):
        assert topic.settings["cleanup.policy"] == "compact"
        assert "retention.ms" not in topic.settings


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_no_segment_stays_open_longer_than_half_of_what_is_kept_or_a_day(topic):
    segment_ms = int(topic.settings["segment.ms"])
    assert segment_ms <= 86_400_000
    if topic.retention_s is not None:
        assert segment_ms <= topic.retention_s * 500


def test_the_age_of_a_private_record_counts_from_when_it_was_written_here():
    assert {LOG.settings["message.timestamp.type"], TURN_STREAM.settings["message.timestamp.type"]} == {
        "LogAppendTime"
    }
    assert {topic.settings["message.timestamp.type"] for topic in PUBLIC.values()} == {"CreateTime"}


def test_the_largest_row_of_the_log_fits_into_a_record():
    assert 2 * PART_BYTES_MAX + ROW_OVERHEAD_BYTES < RECORD_BYTES_MAX


@pytest.mark.parametrize("partitions", [1, 2, 4, 8, 16, 32])
def test_the_shards_go_evenly_into_the_partitions(partitions):
    held = Counter(partition_of(shard, partitions) for shard in range(SHARDS))
    assert held == dict.fromkeys(range(partitions), SHARDS // partitions)


def test_only_what_follows_the_shards_is_divided_anew():
    again = {topic.name: topic for topic in divided(TOPICS, 32)}
    changed = {topic.name for topic in TOPICS if again[topic.name] != topic}
    assert changed == {LOG.name, USAGE_TABLE.name, *(work_topic(processor).name for processor in PROCESSORS)}
    assert all(again[name].partitions == 32 for name in changed)


@pytest.mark.parametrize("partitions", [-8, 0, 3, 12, 64])
def test_partitions_that_the_shards_do_not_go_into_are_refused(partitions):
    with pytest.raises(ValueError, match=f"{partitions} partitions do not divide 32 shards"):
        divided(TOPICS, partitions)
