"""Keeps the read models up to date with the log.

Records come from this process's bus (`offer`), and from the log for what other processes wrote. All projections of the
group take a batch in one transaction, together with their checkpoints; a second runner on the same database notices at
the checkpoints that it was overtaken, and goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import psycopg
from psycopg_pool import PoolTimeout

from domain.crash_points import crash_point
from domain.event_log import EventLog, LogUnavailable, StoredEvent
from domain.ids import SHARDS
from domain.user import User
from projections import checkpoints
from projections import rebuild as building
from projections.applying import BatchRefused, Readable, apply, apply_one_by_one
from projections.catalogue import PROJECTIONS
from projections.checkpoints import Connection, Progress
from projections.projection import Projection
from projections.read_side import Deadline, Pool
from schemas.codec import EVENT_TYPES
from schemas.records import AnyRecord, Record, Records

log_of = logging.getLogger(__name__)

BATCH_MAX = 1_000  # records in one transaction
OFFERED_MAX = 50_000  # records kept in memory; beyond it they are read from the log again
LINGER_S = 0.2  # how long a batch waits for company when nobody waits for it
POLL_FIRST_S, POLL_MAX_S = 0.05, 0.25  # a key revoked by another process is refused within a second
LOOK_S = 1.0  # how often the log's heads are looked at while catching up
PAUSE_FIRST_S, PAUSE_MAX_S = 0.1, 2.0
BATCH_S = 9.0  # what one transaction may take before its connection is cut
FORGET_S = 600.0  # and one that empties all rows of a person

OUTAGE = (psycopg.Error, OSError, PoolTimeout, LogUnavailable, TimeoutError)


class Metrics(Protocol):
    """What a runner tells about its work."""

    def applied(self, record_count: int, row_count: int, seconds: float) -> None:
        """A batch is committed."""

    def lag(self, projection: str, event_count: int) -> None:
        """How many events of the log a projection has not applied, as of the last look at the log."""


class NoMetrics:
    """For whoever does not measure."""

    def applied(self, record_count: int, row_count: int, seconds: float) -> None: ...

    def lag(self, projection: str, event_count: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Batch:
    """Records in order, without gaps from each shard's cursor to `lasts`; those nobody handles may be left out."""

    records: Sequence[Readable]
    lasts: dict[int, int]


class _Overtaken(Exception):
    """The checkpoints are not where this runner left them."""


class Runner:
    """Applies the log to the read models. `run` it as one task for the life of the process."""

    def __init__(
        self,
        pool: Pool,
        deadline: Deadline,
        log: EventLog,
        records: Records,
        projections: Sequence[Projection] = PROJECTIONS,
        metrics: Metrics | None = None,
    ) -> None:
        self._pool, self._deadline, self._log, self._records = pool, deadline, log, records
        self._projections = {projection.name: projection for projection in projections}
        handled = [(name, how) for each in projections for name, how in each.handled.items()]
        self._types = frozenset(name for name, _ in handled)
        self._personal = frozenset(name for name, how in handled if how.personal)
        self._metrics: Metrics = metrics or NoMetrics()
        self._works: dict[str, Progress] = {}
        self._heads = [0] * SHARDS
        self._looked_s = -LOOK_S
        self._offered: deque[AnyRecord] = deque()
        self._behind = True  # the log has, or may have, what was not offered
        self._wake, self._urgent, self._ready = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._torn: set[int] = set()  # shards of the log that have a gap; looked at again with every poll
        self._poll_s = POLL_FIRST_S
        self._hurry_until_s = 0.0
        self._rebuilding = asyncio.Lock()

    # --- what others ask

    def offer(self, records: Sequence[AnyRecord]) -> None:
        """Take what this process has just committed, in commit order. Never blocks; too much is read from the log."""
        if len(self._offered) + len(records) > OFFERED_MAX:
            self._offered.clear()
            self._behind = True
        else:
            self._offered.extend(records)
        self._wake.set()

    async def offer_rows(self, rows: Sequence[StoredEvent]) -> None:
        """Take rows of the log that came another way, in the order of each shard; what is missing is read from the log."""
        new = [row for row in rows if row.position > self._applied(row.shard)]
        opened = await self._records.open_some(new, self._personal)
        # What cannot be opened leaves a gap, and comes again from the log, where it is parked.
        self.offer([record for record in opened if isinstance(record, Record)])

    async def caught_up(self, shard: int, position: int, timeout_s: float = 2.0) -> bool:
        """Wait until the read models show the event at this position. False when they did not in time."""
        if self._applied(shard) >= position:
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (shard, position, future)
        self._waiters.append(waiter)
        if not any(record.shard == shard and record.position >= position for record in self._offered):
            self._behind = True
        self._urgent.set()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            return self._applied(shard) >= position
        finally:
            self._waiters.remove(waiter)
        return True

    def hurry(self) -> None:
        """Somebody elsewhere waits for what may be on its way here: look at the log, wait for no company."""
        self._hurry_until_s = monotonic() + LINGER_S
        self._behind = True
        self._urgent.set()
        self._wake.set()

    async def ready(self, timeout_s: float) -> bool:
        """Wait until every projection is live. False when some are still being built."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    def lag(self) -> dict[str, int]:
        """By projection, how many events of the log it has not applied, as of the last look at the log."""
        return {
            name: sum(
                max(0, head - position) for head, position in zip(self._heads, work.positions, strict=True)
            )
            for name, work in self._works.items()
        }

    async def rebuild(self, name: str, progress: building.Report | None = None) -> None:
        """Build a projection anew beside the old one, which stays live until they are swapped.

        Raises:
            KeyError: there is no projection of that name.
            psycopg.Error, OSError: the database failed; the old tables are as they were.
        """
        await self._rebuild([self._projections[name]], progress)

    # --- the work

    async def run(self) -> None:
        """Apply the log until cancelled; survives any outage of the database."""
        builder: asyncio.Task[None] | None = None
        pause_s = PAUSE_FIRST_S
        try:
            while True:
                try:
                    if builder is None:
                        builder = asyncio.create_task(
                            self._build(await self._load()), name="projection-build"
                        )
                    await self._wait_for_work()
                    await self._step()
                    pause_s = PAUSE_FIRST_S
                except _Overtaken:
                    self._behind = True
                    self._tell_waiters()
                except OUTAGE as failure:
                    log_of.warning("the read side waits %.1f s: %r", pause_s, failure)
                    pause_s = await self._pause(pause_s)
                except Exception:
                    # A bug stops the read side where it is, and whoever watches its lag hears of it.
                    log_of.exception("the read side cannot go on; it tries again in %.1f s", pause_s)
                    pause_s = await self._pause(pause_s)
        finally:
            if builder is not None:
                builder.cancel()
                with suppress(asyncio.CancelledError):
                    await builder

    async def _pause(self, seconds: float) -> float:
        """Wait, and return how long to wait the next time."""
        self._behind = True
        await asyncio.sleep(seconds)
        return min(seconds * 2, PAUSE_MAX_S)

    async def _load(self) -> list[Projection]:
        """Take up what is up to date; returns the projections that must be built first."""
        async with self._connection() as connection:
            await checkpoints.migrate(connection)
            self._works = await building.current(connection, list(self._projections.values()))
        return [each for name, each in self._projections.items() if name not in self._works]

    async def _build(self, outdated: Sequence[Projection]) -> None:
        pause_s = PAUSE_FIRST_S
        while outdated:
            try:
                await self._rebuild(outdated, None, outdated_only=True)
                break
            except OUTAGE as failure:
                log_of.warning("building projections again in %.1f s: %r", pause_s, failure)
                pause_s = await self._pause(pause_s)
            except Exception:
                log_of.exception("projections cannot be built; again in %.1f s", pause_s)
                pause_s = await self._pause(pause_s)
        self._ready.set()

    async def _rebuild(
        self,
        projections: Sequence[Projection],
        progress: building.Report | None,
        *,
        outdated_only: bool = False,
    ) -> None:
        async with self._rebuilding:
            built = await building.rebuild(
                self._pool,
                self._deadline,
                self._records,
                projections,
                progress,
                outdated_only=outdated_only,
            )
        self._works.update(built)
        self._behind = True
        self._wake.set()
        self._tell_waiters()

    async def _wait_for_work(self) -> None:
        if not self._works:
            await self._wait(self._wake, POLL_MAX_S)
        elif self._behind:
            return
        elif not self._offered:
            self._wake.clear()
            if not await self._wait(self._wake, self._poll_s):
                self._poll_s = min(self._poll_s * 2, POLL_MAX_S)
                self._behind = await self._log_has_more()
                return
        is_awaited = self._waiters or monotonic() < self._hurry_until_s
        if len(self._offered) < BATCH_MAX and not is_awaited:
            self._urgent.clear()
            await self._wait(self._urgent, LINGER_S)
        self._wake.clear()

    async def _wait(self, event: asyncio.Event, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True

    async def _log_has_more(self) -> bool:
        self._looked_s = monotonic()
        for shard, head in (await self._log.heads()).items():
            self._heads[shard] = head
        for name, event_count in self.lag().items():
            self._metrics.lag(name, event_count)
        self._torn.clear()
        return any(head > self._applied(shard) for shard, head in enumerate(self._heads))

    async def _step(self) -> None:
        if not self._works:
            return
        batch = await self._fetched() if self._behind else self._taken()
        if batch is None:
            self._offered.clear()
            self._behind = True
        elif batch.lasts:
            began = monotonic()
            row_count = await self._commit(batch)
            self._poll_s = POLL_FIRST_S
            for shard, position in batch.lasts.items():
                self._heads[shard] = max(self._heads[shard], position)
            self._metrics.applied(len(batch.records), row_count, monotonic() - began)
            self._tell_waiters()

    # --- the next batch

    def _taken(self) -> _Batch | None:
        """From what was offered; None when something is missing before it."""
        records: list[AnyRecord] = []
        lasts: dict[int, int] = {}
        while self._offered:
            record = self._offered[0]
            if len(records) >= BATCH_MAX and record.command_id != records[-1].command_id:
                break
            shard, position = record.shard, record.position
            last = lasts.get(shard)
            if last is None:
                last = self._applied(shard)
            if position > last + 1:
                return None
            self._offered.popleft()
            if position == last + 1:
                lasts[shard] = position
                records.append(record)
        return _Batch(records, lasts)

    async def _fetched(self) -> _Batch:
        """From the log."""
        if monotonic() >= self._looked_s + LOOK_S:
            await self._log_has_more()  # how far it is behind, for those who ask
        cursors = {shard: self._applied(shard) for shard in range(SHARDS) if shard not in self._torn}
        rows = await self._log.read_after(cursors, BATCH_MAX)
        self._behind = len(rows) == BATCH_MAX
        if self._behind:
            rows = _whole_commands(rows)
        lasts: dict[int, int] = {}
        for row in rows:
            last = lasts.get(row.shard, cursors[row.shard])
            if row.position == last + 1:
                lasts[row.shard] = row.position
            elif row.shard not in self._torn:
                # Going on would lose what is missing without a trace; the other shards are unharmed.
                log_of.error("shard %d of the log has a gap after position %d; it waits", row.shard, last)
                self._torn.add(row.shard)
        rows = [row for row in rows if row.position <= lasts.get(row.shard, 0)]
        # Newer versions of what is handled are found by open_some.
        wanted = [row for row in rows if row.type in self._types or row.type not in EVENT_TYPES]
        return _Batch(await self._records.open_some(wanted, self._personal), lasts)

    def _applied(self, shard: int) -> int:
        """The last position that every live projection has applied."""
        return min((work.positions[shard] for work in self._works.values()), default=0)

    def _tell_waiters(self) -> None:
        for shard, position, future in self._waiters:
            if not future.done() and self._applied(shard) >= position:
                future.set_result(None)

    # --- the transaction

    async def _commit(self, batch: _Batch) -> int:
        works = list(self._works.values())
        try:
            return await self._apply(works, batch, apply)
        except BatchRefused as refused:
            log_of.warning("a batch of %d records is applied one by one: %s", len(batch.records), refused)
            return await self._apply(works, batch, apply_one_by_one)

    async def _apply(self, works: Sequence[Progress], batch: _Batch, how: Applying) -> int:
        row_count = 0
        forgets = any(record.type == User.Erased.TOPIC for record in batch.records)
        limit_s = FORGET_S if forgets else BATCH_S
        async with self._connection(limit_s) as connection, connection.transaction():
            await self._lock(connection, works)
            moved: list[tuple[Progress, list[int]]] = []
            parked: list[checkpoints.Parked] = []
            for work in works:
                rows, stopped = await how(connection, work, batch.records)
                row_count += rows
                parked += stopped
                positions = work.positions.copy()
                for shard, position in batch.lasts.items():
                    positions[shard] = max(positions[shard], position)
                moved.append((work, positions))
            await checkpoints.save(
                connection, {work.projection.name: positions for work, positions in moved}, parked
            )
            crash_point("projection.before_commit")
        crash_point("projection.after_commit")
        for work, positions in moved:
            work.positions = positions
        return row_count

    async def _lock(self, connection: Connection, works: Sequence[Progress]) -> None:
        found = await checkpoints.lock(connection, [work.projection.name for work in works])
        overtaken = False
        for work in works:
            version, positions, waiting = found.get(work.projection.name, (-1, [], set()))
            if version != work.projection.version:
                log_of.error("projection %s is at another version; left to others", work.projection.name)
                self._works.pop(work.projection.name, None)
                overtaken = True
            elif positions != work.positions:
                work.positions = positions
                overtaken = True
            work.waiting = waiting
        if overtaken:
            raise _Overtaken

    @asynccontextmanager
    async def _connection(self, limit_s: float = BATCH_S) -> AsyncIterator[Connection]:
        async with self._pool.connection(timeout=BATCH_S) as connection:
            with self._deadline(connection, limit_s):
                yield connection


class Applying(Protocol):
    """`apply` or `apply_one_by_one`."""

    async def __call__(
        self, connection: Connection, work: Progress, records: Sequence[Readable]
    ) -> tuple[int, list[checkpoints.Parked]]: ...


def _whole_commands(rows: list[StoredEvent]) -> list[StoredEvent]:
    """Without the last command when its events may go on: whoever looks sees all of a command or nothing."""
    cut = len(rows)
    while cut > 0 and rows[cut - 1].command_id == rows[-1].command_id:
        cut -= 1
    return rows[:cut] or rows
