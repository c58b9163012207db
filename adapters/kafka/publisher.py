"""Messages on public topics, by an idempotent producer.

Whatever is not acknowledged yet is kept, in order. When the producer fails, for example because the broker was away
for longer than it waits, another one begins with the oldest of it: so each message is published at least once, and no
message is published for the first time before an earlier one with the same topic and key.

What is given within `GATHER_S` goes in one batch for each partition, and the batches in one request: the client's own
lingering would begin anew for each partition, and make a request of nearly each.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError
from aiokafka.partitioner import murmur2

from domain.ports import PublicMessage
from schemas.topics import RECORD_BYTES_MAX

log_of = logging.getLogger(__name__)

MESSAGES_MAX = 5_000  # not acknowledged yet
GATHER_S = 0.1
TOGETHER_MAX = 1_000
SEND_S = 30.0  # what handing them to the client may last, their topics' metadata included
KEYS_MAX = 20_000  # whose partitions are known
FLUSH_S = 5.0  # what is waited for in the end
PAUSE_FIRST_S, PAUSE_MAX_S = 0.1, 2.0
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

OpenProducer = Callable[[], AbstractAsyncContextManager[AIOKafkaProducer]]


@dataclass(slots=True, eq=False)
class _Batch:
    """What was given at once: how many of it are not acknowledged yet, and who waits for that."""

    left: int
    acknowledged: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class _Entry:
    message: PublicMessage
    batch: _Batch


@dataclass(slots=True, eq=False)
class _Filling:
    """A batch of the client's, and which messages are in it."""

    builder: Any
    numbers: list[int]

    def add(self, number: int, key: bytes, message: PublicMessage) -> bool:
        taken = self.builder.append(
            timestamp=None, key=key, value=message.value, headers=list(message.headers)
        )
        if taken is not None:
            self.numbers.append(number)
        return taken is not None


class KafkaPublisher:
    """Implements `domain.ports.Publisher`; see `kafka_publisher`."""

    def __init__(self, open_producer: OpenProducer) -> None:
        self._open_producer = open_producer
        self._numbers = 0
        self._unacknowledged: OrderedDict[int, _Entry] = OrderedDict()
        self._unsent: deque[int] = deque()
        self._gate = asyncio.Lock()
        self._given, self._ebbed = asyncio.Event(), asyncio.Event()

    @property
    def waiting(self) -> int:
        """Messages that the broker has not acknowledged yet."""
        return len(self._unacknowledged)

    async def send(self, messages: Sequence[PublicMessage]) -> Awaitable[None]:
        """As in `Publisher`; a message larger than the broker takes fails what was given with it."""
        batch = _Batch(len(messages), asyncio.get_running_loop().create_future())
        # The lock is fair: who waits for room is served in order.
        async with self._gate:
            while len(self._unacknowledged) >= MESSAGES_MAX:
                self._ebbed.clear()
                await self._ebbed.wait()
            for message in messages:
                self._numbers += 1
                self._unacknowledged[self._numbers] = _Entry(message, batch)
                self._unsent.append(self._numbers)
            self._given.set()
        if not messages:
            batch.acknowledged.set_result(None)
        return batch.acknowledged

    async def run(self) -> None:
        """Publish what is given, until cancelled."""
        pause_s = PAUSE_FIRST_S
        while True:
            try:
                async with self._open_producer() as producer:
                    pause_s = PAUSE_FIRST_S
                    await self._feed(producer)
            except (KafkaError, OSError, TimeoutError) as failure:
                log_of.warning("%d messages wait for the broker: %r", self.waiting, failure)
            except Exception:
                # The client's own errors: it does not survive all of what a broker may answer.
                log_of.exception("the producer failed; %d messages wait for another", self.waiting)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything is acknowledged, or no longer than that."""
        waited_for = {entry.batch.acknowledged for entry in self._unacknowledged.values()}
        if waited_for:
            await asyncio.wait(waited_for, timeout=timeout_s)

    def abandon(self) -> None:
        """Nobody will publish what is left."""
        for entry in self._unacknowledged.values():
            entry.batch.acknowledged.cancel()

    # --- one producer's life

    async def _feed(self, producer: AIOKafkaProducer) -> None:
        """Send everything that is not acknowledged, and what comes, until the producer fails."""
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unsent = deque(self._unacknowledged)
        sending = asyncio.ensure_future(self._send_all(producer, failed))
        try:
            ended, _ = await asyncio.wait({sending, failed}, return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                each.result()
        finally:
            sending.cancel()
            failed.cancel()

    async def _send_all(self, producer: AIOKafkaProducer, failed: asyncio.Future[None]) -> None:
        while True:
            while self._unsent:
                count = min(len(self._unsent), TOGETHER_MAX)
                async with asyncio.timeout(SEND_S):
                    await self._send_some(producer, failed, [self._unsent.popleft() for _ in range(count)])
            self._given.clear()
            await self._given.wait()
            await asyncio.sleep(GATHER_S)

    async def _send_some(
        self, producer: AIOKafkaProducer, failed: asyncio.Future[None], numbers: Sequence[int]
    ) -> None:
        filling: dict[tuple[str, int], _Filling] = {}
        for number in numbers:
            entry = self._unacknowledged.get(number)
            if entry is None:
                continue
            message, key = entry.message, entry.message.key.encode()
            if len(key) + len(message.value or b"") > RECORD_BYTES_MAX:
                self._give_up(number, MessageSizeTooLargeError())
                continue
            to = message.topic, _hashed(key) % len(await producer.partitions_for(message.topic))
            batch = filling.get(to)
            if batch is None or not batch.add(number, key, message):
                if batch is not None:
                    await self._send(producer, failed, to, batch)
                # An empty batch takes a message whatever its size.
                batch = filling[to] = _Filling(producer.create_batch(), [])
                batch.add(number, key, message)
        for to, batch in filling.items():
            await self._send(producer, failed, to, batch)

    async def _send(
        self, producer: AIOKafkaProducer, failed: asyncio.Future[None], to: tuple[str, int], batch: _Filling
    ) -> None:
        topic, partition = to
        delivery = await producer.send_batch(batch.builder, topic, partition=partition)
        delivery.add_done_callback(partial(self._delivered, batch.numbers, failed))

    def _delivered(self, numbers: Sequence[int], failed: asyncio.Future[None], delivery: Any) -> None:
        failure = ConnectionError("closed") if delivery.cancelled() else delivery.exception()
        if failure is None:
            for number in numbers:
                entry = self._remove(number)
                if entry is not None:
                    entry.batch.left -= 1
                    if entry.batch.left == 0 and not entry.batch.acknowledged.done():
                        entry.batch.acknowledged.set_result(None)
        elif isinstance(failure, TOO_LARGE):
            for number in numbers:  # one: batches of many are smaller than what a broker takes
                self._give_up(number, failure)
        elif not failed.done():
            failed.set_exception(failure)
            failed.exception()

    def _give_up(self, number: int, failure: BaseException) -> None:
        entry = self._remove(number)
        if entry is not None and not entry.batch.acknowledged.done():
            entry.batch.acknowledged.set_exception(failure)

    def _remove(self, number: int) -> _Entry | None:
        entry = self._unacknowledged.pop(number, None)
        if len(self._unacknowledged) < MESSAGES_MAX:
            self._ebbed.set()
        return entry


@lru_cache(KEYS_MAX)
def _hashed(key: bytes) -> int:
    """What every Kafka client divides by the number of partitions to find a key's."""
    return int(murmur2(key)) & 0x7FFFFFFF


@asynccontextmanager
async def kafka_publisher(open_producer: OpenProducer) -> AsyncIterator[KafkaPublisher]:
    """A publisher for as long as the block; in the end it waits for what is under way."""
    publisher = KafkaPublisher(open_producer)
    running = asyncio.create_task(publisher.run())
    try:
        yield publisher
        await publisher.flush(FLUSH_S)
    finally:
        running.cancel()
        await asyncio.wait({running})
        publisher.abandon()
