from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from aiokafka import TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic

from adapters.kafka.admin import Change, apply, group_lags, show
from adapters.kafka.broker import KafkaServer
from adapters.kafka.clients import KafkaConfig, open_consumer, open_producer
from adapters.kafka.faults import KafkaUnavailable, PartitionsFixed
from adapters.kafka.node import free_ports
from schemas.topics import AGENT_STATE, LOG, PUBLIC, READ_BY, TOPICS, TURN_STREAM, Topic, work_topic
from tests.peers.brokers import PrivateTopics

WAIT_S = 40.0


@pytest.fixture
def config(broker: str) -> KafkaConfig:
    return KafkaConfig.at(broker)


@pytest.fixture
def admin(broker: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": broker, "log_level": 0})


@pytest.fixture
def own(topics: PrivateTopics) -> Iterator[tuple[Topic, ...]]:
    """Topics like those of the product under names of the test's own; not made yet."""
    models = (LOG, work_topic("agent_turns"), TURN_STREAM, PUBLIC["turn"], AGENT_STATE)
    yield tuple(topics.named(model) for model in models)


def alter(admin: AdminClient, topic: str, **settings: str) -> None:
    entries = [
        ConfigEntry(name.replace("__", "."), value, incremental_operation=AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(WAIT_S)


def setting(admin: AdminClient, topic: str, name: str) -> str:
    (described,) = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic)]).values()
    value: str = described.result(WAIT_S)[name].value
    return value


async def test_what_is_missing_is_made_as_it_should_be(config: KafkaConfig, own: tuple[Topic, ...]):
    assert {state.differences for state in await show(config, own)} == {("missing",)}
    changes = await apply(config, own)
    assert changes == [
        Change(topic.name, f"made with {topic.partitions} partitions and 1 replicas") for topic in own
    ]
    for state, topic in zip(await show(config, own), own, strict=True):
        assert state.differences == ()
        assert (state.partitions, state.replicas, state.records) == (topic.partitions, 1, 0)
        assert state.settings.items() >= topic.settings.items()
        assert state.settings["min.insync.replicas"] == "1"


async def test_a_second_time_changes_nothing(config: KafkaConfig, own: tuple[Topic, ...]):
    await apply(config, own)
    assert await apply(config, own) == []


async def test_two_that_make_the_topics_at_once_both_find_them_made(
    config: KafkaConfig, own: tuple[Topic, ...]
):
    await asyncio.gather(apply(config, own), apply(config, own))
    assert all(state.differences == () for state in await show(config, own))


async def test_a_setting_that_differs_is_corrected_and_what_others_have_set_is_kept(
    config: KafkaConfig, own: tuple[Topic, ...], admin: AdminClient
):
    log = own[0]
    await apply(config, own)
    alter(admin, log.name, retention__ms="1000", file__delete__delay__ms="1234")
    async with asyncio.timeout(WAIT_S):
        while setting(admin, log.name, "retention.ms") != "1000":  # noqa: ASYNC110 - brokers set no events
            await asyncio.sleep(0.02)
    (state,) = [each for each in await show(config, own) if each.differences]
    assert (state.topic, state.differences) == (log.name, ("retention.ms is 1000, not 604800000",))
    assert await apply(config, own) == [Change(log.name, "retention.ms set to 604800000, was 1000")]
    assert setting(admin, log.name, "retention.ms") == "604800000"
    assert setting(admin, log.name, "file.delete.delay.ms") == "1234"
    assert await apply(config, own) == []


async def test_topics_that_follow_the_shards_are_made_with_as_many_partitions_as_asked(
    config: KafkaConfig, own: tuple[Topic, ...]
):
    await apply(config, own, partitions=2)
    assert [state.partitions for state in await show(config, own, 2)] == [2, 2, 8, 12, 12]


async def test_topics_that_follow_the_shards_are_not_divided_anew_and_nothing_else_is_done_then(
    config: KafkaConfig, own: tuple[Topic, ...], admin: AdminClient
):
    log, *others = own
    await apply(config, [log], partitions=4)
    with pytest.raises(
        PartitionsFixed, match=rf"{log.name} has 4 partitions, not 8.*OSHAANI_KAFKA_PARTITIONS"
    ):
        await apply(config, own)
    assert log.name in (known := admin.list_topics(timeout=WAIT_S).topics)
    assert not {topic.name for topic in others} & set(known)
    assert "4 partitions, not 8" in (await show(config, own))[0].differences


async def test_other_partitions_of_the_other_topics_are_shown_and_left(
    config: KafkaConfig, own: tuple[Topic, ...], admin: AdminClient
):
    public = own[3]
    for made in admin.create_topics([NewTopic(public.name, 3, 1)]).values():
        made.result(WAIT_S)
    changed = {change.change.split(" ")[0] for change in await apply(config, [public])}
    assert changed == {"max.message.bytes", "retention.ms", "segment.ms"}
    (state,) = await show(config, [public])
    assert state.differences == ("3 partitions, not 12",)


async def test_partitions_that_the_shards_do_not_go_into_are_refused(
    config: KafkaConfig, own: tuple[Topic, ...]
):
    with pytest.raises(ValueError, match="do not divide"):
        await apply(config, own, partitions=12)


async def test_shown_is_how_much_is_kept(config: KafkaConfig, own: tuple[Topic, ...]):
    log = own[0]
    await apply(config, [log])
    async with open_producer(config, "test") as producer:
        for partition in (0, 0, 3):
            await producer.send_and_wait(log.name, b"a record", partition=partition)
    (state,) = await show(config, [log])
    assert state.end_offsets == (2, 0, 0, 1, 0, 0, 0, 0)
    assert state.records == 3


async def test_a_group_is_behind_by_what_it_has_not_committed(
    config: KafkaConfig, own: tuple[Topic, ...], topics: PrivateTopics
):
    work = own[1]
    await apply(config, [work])
    groups = {f"{topics.prefix}at-work": work.name, f"{topics.prefix}never-there": work.name}
    async with asyncio.timeout(WAIT_S), open_producer(config, "test") as producer:
        for partition in (0, 0, 0, 5):
            await producer.send_and_wait(work.name, b"a record", partition=partition)
        at_work = open_consumer(config, "test", work.name, group_id=f"{topics.prefix}at-work")
        async with at_work as consumer:
            await consumer.getone()
            await consumer.commit({TopicPartition(work.name, 0): 1})
    lags = await group_lags(config, groups)
    assert len(lags) == 16
    behind = {(lag.group, lag.partition): (lag.committed, lag.end, lag.lag) for lag in lags if lag.end}
    assert behind == {
        (f"{topics.prefix}at-work", 0): (1, 3, 2),
        (f"{topics.prefix}at-work", 5): (None, 1, 1),
        (f"{topics.prefix}never-there", 0): (None, 3, 3),
        (f"{topics.prefix}never-there", 5): (None, 1, 1),
    }


async def test_a_group_of_a_topic_that_is_not_there_has_no_lag(config: KafkaConfig):
    assert await group_lags(config, {"nobody": "nothing"}) == []


async def test_a_cluster_that_is_away_is_named():
    where = f"127.0.0.1:{free_ports()[0]}"
    with pytest.raises(KafkaUnavailable, match=f"Kafka at {where} cannot be used"):
        await apply(KafkaConfig.at(where))


async def test_all_topics_of_the_product_are_made_at_once(own_broker: KafkaServer):
    config = KafkaConfig.at(own_broker.bootstrap_servers)
    assert len(await apply(config)) == len(TOPICS)
    assert await apply(config) == []
    assert [state.topic for state in await show(config)] == [topic.name for topic in TOPICS]
    assert len(await group_lags(config, READ_BY)) == sum(work_topic(each).partitions for each in READ_BY)
