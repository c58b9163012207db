"""Faust's consumer with our bounds, and what it can say about its own health.

Beside stream_processors/faust_app.py the only file that knows Faust: what is wrong with a consumer is known to aiokafka.
Faust 0.15 runs it in a thread of its own, never says that its group has thrown it out, drops what a topic that was
made anew delivers, and waits for its thread without end. It also hands on and acknowledges record by record, which
costs more than most of what is done with them: here those of a partition that were fetched together are one message,
whose value is the list of them, and whoever handles them says how far each partition is finished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import KafkaError
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer
from mode.services import WaitResults
from mode.threads import WorkerThread
from mode.utils.futures import maybe_async

from adapters.kafka.clients import (
    FETCH_BYTES_MAX,
    FETCH_WAIT_MS,
    HEARTBEAT_MS,
    REQUEST_MS,
    SESSION_MS,
    KafkaConfig,
    open_consumer,
)
from adapters.kafka.quiet import quieten_clients
from schemas.topics import RECORD_BYTES_MAX

log_of = logging.getLogger(__name__)

METADATA_MS: Final = 5_000  # how late it is noticed that the topic was made anew
POLL_RECORDS_MAX: Final = 500
REBALANCE_MS: Final = 20_000  # what members get to let go of their partitions
_HANDING_ON: Final = 2  # what Faust waits for with each message: that it is taken, or that the flow ends
SEEK_S: Final = 10.0
LOOK_S: Final = 1.0
TWINS_S: Final = 60.0
TWINS_MAX: Final = (
    3  # times in `TWINS_S` that a member with a name may be thrown out and still be the only one of it
)
SILENT_S: Final = 90.0  # without a group, or without asking for records, while the broker answers


class TopicBegunAnew(Exception):
    """The topic was deleted and made again; what was committed is of the old one. A new start reads all of the new."""


class WorkerKafka:
    """What a Faust app needs to know of Kafka: where it is, who we are, and the consumer to use."""

    def __init__(self, config: KafkaConfig) -> None:
        quieten_clients()
        self._config = config
        self.broker = config.faust_broker()
        self.credentials = config.faust_credentials()

    def consumer(self, transport: Any, **options: Any) -> WorkerConsumer:
        """The consumer of a Faust transport; to be put in the place of the transport's own."""
        return WorkerConsumer(transport, kafka=self._config, **options)

    async def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; waits for the broker and the topic for as long as it takes."""
        while True:
            try:
                async with open_consumer(self._config, "oshaani-looking", topic) as consumer:
                    while True:
                        await consumer.topics()
                        if found := consumer.partitions_for_topic(topic):
                            return len(found)
                        log_of.warning("there is no topic %s; make it with `oshaani topics apply`", topic)
                        await asyncio.sleep(LOOK_S)
            except (KafkaError, TimeoutError, OSError) as failure:
                log_of.warning("no broker answers: %r", failure)
                await asyncio.sleep(LOOK_S)


class WorkerConsumer(Consumer):
    """The consumer of one worker."""

    def __init__(self, transport: Any, *, kafka: KafkaConfig, **options: Any) -> None:
        self.kafka = kafka
        self.polled_s = self._well_s = time.monotonic()
        self._member, self._joined_s = "", deque[float](maxlen=TWINS_MAX + 2)
        self._finished: dict[Any, int] = {}  # of each partition, the offset that follows on what is finished
        super().__init__(transport, **options)

    def trouble(self) -> str | None:
        """Why this consumer will not deliver anything any more, None while it may; to be asked again and again."""
        consumer = self._thread._consumer
        coordinator = getattr(consumer, "_coordinator", None)
        if coordinator is None:
            return None
        if (fatal := coordinator._pending_exception) is not None:
            return f"the group has ended our membership: {fatal!r}"
        if coordinator._coordination_task.done() and not coordinator._closing.done():
            return "nobody keeps our membership in the group"
        if self._has_a_twin(coordinator.member_id):
            return "another process has our name; the group throws out the one for the other"
        now_s = time.monotonic()
        is_silent = now_s - self.polled_s > SILENT_S or coordinator.generation < 0
        if coordinator.coordinator_id is None or not is_silent:
            self._well_s = now_s
        elif now_s - self._well_s > SILENT_S:
            return f"no records were asked for in {SILENT_S:g} s, although the broker answers"
        return None

    def _has_a_twin(self, member: str) -> bool:
        # A member that joins under a name is given a new id, and the one that had the name does not hear why it has
        # lost it: aiokafka joins again, and so on.
        if self.app.conf.consumer_group_instance_id is None or not member or member == self._member:
            return False
        self._member = member
        self._joined_s.append(time.monotonic())
        times = self._joined_s
        return len(times) == times.maxlen and times[-1] - times[0] < TWINS_S

    def lag(self, partition: Any, next_offset: int | None) -> int:
        """Records of a partition behind `next_offset`; None stands for what is committed."""
        if next_offset is None:
            next_offset = self._committed_offset.get(partition)
        try:
            end = self.highwater(partition)
        except Exception:
            return 0  # not ours any more
        return max(0, end - next_offset) if end is not None and next_offset is not None else 0

    # --- what is finished

    def finished(self, partition: Any, next_offset: int) -> None:
        """Everything of a partition before this offset may be committed."""
        self._finished[partition] = next_offset

    def forget(self, partitions: Iterable[Any]) -> None:
        """Partitions were revoked: what was finished of them is committed by now, or never will be."""
        for partition in partitions:
            self._finished.pop(partition, None)

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Any:
        return list(self._finished)

    def _new_offset(self, tp: Any) -> int | None:
        return self._finished.get(tp)

    # --- what is fetched

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[Any, Any]]:
        """As in Faust, but with one message for all records of a partition; those of tables come one by one."""
        fetched, active = await self._wait_next_records(timeout)
        if fetched is None or self.should_stop:
            return
        if not self.flow_active:
            await self._seek_again()
            return
        generation = self.app.consumer_generation_id
        for tp, records in fetched.items():
            if not self.flow_active or self.app.consumer_generation_id != generation:
                return
            if active is None or tp in active or tp in self._buffered_partitions:
                self.app.monitor.track_tp_end_offset(tp, self.highwater(tp))
                if tp.topic in self.app.tables.changelog_topics:
                    for record in records:
                        yield tp, self._to_message(tp, record)
                else:
                    yield tp, self._to_message_of_all(tp, records)

    async def _seek_again(self) -> None:
        try:
            await self.perform_seek()
        except Exception as failure:
            log_of.warning("what is committed cannot be looked up: %r", failure)

    def _to_message_of_all(self, tp: Any, records: Sequence[Any]) -> Any:
        committed, first = self._committed_offset.get(tp), records[0].offset
        if committed is not None and first < committed:
            raise TopicBegunAnew(f"record {first} of {tp} came after {committed} was committed")
        message: Any = self._to_message(tp, records[-1])
        message.key, message.value = None, records
        return message

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, thread_loop=self.loop, beacon=self.beacon, Worker=_InLoop)

    async def perform_seek(self) -> None:
        """Begin at what is committed, or anew where the topic does not reach that far any more."""
        await super().perform_seek()
        committed = {tp: offset for tp, offset in self._committed_offset.items() if offset is not None}
        async with asyncio.timeout(SEEK_S):
            ends = await self._thread.highwaters(*committed) if committed else {}
        for tp, offset in committed.items():
            if ends.get(tp, offset) < offset:
                log_of.error(
                    "%s ends before %d, which is committed; reading it from its beginning", tp, offset
                )
                self._committed_offset[tp] = self._read_offset[tp] = None

    async def wait_first(self, *waited: Any, timeout: Any = None) -> Any:
        """As in Faust, which races the handing on of every message, in four tasks, against the end of the flow.

        A message that will be taken at once is handed on by itself.
        """
        if len(waited) == _HANDING_ON and self._is_taken_at_once():
            handing_on, suspension = waited
            suspension.close()
            await handing_on
            return WaitResults([handing_on], [None], False)
        return await super().wait_first(*waited, timeout=timeout)

    def _is_taken_at_once(self) -> bool:
        app = self.app
        to_send = app.producer.buffer
        return (
            app.flow_control.is_active()
            and to_send.pending.qsize() < to_send.max_messages
            and not any(channel.queue.full() for channel in app.topics)
        )

    async def _wait_next_records(self, timeout: float) -> Any:
        found = await super()._wait_next_records(timeout)
        self.polled_s = time.monotonic()
        return found


class _Thread(AIOKafkaConsumerThread):
    async def call_thread(self, fun: Any, *args: Any, **kwargs: Any) -> Any:
        return await maybe_async(fun(*args, **kwargs))

    async def _gather_remaining_tasks(self) -> None:
        """The loop's other tasks are not ours to end."""

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        conf, consumer = self.app.conf, self.consumer
        assert isinstance(consumer, WorkerConsumer)
        has_tables = bool(self.app.tables.changelog_topics)
        self._assignor = self.app.assignor if has_tables else RoundRobinPartitionAssignor
        return AIOKafkaConsumer(
            **consumer.kafka.client_options() | {"metadata_max_age_ms": METADATA_MS},
            client_id=conf.broker_client_id,
            group_id=conf.id,
            group_instance_id=conf.consumer_group_instance_id,
            partition_assignment_strategy=[self._assignor],
            enable_auto_commit=False,
            auto_offset_reset=conf.consumer_auto_offset_reset,
            isolation_level="read_uncommitted",
            # Faust's own 1500 is felt when partitions change hands: what else is asked of the broker waits behind it.
            fetch_max_wait_ms=FETCH_WAIT_MS,
            fetch_min_bytes=1,
            fetch_max_bytes=FETCH_BYTES_MAX,
            max_partition_fetch_bytes=RECORD_BYTES_MAX,
            max_poll_records=POLL_RECORDS_MAX,
            # Our pool holds records for as long as it takes; whether it lives is told by the watchdog.
            max_poll_interval_ms=24 * 3600 * 1000,
            session_timeout_ms=SESSION_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            rebalance_timeout_ms=REBALANCE_MS,
            request_timeout_ms=REQUEST_MS,
        )


class _InLoop(WorkerThread):
    """Stands where Faust starts a thread, and runs the consumer in the loop of everything else.

    In a thread of its own each record changes threads twice, and both wait for the interpreter's lock. What is gained by
    a thread, heartbeats while handlers keep the loop busy, is nothing to us: ours only wait.
    """

    def __init__(self, service: Any, **options: Any) -> None:
        super().__init__(service, **options)
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._serving = asyncio.get_running_loop().create_task(self.service._serve())

    def stop(self) -> None:
        """It has ended with the service."""
