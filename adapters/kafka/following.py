"""A topic read from its end by whoever wants all of it and knows where else to look for what it missed.

No group and no offsets: every process that follows sees everything that is written while it does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from adapters.kafka.clients import KafkaConfig, open_consumer

log_of = logging.getLogger(__name__)

FETCH_MS = 500
METADATA_S = 10.0
PAUSE_S = 1.0


async def follow_topic(
    config: KafkaConfig, client_id: str, topic: str, take: Callable[[list[bytes]], Awaitable[None]]
) -> None:
    """Hand over what is written to a topic from now on, until cancelled; survives any outage of the broker."""
    while True:
        try:
            async with open_consumer(config, client_id) as consumer:
                await _begin_at_end(consumer, topic)
                while True:
                    found = await consumer.getmany(timeout_ms=FETCH_MS)
                    if found:
                        await take([message.value for messages in found.values() for message in messages])
        except (KafkaError, TimeoutError, OSError) as failure:
            log_of.info("whoever follows %s waits for the broker: %r", topic, failure)
        await asyncio.sleep(PAUSE_S)


async def _begin_at_end(consumer: AIOKafkaConsumer, topic: str) -> None:
    async with asyncio.timeout(METADATA_S):
        await consumer.topics()
        partitions = [TopicPartition(topic, each) for each in consumer.partitions_for_topic(topic) or ()]
        if not partitions:
            raise TimeoutError(f"there is no topic {topic}; run `oshaani topics apply`")
        consumer.assign(partitions)
        await consumer.seek_to_end()
