"""Processors under Faust, with its weak spots closed. Nothing else here knows Faust, and no processor does.

One app is one processor, one consumer group, one process. Faust reads the work topic, hands on together what it has
fetched together, and commits what it is told is finished; order, retries and parking are the runner's. What Faust 0.15
does by itself and we do not let it: acknowledge what it has handed on (`noack`), go on without an agent that crashed,
wait for streams without end when partitions move, live on as a member of no group, poll with pauses that are felt, and
run the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol
from uuid import UUID

import faust
import mode
from faust.contrib.asgi import bind_to_running_loop

from domain.crash_points import crash_point
from domain.ids import SHARDS
from domain.parked import Stuck
from schemas import wire
from schemas.topics import dead_letters, group_of, partition_of, work_topic
from stream_processors.keyed_pool import Source
from stream_processors.processor import Processor
from stream_processors.runner import Delivery, Runner, Supplies
from stream_processors.slot import Slot

log_of = logging.getLogger(__name__)

COMMIT_S: Final = 0.5
SESSION_S, HEARTBEAT_S, REQUEST_S = 10.0, 2.0, 40.0
LOOK_S: Final = 0.5
PENDING_MAX: Final = 8_000  # of all partitions; beyond it nothing more is taken from Faust
REVOKE_S: Final = 3.0  # what handlers get to end when partitions move
DRAIN_S: Final = 5.0  # and when the process does
COMMIT_MAX_S: Final = 2.0
STOP_S: Final = 3.0
DEAD_LETTER_S, DEAD_LETTER_ATTEMPTS = 5.0, 3
MESSAGES_MAX: Final = 64  # of Faust's that wait for us, each with what came together of a partition
_STREAM_ID_BYTES: Final = 16
_NOBODY: Final = UUID(int=0)


class WorkerLost(Exception):
    """The worker cannot go on; a new process can."""


class Kafka(Protocol):
    """How Kafka is reached; see adapters.kafka.faust_consumer."""

    broker: list[str]
    credentials: Any

    def consumer(self, transport: Any, **options: Any) -> Any:
        """The consumer to use in the place of a transport's own."""

    async def partitions_of(self, topic: str) -> int:
        """How many partitions a topic has; waits for the broker and the topic for as long as it takes."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a host reads, with whom it shares that, and where it leaves what could not be handled."""

    topic: str
    group: str
    dead_letters: str

    @staticmethod
    def of(processor: str) -> Names:
        topic, group = work_topic(processor).name, group_of(processor)
        return Names(topic, group, dead_letters(topic, group).name)


@dataclass(frozen=True, slots=True)
class HostState:
    """How a host is. `polled_s_ago`: when it last asked for records. `waits_for`: what it cannot begin without, or ""."""

    partitions: frozenset[int]
    pending: int
    lag: int
    parked: int
    polled_s_ago: float
    waits_for: str


class FaustHost:
    """Delivers the records of a work topic to its processor, at least once, until it is drained or cancelled."""

    def __init__(
        self,
        processor: Processor,
        supplies: Supplies,
        kafka: Kafka,
        slot: Slot | None = None,
        names: Names | None = None,
    ) -> None:
        self.names = names or Names.of(processor.name)
        self._kafka, self._slot, self._partitions = kafka, slot, 1
        # Is told by each record how far its shard has grown at least.
        self.on_grown: Callable[[Mapping[int, int]], None] = lambda heads: None
        self._source: Source[Delivery] = Source(self._acknowledge, self._pause, self._resume)
        self.runner = Runner(processor, supplies, self._partition_of, self._source, self._leave_dead_letter)
        self._app: Any = None
        self._dead_letters: Any = None
        self._tps: dict[int, Any] = {}
        self._room, self._draining = asyncio.Event(), False
        self._waits_for = "a start"

    async def run(self) -> None:
        """Take part in the group until cancelled.

        Raises:
            WorkerLost, SlotLost, and whatever ended Faust: a new process is needed.
        """
        if self._slot is not None:
            self._waits_for = f"the name {self._slot.name}"
            await self._slot.take()
        try:
            self._waits_for = f"a broker, and the topic {self.names.topic} on it"
            self._partitions = await self._kafka.partitions_of(self.names.topic)
            self._waits_for = "the group"
            async with asyncio.TaskGroup() as group:
                if self._slot is not None:
                    group.create_task(self._slot.keep())
                group.create_task(self.runner.attend())
                await self._run_app()
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several
        finally:
            if self._slot is not None:
                await asyncio.shield(self._slot.give_back())

    async def drain(self) -> None:
        """Take nothing more, let handlers come to their end, commit, leave Faust; within ten seconds.

        `run` goes on doing nothing, until it is cancelled.
        """
        self._draining = True
        app, consumer = self._app, self._consumer
        if consumer is None:
            return
        consumer.stop_flow()
        app.flow_control.suspend()
        cancelled = await self.runner.pool.drain(DRAIN_S)
        if cancelled:
            log_of.warning("%d records were not finished; they will be delivered again", cancelled)
        await _within(COMMIT_MAX_S, consumer.commit(), "the last commit")
        await _within(STOP_S, app.stop(), "the end of Faust")

    @property
    def state(self) -> HostState:
        """How it is now."""
        consumer = self._consumer
        pool = self.runner.pool
        polled_s = getattr(consumer, "polled_s", None)
        return HostState(
            frozenset(pool.partitions),
            pool.pending,
            0 if consumer is None else sum(self._lag(consumer, each) for each in pool.partitions),
            self.runner.parked_count,
            0.0 if polled_s is None else time.monotonic() - polled_s,
            self._waits_for,
        )

    @property
    def shards(self) -> tuple[int, ...]:
        """Those whose records come to this worker, as far as it knows."""
        return tuple(shard for shard in range(SHARDS) if self._is_ours(shard))

    def serves(self, shard: int, stream_id: UUID) -> bool:
        """Whether the records of a stream come to this worker and are handled when they come, as far as it knows."""
        return self._is_ours(shard) and not self.runner.may_wait(stream_id)

    def _is_ours(self, shard: int) -> bool:
        takes_part = not self._draining and not self._waits_for
        return takes_part and self._partition_of(shard) in self.runner.pool.partitions

    def ready(self) -> bool:
        """Whether it takes part in its group; without a partition too, when there are fewer than workers."""
        return not self._waits_for

    # --- Faust

    async def _run_app(self) -> None:
        app = self._app = self._new_app()
        bind_to_running_loop(app)
        app.finalize()
        starting = asyncio.create_task(app.maybe_start(), name="start of Faust")
        try:
            while True:
                if starting.done():
                    starting.result()
                    await asyncio.sleep(LOOK_S)
                else:
                    await asyncio.wait((starting,), timeout=LOOK_S)
                self._check(app)
        finally:
            starting.cancel()
            await self.runner.pool.drain(0.0)
            await _within(STOP_S, app.stop(), "the end of Faust")

    def _check(self, app: Any) -> None:
        """Faust may have crashed, or be a member of no group without having noticed."""
        if self._draining:
            return
        if app.should_stop:
            raise WorkerLost(f"Faust ended: {app.crash_reason!r}") from app.crash_reason
        consumer = self._consumer
        if consumer is not None and (trouble := consumer.trouble()) is not None:
            raise WorkerLost(trouble)

    @property
    def _consumer(self) -> Any:
        # The property of the app would make one.
        return getattr(self._app, "_consumer", None)

    def _new_app(self) -> Any:
        app: Any = _App(
            self.names.group,
            broker=self._kafka.broker,
            broker_credentials=self._kafka.credentials,
            broker_client_id=self._slot.name if self._slot is not None else self.names.group,
            broker_commit_interval=COMMIT_S,
            broker_session_timeout=SESSION_S,
            broker_heartbeat_interval=HEARTBEAT_S,
            broker_request_timeout=REQUEST_S,
            consumer_group_instance_id=self._slot.name if self._slot is not None else None,
            consumer_auto_offset_reset="earliest",
            agent_supervisor=mode.CrashingSupervisor,
            stream_wait_empty=False,
            stream_buffer_maxsize=MESSAGES_MAX,
            key_serializer="raw",
            value_serializer="raw",
            store="memory://",
            table_standby_replicas=0,
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
            autodiscover=False,
        )
        app.transport.Consumer = self._kafka.consumer
        topic = partial(app.topic, schema=_AsTheyAre(key_type=bytes, value_type=bytes), acks=False)
        self._dead_letters = topic(self.names.dead_letters)
        app.agent(topic(self.names.topic), name=self.runner.processor.name)(self._consume)
        app.on_partitions_revoked.connect(self._on_revoked)
        app.on_partitions_assigned.connect(self._on_assigned)
        return app

    async def _consume(self, stream: Any) -> None:
        async for records in stream.noack():
            for record in records:
                self._take(record)
                while self.runner.pool.pending >= PENDING_MAX:
                    self._room.clear()
                    await self._room.wait()

    async def _on_revoked(self, app: Any, revoked: Iterable[Any], **_: Any) -> None:
        leaving = set(revoked)
        self._waits_for = "the group"
        await self.runner.pool.revoke([tp.partition for tp in leaving], REVOKE_S)
        self._room.set()
        await _within(COMMIT_MAX_S, app.consumer.commit(), "a commit")
        app.consumer.forget(leaving)

    async def _on_assigned(self, app: Any, assigned: Iterable[Any], **_: Any) -> None:
        self._tps = {tp.partition: tp for tp in assigned if tp.topic == self.names.topic}
        if not self._draining:
            self.runner.assign(set(self._tps))
        self._waits_for = ""

    # --- records

    def _take(self, record: Any) -> None:
        try:
            row = wire.unpack(record.value or b"")
            delivery = Delivery.of_row(row, origin=record)
            self.on_grown({row.shard: row.position})
        except (wire.UnknownFormat, wire.Malformed) as unknown:
            key = record.key or b""
            is_ours = len(key) == _STREAM_ID_BYTES
            delivery = Delivery(
                UUID(bytes=key) if is_ours else _NOBODY,
                tuple(each for each in range(SHARDS) if self._partition_of(each) == record.partition)
                if is_ours
                else (),
                unknown=unknown,
                origin=record,
            )
        self.runner.submit(record.partition, record.offset, delivery)

    def _acknowledge(self, delivery: Delivery) -> None:
        record = delivery.origin
        self._consumer.finished(self._tps[record.partition], record.offset + 1)
        self._room.set()
        crash_point("host.acked")

    def _pause(self, partition: int) -> None:
        self._consumer.on_buffer_full(self._tps[partition])

    def _resume(self, partition: int) -> None:
        self._consumer.on_buffer_drop(self._tps[partition])

    def _partition_of(self, shard: int) -> int:
        return partition_of(shard, self._partitions)

    def _lag(self, consumer: Any, partition: int) -> int:
        tp = self._tps.get(partition)
        reached = self.runner.pool.reached(partition)
        return 0 if tp is None else int(consumer.lag(tp, reached))

    async def _leave_dead_letter(self, delivery: Delivery, stuck: Stuck) -> None:
        """A copy for people. The stream waits in the log in any case, so that this may fail."""
        record = delivery.origin
        headers = {
            "error": stuck.error,
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "shard": stuck.shard,
            "position": stuck.position,
            "processor": self.runner.processor.name,
        }
        encoded = {name: str(value).encode("utf-8", "replace") for name, value in headers.items()}
        for attempt in range(1, DEAD_LETTER_ATTEMPTS + 1):
            try:
                async with asyncio.timeout(DEAD_LETTER_S):
                    sent = await self._dead_letters.send(
                        key=record.key, value=record.value, headers=encoded, force=True
                    )
                    # Faust only logs when this fails.
                    await sent
            except Exception as failure:
                log_of.warning("attempt %d to leave a dead letter failed: %r", attempt, failure)
            else:
                return
        log_of.error("no dead letter was left for offset %d of %s", record.offset, record.topic)


class _AsTheyAre(faust.Schema[bytes, bytes]):
    """Keys and values as they come: whoever takes them knows what they are."""

    def compile(self, app: Any, **_: Any) -> Any:
        create_event = app.create_event

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return create_event(message.key, message.value, message.headers, message)

        return decode


class _App(faust.App):
    def _create_directories(self) -> None:
        """Nothing of ours is on disk."""


async def _within(seconds: float, work: Awaitable[Any], what: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            await work
    except Exception as failure:
        log_of.warning("%s failed: %r", what, failure)
