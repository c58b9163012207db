"""One processor at work: its records in their order, many streams at once, and those it cannot go on with parked.

What delivers the records is its host's affair. A record that keeps failing parks its stream: later ones of the stream
are let go of, since the log has them, and everything else flows. When an operator asks for it, the stream is read from
the log, from where it stands, and goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from commands.bus import Overloaded
from domain.crash_points import crash_point
from domain.event_log import STREAM_EVENTS_MAX, EventLog, LogUnavailable, StoredEvent
from domain.parked import ParkedRecords, ParkedStream, Stuck
from schemas.codec import EVENT_TYPES, type_of
from schemas.records import AnyRecord, ObjectMissing, Records, Unreadable
from stream_processors.keyed_pool import Hopeless, KeyedPool, Limits, Source
from stream_processors.processor import Processor, Work

log_of = logging.getLogger(__name__)

PATIENT: Final = (LogUnavailable, Overloaded)  # not the record's fault
ATTEMPTS_MAX = 6
RUNNING_MAX = (
    512  # more than the model calls of one worker, so that those waiting for a call block nobody else
)
PENDING_MAX = 1_000  # of one partition
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 5.0
ASK_S = 1.0  # how late it may be noticed that an operator asks for something
LOOK_S = 5.0  # how late it may be noticed that another process has parked a stream


@dataclass(frozen=True, slots=True)
class Supplies:
    """What a host gives to the processors it runs."""

    work: Work
    log: EventLog
    records: Records
    parked: ParkedRecords


@dataclass(slots=True, eq=False)
class Delivery:
    """A record on its way to a processor: open, or as a row, or with the reason why it is not even that.

    `shards`: where the stream may be, just one unless the record could not be read. `origin` is its host's own.
    """

    stream_id: UUID
    shards: tuple[int, ...]
    position: int = 0
    stream_version: int = 0
    tenant_id: UUID | None = None
    type: str = "?"
    record: AnyRecord | Unreadable | None = None
    row: StoredEvent | None = None
    unknown: Exception | None = None
    origin: Any = None

    @staticmethod
    def of_record(record: AnyRecord) -> Delivery:
        return Delivery(
            record.stream_id,
            (record.shard,),
            record.position,
            record.stream_version,
            record.tenant_id,
            record.type,
            record=record,
        )

    @staticmethod
    def of_row(
        row: StoredEvent, record: AnyRecord | Unreadable | None = None, origin: Any = None
    ) -> Delivery:
        return Delivery(
            row.stream_id,
            (row.shard,),
            row.position,
            row.stream_version,
            row.tenant_id,
            row.type,
            record=record,
            row=row,
            origin=origin,
        )


@dataclass(slots=True, eq=False)
class _Resumption:
    """A parked stream that goes on, and how far it has come with that."""

    parked: ParkedStream
    position: int  # the first that is to be handled
    stream_version: int  # the last that need not be read any more
    through: int = 0  # the last position that was read
    row: StoredEvent | None = None  # what is being handled


class Runner:
    """Runs one processor until its host revokes the partitions it gave.

    `partition_of` says which partition of the host's a shard is in. `on_parked` is told what could not be handled
    before its stream is parked; it must not raise.
    """

    def __init__(
        self,
        processor: Processor,
        supplies: Supplies,
        partition_of: Callable[[int], Hashable],
        source: Source[Delivery] | None = None,
        on_parked: Callable[[Delivery, Stuck], Awaitable[None]] | None = None,
    ) -> None:
        self.processor = processor
        self._work, self._log = supplies.work, supplies.log
        self._records, self._parked = supplies.records, supplies.parked
        self._partition_of, self._on_parked = partition_of, on_parked
        self._source = source or Source()
        self._types = {type_of(event_class).name for event_class in processor.handlers}
        self._waiting: set[UUID] = set()
        self._is_known, self._looking = False, asyncio.Lock()
        self._through: dict[UUID, int] = {}  # streams that went on, and how far the log was read for it
        limits = Limits(RUNNING_MAX, PENDING_MAX, ATTEMPTS_MAX, BACKOFF_FIRST_S, BACKOFF_MAX_S, PATIENT)
        self.pool = KeyedPool[Delivery | _Resumption](
            self._handle,
            self._give_up,
            Source(self._acknowledge, self._source.on_full, self._source.on_ebb),
            limits,
        )

    @property
    def parked_count(self) -> int:
        """Streams that wait, as far as this process knows."""
        return len(self._waiting)

    def may_wait(self, stream_id: UUID) -> bool:
        """Whether a stream waits for an operator, or that is not known yet."""
        return not self._is_known or stream_id in self._waiting

    def wants(self, event_type: str) -> bool:
        """Whether events of this type concern the processor; those of a type nobody knows may."""
        return event_type in self._types or event_type not in EVENT_TYPES

    def assign(self, partitions: set[Any]) -> None:
        """Take records of these partitions from now on."""
        # Others may have parked streams of theirs meanwhile.
        self._is_known = False
        self.pool.assign(partitions)

    def submit(self, partition: Hashable, position: int, delivery: Delivery) -> bool:
        """Take a record; see `KeyedPool.submit`."""
        return self.pool.submit(
            partition, position, self._key(delivery.stream_id, delivery.tenant_id), delivery
        )

    async def attend(self) -> None:
        """Do what operators ask for, until cancelled."""
        loop = asyncio.get_running_loop()
        looked_s = loop.time()
        while True:
            await asyncio.sleep(ASK_S)
            try:
                if loop.time() - looked_s >= LOOK_S:
                    looked_s = loop.time()
                    await self._look()
                if self._waiting:
                    await self._take_up_asked()
            except LogUnavailable as failure:
                log_of.warning("%s: operators wait, %s", self.processor.name, failure)

    # --- records

    async def _handle(self, task: Delivery | _Resumption) -> Awaitable[None] | None:
        if isinstance(task, _Resumption):
            await self._resume(task)
            return None
        if not await self._is_ours(task):
            return None
        record = await self._open(task)
        if record is None:
            return None
        crash_point("host.delivered")
        later = await self.processor.handlers[type(record.event)](record, self._work)
        crash_point("host.handled")
        return later

    async def _is_ours(self, delivery: Delivery) -> bool:
        """Whether the record is to be handled now, and was not already when its stream went on."""
        if not self._is_known:
            await self._look(only_if_unknown=True)
        stream_id = delivery.stream_id
        if stream_id in self._waiting:
            if await self._parked.waits(self.processor.name, stream_id):
                return False
            self._waiting.discard(stream_id)
        through = self._through.get(stream_id)
        if through is not None:
            if 0 < delivery.position <= through:
                return False
            del self._through[stream_id]
        return True

    async def _open(self, delivery: Delivery) -> AnyRecord | None:
        """The record, None if it is none for this processor."""
        if delivery.unknown is not None:
            raise Hopeless from delivery.unknown
        record = delivery.record
        if record is None:
            assert delivery.row is not None
            if not self.wants(delivery.type):
                return None
            # No processor reads personal text from a record; whoever needs it asks for it.
            (record,) = await self._records.open_some([delivery.row], personal=())
        return self._readable(record)

    def _readable(self, record: AnyRecord | Unreadable) -> AnyRecord | None:
        if isinstance(record, Unreadable):
            if isinstance(record.error, ObjectMissing):
                raise record.error
            raise Hopeless from record.error
        return record if type(record.event) in self.processor.handlers else None

    def _acknowledge(self, task: Delivery | _Resumption) -> None:
        assert isinstance(task, Delivery)
        self._source.acknowledge(task)

    # --- streams that wait

    async def _give_up(self, task: Delivery | _Resumption, failure: Exception) -> None:
        error = repr(failure.__cause__ if isinstance(failure, Hopeless) else failure)
        if isinstance(task, _Resumption):
            stuck = task.parked.stuck
            if (row := task.row) is not None:
                stuck = Stuck(row.shard, row.position, row.stream_version, row.type, error)
            await self._parked.carried_out(task.parked, stuck)
            return
        stuck = Stuck(await self._shard_of(task), task.position, task.stream_version, task.type, error)
        log_of.error(
            "%s cannot handle event %d of shard %d (%s): %s",
            self.processor.name,
            stuck.position,
            stuck.shard,
            stuck.type,
            error,
        )
        if self._on_parked is not None:
            await self._on_parked(task, stuck)
        if stuck.shard >= 0:
            await self._parked.park(self.processor.name, task.stream_id, task.tenant_id, stuck)
            self._waiting.add(task.stream_id)
            crash_point("host.parked")

    async def _shard_of(self, delivery: Delivery) -> int:
        """Where the stream is; -1: nowhere, the record is none of our log's."""
        if len(delivery.shards) == 1:
            return delivery.shards[0]
        for shard in delivery.shards:
            if await self._log.read_stream_after(shard, delivery.stream_id, 0, 1):
                return shard
        return -1

    async def _look(self, *, only_if_unknown: bool = False) -> None:
        async with self._looking:
            if only_if_unknown and self._is_known:
                return
            before = self._waiting.copy()
            found = await self._parked.waiting(self.processor.name)
            # What was parked while we asked may not be in the answer; what was unparked is found out when it matters.
            self._waiting = found | (self._waiting - before)
            self._is_known = True

    async def _take_up_asked(self) -> None:
        for parked in await self._parked.asked(self.processor.name):
            stuck = parked.stuck
            skipped = parked.asked is not None and parked.asked.what == "skip" and stuck.position > 0
            resumption = _Resumption(parked, stuck.position + skipped, max(0, stuck.stream_version - 1))
            key = self._key(parked.stream_id, parked.tenant_id)
            self.pool.follow_up(self._partition_of(stuck.shard), parked.stream_id, key, resumption)

    async def _resume(self, resumption: _Resumption) -> None:
        """Handle what waits of a stream, to its end in the log."""
        parked, shard = resumption.parked, resumption.parked.stuck.shard
        while rows := await self._log.read_stream_after(
            shard, parked.stream_id, resumption.stream_version, STREAM_EVENTS_MAX
        ):
            for row in rows:
                if row.position >= resumption.position and self.wants(row.type):
                    resumption.row = row
                    await self._handle_row(row)
                resumption.stream_version, resumption.through = row.stream_version, row.position
        self._through[parked.stream_id] = resumption.through
        await self._parked.carried_out(parked, None)
        self._waiting.discard(parked.stream_id)
        log_of.info("%s goes on with stream %s", self.processor.name, parked.stream_id)

    async def _handle_row(self, row: StoredEvent) -> None:
        (opened,) = await self._records.open_some([row], personal=())
        record = self._readable(opened)
        if record is not None:
            later = await self.processor.handlers[type(record.event)](record, self._work)
            if later is not None:
                await later

    def _key(self, stream_id: UUID, tenant_id: UUID | None) -> UUID:
        return tenant_id or stream_id if self.processor.order == "tenant" else stream_id
