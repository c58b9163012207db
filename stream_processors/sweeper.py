"""Due work is found again: what nobody heard of, what a dead worker left, what waited for its time.

Kafka (or the process itself) wakes; this remembers. It runs beside whatever delivers the records.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta

from commands.bus import LATEST
from domain.event_log import DueRow, EventLog, LogUnavailable
from domain.ids import ToolCallId, TurnId, UserId
from stream_processors.agent_turns import abandon, step
from stream_processors.erasures import erase
from stream_processors.notifications import send_callback
from stream_processors.processor import Work
from stream_processors.tool_calls import retake_tool, run_tool

log_of = logging.getLogger(__name__)

BEAT_S = 2.0
DEAD_AFTER_S = 6.0
LOOK_EVERY_S = 1.0  # at the latest; sooner when something is known to be due
ROWS_MAX = 200
TAKEN_FOR_S = 5.0  # a row found is ours for this long, so that it is not found twice
PAUSE_S = 0.05


class Sweeper:
    """Looks after due work until cancelled."""

    def __init__(self, log: EventLog, work: Work) -> None:
        self._log, self._work = log, work
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        work.retry_at = self.look_at

    def look_at(self, at: datetime) -> None:
        """Something is due at that time; look then."""
        delay_s = max(0.0, (at - self._work.clock()).total_seconds())
        asyncio.get_running_loop().call_later(delay_s + 0.001, self._wake.set)

    async def beat(self) -> None:
        """Say that this worker is alive, until cancelled."""
        while True:
            try:
                await self._log.beat(self._work.worker)
            except LogUnavailable as failure:
                log_of.warning("no heartbeat: %s", failure)
            await asyncio.sleep(BEAT_S)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            found = 0
            try:
                found = await self.sweep()
            except LogUnavailable as failure:
                log_of.warning("no sweep: %s", failure)
            if found < ROWS_MAX:
                await self._pause()

    async def sweep(self) -> int:
        """Take up what is due; returns how many rows there were."""
        rows = await self._log.due(self._work.worker, ROWS_MAX, DEAD_AFTER_S)
        until = self._work.clock() + timedelta(seconds=TAKEN_FOR_S)
        for row in rows:
            starting = row.id in self._work.running and not row.lost_worker
            if starting or not await self._log.claim_due(row, self._work.worker, until):
                continue
            task = asyncio.create_task(self._take_up(row))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(rows)

    async def _take_up(self, row: DueRow) -> None:
        turn_id, tenant_id, work = TurnId(row.stream_id), UserId(row.tenant_id), self._work
        try:
            if row.kind == "callback":
                await send_callback(row.id, tenant_id, work, row.lost_worker)
            elif row.kind == "erasure":
                await erase(tenant_id, work)
            elif row.kind == "turn":
                if row.lost_worker:
                    await abandon(turn_id, tenant_id, row.lost_worker, work)
                else:
                    # What is in memory may be older than what made the row.
                    await step(turn_id, tenant_id, work, LATEST)
            elif row.lost_worker:
                await retake_tool(turn_id, ToolCallId(row.id), tenant_id, row.lost_worker, work)
            else:
                await run_tool(turn_id, ToolCallId(row.id), tenant_id, work, LATEST)
        except LogUnavailable as failure:
            log_of.warning("due work on turn %s waits: %s", turn_id, failure)
        except Exception:
            log_of.exception("due work on turn %s failed", turn_id)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(LOOK_EVERY_S):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        await asyncio.sleep(PAUSE_S)
