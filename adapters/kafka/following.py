"""A topic read from its end by whoever wants all of it and knows where else to look for what it missed.

No group and no offsets: every process that follows sees everything that is written while it does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiokafka.errors import KafkaError

from adapters.kafka.clients import KafkaConfig, open_consumer

log_of = logging.getLogger(__name__)

FETCH_MS = 500
PAUSE_S = 1.0


async def follow_topic(
    config: KafkaConfig,
    client_id: str,
    topic: str,
    take: Callable[[list[bytes]], Awaitable[None]],
    gather_ms: int = 0,
) -> None:
    """Hand over what is written to a topic from now on, until cancelled; survives any outage of the broker.

    `gather_ms`: how long records may wait for company.
    """
    while True:
        try:
            async with open_consumer(
                config, client_id, topic, auto_offset_reset="latest", gather_ms=gather_ms
            ) as consumer:
                while True:
                    found = await consumer.getmany(timeout_ms=FETCH_MS)
                    if found:
                        await take([message.value for messages in found.values() for message in messages])
        except (KafkaError, TimeoutError, OSError) as failure:
            log_of.info("whoever follows %s waits for the broker: %r", topic, failure)
        await asyncio.sleep(PAUSE_S)
