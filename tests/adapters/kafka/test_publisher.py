"""What is given to the publisher is on its topics, in order, whatever the broker does meanwhile."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError

from adapters.kafka import publisher as publishing
from adapters.kafka.broker import KafkaServer
from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.publisher import kafka_publisher
from domain.ports import PublicMessage
from schemas.topics import PUBLIC, RECORD_BYTES_MAX
from tests.peers.brokers import PrivateTopics
from tests.programs.asyncapi_consumer import read_all

PATIENCE_S = 60.0
TURNS = PUBLIC["turn"]


def opening(servers: str) -> Callable[[], AbstractAsyncContextManager[AIOKafkaProducer]]:
    return lambda: open_producer(KafkaConfig.at(servers), "test")


def read(servers: str, topic: str) -> list[tuple[str, bytes | None, dict[str, bytes]]]:
    """Everything on a topic, by a client that is not ours."""
    return [
        (message.key().decode(), message.value(), dict(message.headers() or []))
        for message in read_all(servers, topic)[1]
    ]


def numbers_by_key(servers: str, topic: str) -> dict[str, list[int]]:
    found = defaultdict(list)
    for key, value, _ in read(servers, topic):
        assert value is not None
        found[key].append(int(value))
    return found


def firsts(numbers: list[int]) -> list[int]:
    """Without what is repeated."""
    return list(dict.fromkeys(numbers))


async def test_messages_arrive_once_and_in_order_per_key(broker: str, topics: PrivateTopics) -> None:
    (topic,) = topics.create(TURNS)
    async with kafka_publisher(opening(broker)) as publisher:
        acknowledged = [
            await publisher.send(
                [PublicMessage(topic.name, f"key {k}", b"%d" % n, [("ce_id", b"%d" % n)]) for k in range(3)]
            )
            for n in range(200)
        ]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*acknowledged)
        assert publisher.waiting == 0
    assert numbers_by_key(broker, topic.name) == {f"key {k}": list(range(200)) for k in range(3)}
    assert read(broker, topic.name)[0][2] == {"ce_id": b"0"}


async def test_a_key_is_on_the_partition_where_other_clients_put_it(
    broker: str, topics: PrivateTopics
) -> None:
    (topic,) = topics.create(TURNS)
    keys = [f"key {n}" for n in range(50)]
    async with kafka_publisher(opening(broker)) as publisher, opening(broker)() as other:
        await (await publisher.send([PublicMessage(topic.name, key, b"ours") for key in keys]))
        theirs = [await other.send_and_wait(topic.name, b"theirs", key.encode()) for key in keys]
    ours = {
        message.key().decode(): message.partition()
        for message in read_all(broker, topic.name)[1]
        if message.value() == b"ours"
    }
    assert ours == {key: each.partition for key, each in zip(keys, theirs, strict=True)}


async def test_a_key_without_value_is_a_tombstone(broker: str, topics: PrivateTopics) -> None:
    (topic,) = topics.create(TURNS)
    async with kafka_publisher(opening(broker)) as publisher:
        await (await publisher.send([PublicMessage(topic.name, "gone", None)]))
        await (await publisher.send([]))
    assert read(broker, topic.name) == [("gone", None, {})]


async def test_a_message_that_no_broker_takes_fails_alone(broker: str, topics: PrivateTopics) -> None:
    (topic,) = topics.create(TURNS)
    async with kafka_publisher(opening(broker)) as publisher:
        huge = await publisher.send([PublicMessage(topic.name, "key", b"0" * (RECORD_BYTES_MAX + 1))])
        small = await publisher.send([PublicMessage(topic.name, "key", b"1")])
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(MessageSizeTooLargeError):
                await huge
            await small
    assert numbers_by_key(broker, topic.name) == {"key": [1]}


async def test_senders_wait_when_too_much_is_unacknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "MESSAGES_MAX", 2)
    async with kafka_publisher(unreachable) as publisher:
        for _ in range(2):
            await publisher.send([PublicMessage("topic", "key", b"")])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await publisher.send([PublicMessage("topic", "key", b"")])
        assert publisher.waiting == 2
        monkeypatch.setattr(publishing, "FLUSH_S", 0.0)


@asynccontextmanager
async def unreachable() -> AsyncIterator[Any]:
    raise OSError("nobody listens")
    yield


def impatient(servers: str) -> Callable[[], AbstractAsyncContextManager[AIOKafkaProducer]]:
    """Producers that give up soon, as those of a broker that is away for a minute."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[AIOKafkaProducer]:
        producer = AIOKafkaProducer(
            bootstrap_servers=servers, enable_idempotence=True, acks="all", request_timeout_ms=500
        )
        try:
            await producer.start()
            yield producer
        finally:
            with suppress(Exception):
                await producer.stop()

    return opened


@pytest.mark.parametrize("opened", [opening, impatient])
async def test_an_outage_of_the_broker_loses_nothing_and_changes_no_order(
    own_broker: KafkaServer, opened: Callable[[str], Callable[[], Any]]
) -> None:
    servers = own_broker.bootstrap_servers
    (topic,) = PrivateTopics(servers).create(TURNS)
    acknowledged = []
    async with kafka_publisher(opened(servers)) as publisher, asyncio.timeout(PATIENCE_S):
        for n in range(200):
            acknowledged.append(await publisher.send([PublicMessage(topic.name, "key", b"%d" % n)]))
        killed = asyncio.create_task(asyncio.to_thread(own_broker.kill))
        for n in range(200, 400):
            acknowledged.append(await publisher.send([PublicMessage(topic.name, "key", b"%d" % n)]))
            await asyncio.sleep(0.01)
        await killed
        await asyncio.to_thread(own_broker.start)
        await asyncio.gather(*acknowledged)
    assert firsts(numbers_by_key(servers, topic.name)["key"]) == list(range(400))
