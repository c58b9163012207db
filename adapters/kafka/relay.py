"""From the log to Kafka: every event to the firehose, and to each work topic the events its processor handles.

Delivered at least once and in order. A cursor for each topic and shard is saved behind the broker's acknowledgements,
under the lease of the shard's range; whatever goes wrong, the relay begins again from the saved cursors. A topic that
was made anew, or lost records, has fewer of them than were acknowledged: it is written again from the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import attrgetter
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.relay_lanes import Broker, Lane, TopicsChanged, open_broker
from adapters.kafka.relay_ranges import Ranges, lease_of, shards_of
from domain.crash_points import crash_point
from domain.event_log import EventLog, LogUnavailable, StoredEvent
from domain.ids import SHARDS
from domain.leases import Leases, Mark
from schemas.topics import LOG, TOPICS, partition_of
from schemas.wire import TooLarge, pack

log_of = logging.getLogger(__name__)

PAGE = 500  # events read at once
PAGE_BYTES = 8 * 1024 * 1024  # after a page of more than that, the next ones are small
PAGE_SMALL = 20
IN_FLIGHT_MAX = 10_000  # records that wait for their acknowledgement
IN_FLIGHT_BYTES_MAX = 64 * 1024 * 1024
READ_PAUSE_S = (
    0.008  # least time between two looks that find little: what is committed in between goes together
)
POLL_FIRST_S, POLL_MAX_S = (
    0.005,
    0.25,
)  # how late events without a wake are found: soon after others, else seldom
SAVE_S = 0.25  # how often cursors are saved; what is sent again after a kill
LOOK_S = 5.0  # how often the topics are looked at
HURRY_S = 0.2  # how often leases are looked at while ranges are missing
GIVE_UP_S = (
    2.0  # how long a range's last records may take before it is given back without their acknowledgement
)
RETRY_S = 0.5
RENEWALS_PER_TTL = 3
RECOVERABLE = (KafkaError, TopicsChanged, TimeoutError, OSError)

_RETENTION_S: Final = {topic.name: topic.retention_s for topic in TOPICS}


class LogNotDense(Exception):
    """The log gave positions with a hole: nothing after it may be sent."""


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How relays share the work; all relays of a cluster have the same.

    `gather_s`: by work topic, how long records may wait for company, where nobody waits for them.
    """

    firehose: str = LOG.name
    gather_s: Mapping[str, float] = field(default_factory=dict)
    ranges: int = 4
    ttl_s: float = 5.0  # after how long a silent relay's ranges are taken over
    look_s: float = LOOK_S


class _Cursor:
    """How far a shard has come on a topic: read from the log, and acknowledged by the broker."""

    __slots__ = ("acked", "began", "flight", "lane", "read", "saved", "topic", "types")

    def __init__(
        self, topic: str, types: Collection[str] | None, lane: Lane, position: int, began: int
    ) -> None:
        self.topic, self.types, self.lane, self.began = topic, types, lane, began
        self.read = self.acked = position
        self.saved: int | None = position
        # Positions that are reached as soon as the lane has so many acknowledged records.
        self.flight: deque[tuple[int, int]] = deque()

    def read_to(self, position: int) -> None:
        self.read = position
        self.flight.append((position, self.lane.sent))

    def settle(self) -> int:
        """The last position before which everything is acknowledged."""
        flight, acked = self.flight, self.lane.acked
        while flight and flight[0][1] <= acked:
            self.acked = flight.popleft()[0]
        return self.acked

    def mark(self, shard: int) -> Mark:
        return Mark(self.topic, shard, self.settle(), self.lane.next_offset, self.began)


class _Shard:
    """The cursors of a shard, and who among them takes which events."""

    __slots__ = ("cursors", "front", "number", "stuck", "takers")

    def __init__(self, number: int, cursors: Sequence[_Cursor]) -> None:
        self.number, self.cursors = number, cursors
        self.front = max((cursor.read for cursor in cursors), default=0)
        self.stuck = ""
        self.takers: dict[str, tuple[Lane, ...]] = {}

    @property
    def rear(self) -> int:
        return min(cursor.read for cursor in self.cursors)

    def take(self, rows: Sequence[StoredEvent]) -> list[Lane]:
        """Append events to the lanes of the topics that come to them next; those lanes."""
        first, last = rows[0].position, rows[-1].position
        active = [cursor for cursor in self.cursors if cursor.read == first - 1]
        if not active or last - first != len(rows) - 1:
            raise LogNotDense(f"after {self.front} in shard {self.number} the log gave {first} to {last}")
        takers = self.takers if len(active) == len(self.cursors) else {}
        for row in rows:
            lanes = takers.get(row.type)
            if lanes is None:
                lanes = takers[row.type] = tuple(
                    cursor.lane for cursor in active if cursor.types is None or row.type in cursor.types
                )
            if not lanes:
                continue
            try:
                key, value = row.stream_id.bytes, pack(row)
            except TooLarge as failure:
                # Everything before it has gone; what follows must wait for somebody to look.
                log_of.error("shard %d stands still: %s", self.number, failure)
                self.stuck, last = str(failure), row.position - 1
                break
            for lane in lanes:
                lane.append(key, value)
        for cursor in active:
            cursor.read_to(last)
        self.front = max(self.front, last)
        return [cursor.lane for cursor in active]


@dataclass(slots=True)
class _Range:
    number: int
    epoch: int
    shards: dict[int, _Shard] = field(default_factory=dict)

    def cursors(self) -> Iterator[tuple[int, _Cursor]]:
        for number, shard in self.shards.items():
            for cursor in shard.cursors:
                yield number, cursor

    @property
    def is_settled(self) -> bool:
        return all(cursor.settle() == cursor.read for _, cursor in self.cursors())


class Relay:
    """One relay; any number of them share the shards. `holder` is one life of a process, `slot/incarnation`.

    `work` names the event types that each work topic gets.
    """

    def __init__(  # noqa: PLR0913 - everything that a relay is between
        self,
        log: EventLog,
        leases: Leases,
        config: KafkaConfig,
        holder: str,
        work: Mapping[str, Collection[str]],
        options: RelayOptions = RelayOptions(),
    ) -> None:
        self._log, self._leases, self._config, self._holder = log, leases, config, holder
        self._topics: dict[str, Collection[str] | None] = {
            options.firehose: None,
            **{topic: frozenset(types) for topic, types in work.items()},
        }
        self._options = options
        self._ranges = Ranges(leases, holder, options.ranges, options.ttl_s)
        self._woken = asyncio.Event()
        self._told: list[StoredEvent] = []  # what was committed, as hints bring it
        self._restarted: set[TopicPartition] = set()
        self._session: _Session | None = None
        self._trouble = ""
        self.is_draining = False
        self.sent_count = 0  # records acknowledged, on all topics
        self.rewound_count = 0  # cursors set back because a topic had lost records
        self.session_count = 0  # connections to the cluster begun: one, and one more after each failure
        self.missing_topics: tuple[str, ...] = ()

    # --- what others see

    def wake(self, rows: Sequence[StoredEvent] = ()) -> None:
        """Something was committed: `rows` of it need not be read."""
        if len(self._told) + len(rows) <= IN_FLIGHT_MAX:
            self._told += rows
        self._woken.set()

    @property
    def in_flight_count(self) -> int:
        """Records that wait for their acknowledgement."""
        return self._session.waiting if self._session else 0

    @property
    def held_ranges(self) -> tuple[int, ...]:
        """The ranges that this relay serves."""
        return tuple(sorted(self._session.active)) if self._session else ()

    @property
    def stuck(self) -> dict[int, str]:
        """Shards that cannot go on, and why."""
        ranges = self._session.active.values() if self._session else ()
        return {n: shard.stuck for each in ranges for n, shard in each.shards.items() if shard.stuck}

    @property
    def trouble(self) -> str:
        """What it waits for; empty when all is well."""
        return self._trouble

    def lag(self, heads: Mapping[int, int]) -> dict[int, int]:
        """For each range served: events of the log that are not on every topic yet."""
        if self._session is None:
            return {}
        return {
            number: sum(
                max(0, heads.get(shard, 0) - min(cursor.settle() for cursor in state.cursors))
                for shard, state in found.shards.items()
                if state.cursors
            )
            for number, found in self._session.active.items()
        }

    # --- running

    async def run(self) -> None:
        """Relay until cancelled. Cancelled without `drain`, its leases are kept until they expire."""
        while not self.is_draining:
            try:
                async with open_broker(self._config, f"relay-{self._holder}", self._restarted) as broker:
                    self.session_count += 1
                    await _Session(self, broker).run()
            except* RECOVERABLE as failures:
                self._say(f"the relay waits for Kafka: {_first(failures)!r}")
            except* LogUnavailable as failures:
                self._say(f"the relay waits for the log: {_first(failures)!r}")
            finally:
                self._session = None
            await asyncio.sleep(RETRY_S)

    async def drain(self, timeout_s: float) -> None:
        """Stop reading, wait for what is under way, save, and give the leases back; then `run` may be cancelled."""
        self.is_draining = True
        session = self._session
        try:
            async with asyncio.timeout(timeout_s):
                if session is not None:
                    await session.finish()
                await self._ranges.leave()
        except (LogUnavailable, TimeoutError) as failure:
            log_of.warning("the relay ends with records under way, which are sent again: %r", failure)

    def _say(self, trouble: str) -> None:
        """Log trouble once, and its end."""
        if trouble and not self._trouble:
            log_of.warning("%s", trouble)
        elif self._trouble and not trouble:
            log_of.warning("the relay goes on")
        self._trouble = trouble


@dataclass(frozen=True, slots=True)
class _Reading:
    """A page that is being read: what is new of the `wanted` of the shards that were served when it began."""

    shards: dict[int, _Shard]
    wanted: dict[int, int]
    limit: int
    rows: asyncio.Task[list[StoredEvent]]

    @property
    def is_whole(self) -> bool:
        """Whether it leaves no shard out."""
        return len(self.wanted) == len(self.shards)


class _Session:
    """What a relay does with one producer, until that fails or the topics change."""

    def __init__(self, relay: Relay, broker: Broker) -> None:
        self._relay, self._broker = relay, broker
        self._log, self._leases, self._ranges = relay._log, relay._leases, relay._ranges
        self._counts: dict[str, int] = {}
        self._lanes: dict[TopicPartition, Lane] = {}
        self._ebbed = asyncio.Event()
        self._leasing = asyncio.Lock()
        self._ahead: _Reading | None = None
        self._width = SHARDS  # how many shards a page is read of
        self._page = PAGE
        self.active: dict[int, _Range] = {}

    @property
    def waiting(self) -> int:
        return sum(lane.waiting for lane in self._lanes.values())

    async def run(self) -> None:
        self._counts = await self._broker.partition_counts(self._relay._topics)
        self._relay.missing_topics = tuple(sorted(self._relay._topics.keys() - self._counts.keys()))
        if self._relay.missing_topics:
            log_of.error(
                "there is no topic %s; run `oshaani topics apply`", ", ".join(self._relay.missing_topics)
            )
        self._relay._session = self
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for task in (self._keep_ranges(), self._read(), self._save(), self._look()):
                    group.create_task(task)
        except BaseExceptionGroup:
            # The next session need not send again what this one has brought there.
            with suppress(LogUnavailable):
                await self._save_all()
            raise

    async def finish(self) -> None:
        """Wait for what is under way, and save; the relay reads no more."""
        self._relay.wake()
        async with self._leasing:
            while not all(found.is_settled for found in self.active.values()):
                await self._ebb()
            await self._save_all()

    # --- ranges

    async def _keep_ranges(self) -> None:
        while True:
            async with self._leasing:
                if not self._relay.is_draining:
                    await self._share()
            ttl_s = self._relay._options.ttl_s
            hurry = self._ranges.wants_more or self._ranges.epochs.keys() != self.active.keys()
            await asyncio.sleep(min(HURRY_S, ttl_s) if hurry else ttl_s / RENEWALS_PER_TTL)

    async def _share(self) -> None:
        try:
            try:
                await self._ranges.renew()
            finally:
                for number in list(self.active):
                    if self._ranges.epochs.get(number) != self.active[number].epoch:
                        del self.active[number]
            for number in self._ranges.surplus:
                await self._give_up(number)
            for number, epoch in list(self._ranges.epochs.items()):
                if number not in self.active:
                    await self._begin(number, epoch)
        except LogUnavailable as failure:
            self._relay._say(f"the relay waits for the log: {failure!r}")

    async def _begin(self, number: int, epoch: int) -> None:
        """Serve a range from its marks on; before those when a topic has lost what they say it has."""
        marks = {(mark.topic, mark.shard): mark for mark in await self._leases.marks()}
        shards = shards_of(number, self._relay._options.ranges)
        wanted = {self._partition(topic, shard) for topic in self._counts for shard in shards}
        ends = await self._broker.end_offsets(wanted)
        found = _Range(number, epoch)
        for shard in shards:
            cursors = [
                await self._cursor(topic, shard, marks.get((topic, shard)), ends) for topic in self._counts
            ]
            found.shards[shard] = _Shard(shard, cursors)
        # What was rewound must be remembered before the topic has grown again.
        if await self._save_range(found):
            self._broker.restarted -= wanted
            self.active[number] = found
            self._relay.wake()

    async def _cursor(
        self, topic: str, shard: int, mark: Mark | None, ends: Mapping[TopicPartition, int]
    ) -> _Cursor:
        to = self._partition(topic, shard)
        lane = self._lane(to)
        lane.next_offset = max(lane.next_offset, ends[to])
        types = self._relay._topics[topic]
        if mark is not None and mark.next_offset <= ends[to] and to not in self._broker.restarted:
            return _Cursor(topic, types, lane, mark.position, mark.began)
        start = await first_kept(self._log, shard, _RETENTION_S.get(topic))
        if mark is not None:
            start = min(start, mark.position)
            self._relay.rewound_count += 1
            log_of.warning(
                "%s lost records of shard %d: it is written again from position %d on",
                topic,
                shard,
                start + 1,
            )
        cursor = _Cursor(topic, types, lane, start, start)
        cursor.saved = None
        return cursor

    async def _give_up(self, number: int) -> None:
        """Leave a range to another relay, its cursors saved."""
        found = self.active.pop(number, None)
        if found is not None:
            try:
                async with asyncio.timeout(GIVE_UP_S):
                    while not found.is_settled:
                        await self._ebb()
            except TimeoutError:
                pass  # the other one sends it again
            await self._save_range(found)
        await self._ranges.release(number)

    def _partition(self, topic: str, shard: int) -> TopicPartition:
        return TopicPartition(topic, partition_of(shard, self._counts[topic]))

    def _lane(self, to: TopicPartition) -> Lane:
        lane = self._lanes.get(to)
        if lane is None:
            gather_s = self._relay._options.gather_s.get(to.topic, 0.0)
            lane = self._lanes[to] = Lane(self._broker, to, self._on_ack, gather_s)
            self._group.create_task(lane.run())
        return lane

    def _on_ack(self, count: int) -> None:
        self._relay.sent_count += count
        self._ebbed.set()
        if self._relay._trouble:
            self._relay._say("")

    async def _ebb(self) -> None:
        """Wait until something more is acknowledged."""
        self._ebbed.clear()
        await self._ebbed.wait()

    # --- reading

    async def _read(self) -> None:
        try:
            await self._follow()
        finally:
            if self._ahead is not None:
                self._ahead.rows.cancel()

    async def _follow(self) -> None:
        pause_s = POLL_FIRST_S
        while True:
            was_told = self._relay._woken.is_set()
            self._relay._woken.clear()
            while self.waiting > IN_FLIGHT_MAX or self._waiting_bytes() > IN_FLIGHT_BYTES_MAX:
                await self._ebb()
            try:
                found = self._send_told() or await self._read_front()
                more = await self._read_rear() or self._ahead is not None
            except LogUnavailable as failure:
                self._relay._say(f"the relay waits for the log: {failure!r}")
                found = more = False
            else:
                if self._relay._trouble and not self.waiting:
                    self._relay._say("")
            if more:
                continue
            # Where hints arrive, looking again soon would only cost time.
            first_s = POLL_MAX_S if was_told else POLL_FIRST_S
            pause_s = first_s if found else min(pause_s * 2, POLL_MAX_S)
            await asyncio.sleep(READ_PAUSE_S)
            try:
                async with asyncio.timeout(pause_s):
                    await self._relay._woken.wait()
            except TimeoutError:
                pass

    def _send_told(self) -> bool:
        """Send what hints brought, if that is all that is new of the shards they are of; else it is read."""
        told, self._relay._told = self._relay._told, []
        shards = self._shards()
        fronts = {number: shard.front for number, shard in shards.items()}
        rows: list[StoredEvent] = []
        is_whole = bool(told) and self._ahead is None
        for row in sorted(told, key=attrgetter("shard", "position")):
            front = fronts.get(row.shard)
            if front is None or row.position <= front:
                continue
            if row.position > front + 1:
                is_whole = False
                break
            fronts[row.shard] = row.position
            rows.append(row)
        if is_whole:
            self._send(rows, shards)
        return is_whole

    async def _read_front(self) -> bool:
        """Send a page of what is new, while the next one is read if there is more: whether there was anything."""
        reading, self._ahead = self._ahead or self._begin_page(-1, []), None
        rows = await reading.rows
        if len(rows) >= reading.limit:
            self._width = len({row.shard for row in rows})
            self._ahead = self._begin_page(rows[-1].shard, rows)
        elif not reading.is_whole:
            self._width *= 2
            self._ahead = self._begin_page(max(reading.wanted), rows)
        if self._ahead is not None:
            await asyncio.sleep(0)  # has the database at it
        self._send(rows, reading.shards)
        return bool(rows)

    def _begin_page(self, served: int, unsent: Sequence[StoredEvent]) -> _Reading:
        """Begin to read what is new of the shards behind `served`, or of all again when those were the last.

        In turns, so that a busy shard does not keep others waiting; and of no more shards than give a page, because for
        each of them the database looks up as much.
        """
        shards = self._shards()
        numbers = sorted(number for number in shards if number > served) or sorted(shards)
        fronts = {number: shards[number].front for number in numbers[: self._width]}
        fronts.update((row.shard, row.position) for row in unsent if row.shard in fronts)
        self._width = min(self._width, len(shards)) or 1
        return _Reading(shards, fronts, self._page, asyncio.create_task(self._page_of(fronts)))

    async def _read_rear(self) -> bool:
        """Read again for topics that are behind the others: whether there were any."""
        shards = self._shards()
        behind = {n: each.rear for n, each in shards.items() if each.cursors and each.rear < each.front}
        if behind:
            self._send(await self._page_of(behind), shards)
        return bool(behind)

    async def _page_of(self, cursors: dict[int, int]) -> list[StoredEvent]:
        if not cursors or self._relay.is_draining:
            return []
        rows = await self._log.read_after(cursors, self._page)
        size_bytes = sum(len(row.payload) + len(row.personal or b"") for row in rows)
        self._page = PAGE_SMALL if size_bytes > PAGE_BYTES else PAGE
        return rows

    def _shards(self) -> dict[int, _Shard]:
        return {
            number: shard
            for each in self.active.values()
            for number, shard in each.shards.items()
            if not shard.stuck
        }

    def _waiting_bytes(self) -> int:
        return sum(lane.waiting_bytes for lane in self._lanes.values() if lane.waiting)

    def _send(self, rows: Sequence[StoredEvent], read: Mapping[int, _Shard]) -> None:
        served = {} if self._relay.is_draining else self._shards()
        lanes: set[Lane] = set()
        for number, found in groupby(rows, attrgetter("shard")):
            # While they were read, the shard may have been lost, and even won again from other marks.
            if served.get(number) is read[number]:
                lanes.update(read[number].take(list(found)))
        for lane in lanes:
            lane.flush()

    # --- cursors

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            try:
                await self._save_all()
            except LogUnavailable as failure:
                self._relay._say(f"the relay waits for the log: {failure!r}")

    async def _save_all(self) -> None:
        for found in list(self.active.values()):
            await self._save_range(found)

    async def _save_range(self, found: _Range) -> bool:
        changed = [
            (cursor, cursor.mark(shard))
            for shard, cursor in found.cursors()
            if cursor.settle() != cursor.saved
        ]
        if not changed:
            return True
        if not await self._leases.save_marks(
            lease_of(found.number), found.epoch, [mark for _, mark in changed]
        ):
            # Another relay has it, or somebody rewound it: it begins anew if it can be had.
            if self.active.get(found.number) is found:
                del self.active[found.number]
            self._ranges.forget(found.number, found.epoch)
            return False
        for cursor, mark in changed:
            cursor.saved = mark.position
        crash_point("relay.saved")
        return True

    # --- topics

    async def _look(self) -> None:
        """See whether topics came, went, or lost records while nothing was sent to them."""
        while True:
            await asyncio.sleep(self._relay._options.look_s)
            known = {to: lane.next_offset for to, lane in self._lanes.items()}
            try:
                counts = await self._broker.partition_counts(self._relay._topics)
                if counts != self._counts:
                    raise TopicsChanged(f"topics changed: {sorted(counts.items() ^ self._counts.items())}")
                ends = await self._broker.end_offsets(known)
            except (KafkaError, TimeoutError):
                continue  # away: what is sent waits for it
            lost = [to for to, next_offset in known.items() if ends[to] < next_offset]
            if lost:
                raise TopicsChanged(f"records are gone from {sorted(lost)}")


async def first_kept(log: EventLog, shard: int, retention_s: int | None) -> int:
    """The position before the first event of a shard that a topic of this retention would still hold."""
    if retention_s is None:
        return 0
    since = datetime.now(UTC) - timedelta(seconds=retention_s)
    low, high = 0, (await log.heads()).get(shard, 0)
    while low < high:
        middle = (low + high) // 2
        row = (await log.read_after({shard: middle}, 1))[0]
        if row.recorded_at is not None and row.recorded_at >= since:
            high = middle
        else:
            low = middle + 1
    return low


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
