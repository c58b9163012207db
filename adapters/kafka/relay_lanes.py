"""Lanes of the relay: one partition of one topic each, fed in order and acknowledged in order.

A lane has one batch under way at a time and fills the next one meanwhile, so that a single record goes at once and many
go in few batches, and nothing is ever sent before what comes before it was acknowledged. Lanes that gather send at the same
moments: what has come for all of them goes in one request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, ProducerClosed

from adapters.kafka.clients import BATCH_BYTES, START_S, KafkaConfig, open_consumer
from adapters.kafka.quiet import quieten_clients
from domain.crash_points import crash_point

REQUEST_MS: Final = 10_000  # what the broker may take to answer before its client asks again
ACK_S: Final = 60.0  # how long a producer may try before another one begins anew
CLOSE_S: Final = 2.0


class TopicsChanged(Exception):
    """Topics appeared, disappeared, or lost records: all must be looked at again."""


class Lane:
    """The way of records into a partition. `sent` and `acked` count records; `next_offset` follows the last of them."""

    def __init__(
        self, broker: Broker, to: TopicPartition, on_ack: Callable[[int], None], gather_s: float = 0.0
    ) -> None:
        self._broker, self.to, self._on_ack, self._gather_s = broker, to, on_ack, gather_s
        self._batches: deque[Any] = deque()
        self._open: Any = None
        self._more = asyncio.Event()
        self.sent = self.acked = self.next_offset = 0
        self._sending_bytes: int = 0

    @property
    def waiting(self) -> int:
        """Records that are not acknowledged yet."""
        return self.sent - self.acked

    @property
    def waiting_bytes(self) -> int:
        """What they take in memory."""
        return self._sending_bytes + int(sum(batch.size() for batch in self._batches))

    def append(self, key: bytes, value: bytes) -> None:
        """Put a record behind those before it; `flush` sends it."""
        batch = self._open
        if batch is None or batch.append(timestamp=None, key=key, value=value) is None:
            batch = self._open = self._broker.producer.create_batch()
            self._batches.append(batch)
            # A batch takes its first record whatever its size.
            taken = batch.append(timestamp=None, key=key, value=value)
            assert taken is not None, "an empty batch takes a record"
        self.sent += 1

    def flush(self) -> None:
        """Have what was appended sent."""
        if self._batches:
            self._more.set()

    async def run(self) -> None:
        """Send what is appended, until cancelled.

        Raises:
            KafkaError, TimeoutError: this producer will not bring it there.
            TopicsChanged: the partition is not the one that it was.
        """
        while True:
            await self._more.wait()
            if self._gather_s and len(self._batches) == 1:
                await asyncio.sleep(self._gather_s - asyncio.get_running_loop().time() % self._gather_s)
            self._more.clear()
            for _ in range(len(self._batches)):
                batch = self._batches.popleft()
                if batch is self._open:
                    self._open = None
                await self._send(batch)
            self.flush()  # what has come meanwhile

    async def _send(self, batch: Any) -> None:
        crash_point("relay.before_send")
        self._sending_bytes = batch.size()
        async with asyncio.timeout(ACK_S):
            try:
                future = await self._broker.producer.send_batch(
                    batch, self.to.topic, partition=self.to.partition
                )
            except AssertionError as unrecognized:
                raise TopicsChanged(f"{self.to.topic} has no partition {self.to.partition}") from unrecognized
            crash_point("relay.sent")
            offset: int = (await future).offset
        crash_point("relay.acked")
        count = batch.record_count()
        # Unknown (-1) when the broker had it already and forgot where.
        if offset >= 0:
            if offset < self.next_offset:
                self._broker.restarted.add(self.to)
                raise TopicsChanged(f"{self.to.topic} lost records of partition {self.to.partition}")
            self.next_offset = offset + count
        self.acked += count
        self._sending_bytes = 0
        self._on_ack(count)


class Broker:
    """A producer, and a consumer that only asks for offsets; both of one session with the cluster."""

    def __init__(
        self, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer, restarted: set[TopicPartition]
    ) -> None:
        self.producer, self._consumer = producer, consumer
        self.restarted = restarted  # partitions that began anew while records were sent to them

    async def partition_counts(self, topics: Collection[str]) -> dict[str, int]:
        """The topics that there are now, and their numbers of partitions.

        Raises:
            KafkaError, TimeoutError: the cluster does not answer.
        """
        client = self.producer.client
        async with asyncio.timeout(START_S):
            client.set_topics(topics)
            if not await client.force_metadata_update():
                raise KafkaError("no broker told of the topics")
        found = {topic: client.cluster.partitions_for_topic(topic) for topic in topics}
        return {topic: len(partitions) for topic, partitions in found.items() if partitions}

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """The offset after the last record of each partition.

        Raises:
            KafkaError, TimeoutError: the cluster does not answer.
        """
        async with asyncio.timeout(START_S):
            found: dict[TopicPartition, int] = await self._consumer.end_offsets(list(partitions))
        return found


@asynccontextmanager
async def open_broker(
    config: KafkaConfig, client_id: str, restarted: set[TopicPartition]
) -> AsyncIterator[Broker]:
    """Connect to the cluster; what is not acknowledged when the block ends is not waited for.

    Raises:
        KafkaError, TimeoutError: it cannot be reached.
    """
    quieten_clients()
    producer = AIOKafkaProducer(
        **config.client_options(),
        client_id=client_id,
        acks="all",
        enable_idempotence=True,
        linger_ms=0,
        compression_type="zstd",
        max_batch_size=BATCH_BYTES,
        request_timeout_ms=REQUEST_MS,
    )
    try:
        async with asyncio.timeout(START_S):
            await producer.start()
        async with open_consumer(config, client_id) as consumer:
            yield Broker(producer, consumer, restarted)
    finally:
        await _discard(producer)


async def _discard(producer: AIOKafkaProducer) -> None:
    """Close it without waiting for records, as `stop` would even while the broker is away: they are sent again."""
    producer._closed = True
    producer._message_accumulator.fail_all(ProducerClosed())
    task = producer._sender.sender_task
    if task is not None:
        task.cancel()
    try:
        async with asyncio.timeout(CLOSE_S):
            await producer.client.close()
            if task is not None:
                await asyncio.wait([task])
    except TimeoutError:
        pass
