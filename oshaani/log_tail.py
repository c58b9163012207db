"""The log followed by a process that serves what others decide: their records, in order, soon after they were committed.

What this process commits is offered to it, and not passed on again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from uuid import UUID

from domain.event_log import EventLog, LogUnavailable, StoredEvent
from domain.ids import SHARDS
from schemas.codec import EVENT_TYPES
from schemas.hints import Hint
from schemas.records import AnyRecord, Record, Records

log_of = logging.getLogger(__name__)

PAGE = 500
POLL_S = 0.25  # a key revoked elsewhere is refused within a second, hint or no hint
PAUSE_S = 0.5  # while the log cannot be reached


class LogTail:
    """Follows the log from where it is at the start: by what hints bring, at once when one names a turn that `is_followed`.

    Personal text is opened of the rows of such turns only.
    """

    def __init__(
        self,
        log: EventLog,
        records: Records,
        on_foreign: Callable[[Sequence[AnyRecord]], None],
        is_followed: Callable[[UUID], bool],
    ) -> None:
        self._log, self._records = log, records
        self._on_foreign, self._is_followed = on_foreign, is_followed
        self._seen: dict[int, int] = {}
        self._ours: set[tuple[int, int]] = set()  # committed by this process behind what it has not read yet
        self._wake, self._telling = asyncio.Event(), asyncio.Lock()

    def offer(self, records: Sequence[AnyRecord]) -> None:
        """Take records just committed by this process."""
        for record in records:
            seen = self._seen.get(record.shard)
            if seen is None or record.position <= seen:
                continue
            if record.position == seen + 1:
                self._seen[record.shard] = record.position
            else:
                self._ours.add(
                    (record.shard, record.position)
                )  # a hint brings what is before it, or the poll

    async def hear(self, hint: Hint) -> None:
        """The log has grown."""
        async with self._telling:
            await self._tell(hint.rows)
        is_urgent = hint.turns is None or any(map(self._is_followed, hint.turns))
        if is_urgent and any(head > self._seen.get(shard, 0) for shard, head in hint.heads.items()):
            self._wake.set()

    async def run(self) -> None:
        """Follow until cancelled; survives any outage of the log."""
        while True:
            try:
                if not self._seen:
                    self._seen = dict.fromkeys(range(SHARDS), 0) | await self._log.heads()
                self._wake.clear()
                if await self._read() < PAGE:
                    await self._pause()
            except LogUnavailable as failure:
                log_of.warning("whoever follows the log waits for it: %s", failure)
                await asyncio.sleep(PAUSE_S)

    async def _read(self) -> int:
        async with self._telling:
            rows = await self._log.read_after(self._seen, PAGE)
            await self._tell(rows)
        return len(rows)

    async def _tell(self, rows: Sequence[StoredEvent]) -> None:
        """Pass on those of them that come next in their shards, and are not our own."""
        seen, news = dict(self._seen), list[StoredEvent]()
        for row in rows:
            if row.position == seen.get(row.shard, row.position) + 1:
                seen[row.shard] = row.position
                news.append(row)
        if not news:
            return
        foreign = [
            row if self._is_personal(row) else row._replace(personal=None)
            for row in news
            if (row.shard, row.position) not in self._ours
        ]
        opened = await self._records.open_some(foreign, EVENT_TYPES)
        self._on_foreign([record for record in opened if isinstance(record, Record)])
        for row in news:
            self._seen[row.shard] = max(self._seen[row.shard], row.position)
            self._ours.discard((row.shard, row.position))

    def _is_personal(self, row: StoredEvent) -> bool:
        return self._is_followed(row.stream_id) or self._is_followed(row.correlation_id)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        except TimeoutError:
            pass
