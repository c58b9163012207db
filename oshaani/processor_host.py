"""Processors in this process, fed by the log itself: no broker.

Records are handed over as they are committed; what other processes write, and what a restart left over, is read from
the log. A record is finished when all its processors are done with it, or have parked its stream; the cursor saved is
that of the contiguous finished prefix, so after a kill everything unfinished is delivered again, which the processors
are made for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from domain.crash_points import crash_point
from domain.event_log import EventLog, LogUnavailable, StoredEvent
from domain.ids import SHARDS
from domain.parked import ParkedRecords
from schemas.records import AnyRecord, Record, Records, Unreadable
from stream_processors.keyed_pool import Source
from stream_processors.processor import Processor, Work
from stream_processors.runner import Delivery, Runner, Supplies

log_of = logging.getLogger(__name__)

READER: Final = "processors"
PAGE = 500  # records read at once
BACKLOG_MAX = 2_000  # records taken from the log and not finished; beyond it, the log is read no further
POLL_S = 0.25  # how late what other processes wrote may be noticed
SAVE_S = 0.5  # how often the cursor is saved; what is redelivered after a kill
OUTAGE_S = 0.5
DRAIN_S = 1.0  # what handlers get to come to their end


class ProcessorHost:
    """Delivers every record to the processors that want it, at least once and in the background."""

    def __init__(
        self,
        log: EventLog,
        records: Records,
        processors: Sequence[Processor],
        work: Work,
        parked: ParkedRecords,
    ) -> None:
        self._log, self._records = log, records
        # Is told of what was read from the log, mostly what others wrote.
        self.on_foreign: Callable[[Sequence[AnyRecord]], None] = lambda records: None
        supplies = Supplies(work, log, records, parked)
        source: Source[Delivery] = Source(self._finished_one)
        self._runners = [Runner(each, supplies, _shard, source) for each in processors]
        self._wanted: dict[type, list[Runner]] = {}
        for runner in self._runners:
            for event_class in runner.processor.handlers:
                self._wanted.setdefault(event_class, []).append(runner)
        self._seen: dict[int, int] = {}
        self._saved: dict[int, int] = {}
        self._wake, self._room = asyncio.Event(), asyncio.Event()

    def offer(self, records: Sequence[AnyRecord]) -> None:
        """Take records just committed by this process; out of sequence ones are fetched from the log instead."""
        has_room = self.unfinished < BACKLOG_MAX
        for record in records:
            seen = self._seen.get(record.shard)
            if seen is None or record.position > seen + 1 or not has_room:
                self._wake.set()
            elif record.position == seen + 1:
                self._deliver(record)

    async def run(self) -> None:
        """Catch up from the saved cursor, then follow the log until cancelled."""
        while not self._saved:
            try:
                cursor = await self._log.cursor(READER)
            except LogUnavailable as failure:
                log_of.warning("the processors wait for the log: %s", failure)
                await asyncio.sleep(OUTAGE_S)
                continue
            for runner in self._runners:
                runner.assign(set(range(SHARDS)))
            self._saved = {shard: cursor.get(shard, 0) for shard in range(SHARDS)}
            self._seen = dict(self._saved)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._save())
            for runner in self._runners:
                group.create_task(runner.attend())

    async def drain(self) -> None:
        """Begin nothing more, let handlers come to their end, and save how far all has come."""
        await asyncio.gather(*(runner.pool.drain(DRAIN_S) for runner in self._runners))
        try:
            await self._save_once()
        except LogUnavailable as failure:
            log_of.warning("the processors' cursor was not saved: %s", failure)

    async def abandon(self) -> None:
        """End everything where it stands; nothing is saved."""
        await asyncio.gather(*(runner.pool.drain(0.0) for runner in self._runners))

    def lag(self, heads: dict[int, int]) -> int:
        """Records of the log not finished yet, those that were not even read included."""
        return sum(max(0, head - self._finished(shard)) for shard, head in heads.items())

    @property
    def unfinished(self) -> int:
        """Records delivered and not finished yet, counted for each processor that has to do with them."""
        return sum(runner.pool.pending for runner in self._runners)

    @property
    def poisoned(self) -> int:
        """Streams that wait for an operator, counted for each processor that cannot go on with them."""
        return sum(runner.parked_count for runner in self._runners)

    # --- reading

    async def _follow(self) -> None:
        while True:
            try:
                rows = await self._log.read_after(self._seen, PAGE)
                # No processor reads personal text from a record; whoever needs it asks for it.
                opened = await self._records.open_some(rows, personal=())
                for row, record in zip(rows, opened, strict=True):
                    if record.position == self._seen[record.shard] + 1:
                        self._take(row, record)
                if len(rows) == PAGE:
                    await self._ebb()
                    continue
            except LogUnavailable as failure:
                log_of.warning("the processors wait for the log: %s", failure)
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self._ebb()

    async def _ebb(self) -> None:
        while self.unfinished >= BACKLOG_MAX:
            self._room.clear()
            await self._room.wait()

    # --- handling

    def _take(self, row: StoredEvent, record: AnyRecord | Unreadable) -> None:
        if isinstance(record, Record):
            self._deliver(record)
            self.on_foreign((record,))
            return
        # A newer program wrote it: parked by those whom it may concern, everything else flows.
        self._seen[row.shard] = row.position
        for runner in self._runners:
            if runner.wants(row.type):
                runner.submit(row.shard, row.position, Delivery.of_row(row, record))

    def _deliver(self, record: AnyRecord) -> None:
        self._seen[record.shard] = record.position
        for runner in self._wanted.get(type(record.event), ()):
            runner.submit(record.shard, record.position, Delivery.of_record(record))

    def _finished_one(self, delivery: Delivery) -> None:
        self._room.set()

    # --- the cursor

    def _finished(self, shard: int) -> int:
        firsts = [runner.pool.first_pending(shard) for runner in self._runners]
        return min((first - 1 for first in firsts if first is not None), default=self._seen.get(shard, 0))

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            try:
                await self._save_once()
            except LogUnavailable as failure:
                log_of.warning("the processors' cursor was not saved: %s", failure)

    async def _save_once(self) -> None:
        finished = {shard: self._finished(shard) for shard in self._seen}
        changed = {shard: at for shard, at in finished.items() if at != self._saved.get(shard)}
        if changed:
            await self._log.save_cursor(READER, changed)
            self._saved.update(changed)
            crash_point("cursor.saved")


def _shard(shard: int) -> int:
    """Each shard is a partition of its own."""
    return shard
