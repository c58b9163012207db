"""Processors in this process, fed by the log itself: no broker.

Records are handed over as they are committed; what other processes write, and what a restart left over, is read from
the log. A record is finished when all its handlers are; the cursor saved is that of the contiguous finished prefix, so
after a kill everything unfinished is delivered again, which the processors are made for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from commands.bus import Overloaded
from domain.crash_points import crash_point
from domain.event_log import EventLog, LogUnavailable
from domain.ids import SHARDS
from schemas.records import AnyRecord, Record, Records, Unreadable
from stream_processors.processor import Handler, Processor, Work, handlers_of

log_of = logging.getLogger(__name__)

READER: Final = "processors"
PAGE = 500  # records read at once
BACKLOG_MAX = 2_000  # records of the log being handled at once while catching up
POLL_S = 0.25  # how late what other processes wrote may be noticed
SAVE_S = 0.5  # how often the cursor is saved; what is redelivered after a kill
ATTEMPTS_MAX = 6
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 5.0


class ProcessorHost:
    """Delivers every record to the processors that want it, at least once and in the background."""

    def __init__(
        self,
        log: EventLog,
        records: Records,
        processors: Sequence[Processor],
        work: Work,
        on_foreign: Callable[[Sequence[AnyRecord]], None] = lambda records: None,
    ) -> None:
        self._log, self._records, self._work = log, records, work
        self.on_foreign = on_foreign  # is told of what was read from the log, mostly what others wrote
        self._handlers = handlers_of(processors)
        self._seen: dict[int, int] = {}
        self._unfinished: dict[int, dict[int, int]] = {shard: {} for shard in range(SHARDS)}
        self._saved: dict[int, int] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.poisoned: dict[tuple[int, int], str] = {}

    def offer(self, records: Sequence[AnyRecord]) -> None:
        """Take records just committed by this process; out of sequence ones are fetched from the log instead."""
        for record in records:
            seen = self._seen.get(record.shard)
            if seen is None or record.position > seen + 1:
                self._wake.set()
            elif record.position == seen + 1:
                self._deliver(record)

    async def run(self) -> None:
        """Catch up from the saved cursor, then follow the log until cancelled."""
        while not self._seen:
            try:
                cursor = await self._log.cursor(READER)
                self._seen = {shard: cursor.get(shard, 0) for shard in range(SHARDS)}
                self._saved = dict(self._seen)
            except LogUnavailable as failure:
                log_of.warning("the processors wait for the log: %s", failure)
                await asyncio.sleep(BACKOFF_MAX_S / 10)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._save())

    async def drain(self) -> None:
        """Save how far all has come; called after the handlers have been given time to finish."""
        try:
            await self._save_once()
        except LogUnavailable as failure:
            log_of.warning("the processors' cursor was not saved: %s", failure)

    def lag(self, heads: dict[int, int]) -> int:
        """Records of the log not finished yet, those that were not even read included."""
        return sum(max(0, head - self._finished(shard)) for shard, head in heads.items())

    @property
    def unfinished(self) -> int:
        """Records delivered and not finished yet."""
        return sum(map(len, self._unfinished.values()))

    # --- reading

    async def _follow(self) -> None:
        while True:
            try:
                rows = await self._log.read_after(self._seen, PAGE)
                # No processor reads personal text from a record; whoever needs it asks for it.
                for record in await self._records.open_some(rows, personal=()):
                    if record.position == self._seen[record.shard] + 1:
                        self._take(record)
                        if isinstance(record, Record):
                            self.on_foreign((record,))
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

    async def _ebb(self) -> None:
        while len(self._tasks) > BACKLOG_MAX:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    # --- handling

    def _take(self, record: AnyRecord | Unreadable) -> None:
        if isinstance(record, Unreadable):
            # A newer program wrote it: left for one that knows it, everything else flows.
            log_of.error("the processors cannot read %s: %s", record.type, record.error)
            self._seen[record.shard] = record.position
            self._unfinished[record.shard][record.position] = 1
            self.poisoned[record.shard, record.position] = repr(record.error)
        else:
            self._deliver(record)

    def _deliver(self, record: AnyRecord) -> None:
        self._seen[record.shard] = record.position
        handlers = self._handlers.get(type(record.event))
        if handlers is None:
            return
        self._unfinished[record.shard][record.position] = len(handlers)
        for handler in handlers:
            task = asyncio.create_task(self._handle(handler, record))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(self, handler: Handler, record: AnyRecord) -> None:
        attempt, pause_s = 1, BACKOFF_FIRST_S
        while True:
            try:
                await handler(record, self._work)
                break
            except (LogUnavailable, Overloaded):
                pass  # not the record's fault: try for as long as it takes
            except Exception as failure:
                log_of.exception("%s failed on %s", handler.__name__, record.type)
                if attempt == ATTEMPTS_MAX:
                    # Left unfinished: shown as poisoned, delivered again after a restart; everything else flows.
                    self.poisoned[record.shard, record.position] = repr(failure)
                    return
                attempt += 1
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, BACKOFF_MAX_S)
        unfinished = self._unfinished[record.shard]
        unfinished[record.position] -= 1
        if unfinished[record.position] == 0:
            del unfinished[record.position]

    # --- the cursor

    def _finished(self, shard: int) -> int:
        unfinished = self._unfinished[shard]
        # Positions are delivered in ascending order, so the first key is the lowest.
        return next(iter(unfinished)) - 1 if unfinished else self._seen.get(shard, 0)

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
