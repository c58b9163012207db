"""Proof that a topic is the log, and the way to send again what it lacks."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from adapters.kafka.clients import KafkaConfig, open_consumer
from adapters.kafka.relay_ranges import lease_of, range_of
from domain.event_log import EventLog, StoredEvent
from domain.ids import SHARDS
from domain.leases import Leases, Mark
from schemas.topics import partition_of
from schemas.wire import Malformed, UnknownFormat, unpack

METADATA_S: Final = 10.0
SILENCE_S: Final = 30.0  # how long the broker may have nothing to tell although there is more
RECORDS_AT_ONCE: Final = 2_000
FETCH_MS: Final = 500
PAGE: Final = 500
SHOWN_MAX: Final = 1_000  # findings of a kind that a report lists; it counts all


class TopicMissing(Exception):
    """There is no such topic."""


@dataclass(frozen=True, slots=True, order=True)
class Positions:
    """Positions of a shard, both ends included."""

    shard: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """How many they are."""
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Wrong:
    """A record that is not what the log says."""

    partition: int
    offset: int
    what: str


@dataclass(slots=True)
class Report:
    """What was found on a topic, up to the heads that the log had when the check began.

    Duplicates are harmless, and so is a record out of order when what it skipped came later; both are counted.
    """

    topic: str
    heads: dict[int, int]
    checked_from: dict[int, int] = field(
        default_factory=dict
    )  # the position before the first one checked, by shard
    record_count: int = 0
    event_count: int = 0
    duplicate_count: int = 0
    out_of_order_count: int = 0
    missing: list[Positions] = field(default_factory=list)
    missing_count: int = 0
    wrong: list[Wrong] = field(default_factory=list)
    wrong_count: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether the topic holds every event that it should, unchanged."""
        return not self.missing_count and not self.wrong_count

    @property
    def first_missing(self) -> dict[int, int]:
        """Where `resend` must begin, by shard."""
        found: dict[int, int] = {}
        for gap in self.missing:
            found[gap.shard] = min(gap.first, found.get(gap.shard, gap.first))
        return found

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"is_equal": self.is_equal}


async def verify(  # noqa: PLR0913 - both sides, and what is expected of them
    log: EventLog,
    leases: Leases,
    config: KafkaConfig,
    topic: str,
    from_positions: Mapping[int, int] | None = None,
    types: Collection[str] | None = None,
) -> Report:
    """Compare a topic with the log, from the events after `from_positions` up to the heads of now.

    Without `from_positions` each shard is compared from where the relay began the topic; once records were dropped for
    their age, from the first one that is there. A work topic is compared with the events of its `types`. Give the relay
    time first: what it has not sent yet is missing.

    Raises:
        TopicMissing: there is none of this name.
        KafkaError, TimeoutError: the broker does not answer.
        LogUnavailable: the log does not.
    """
    report = Report(topic, await log.heads())
    began = {mark.shard: mark.began for mark in await leases.marks() if mark.topic == topic}
    async with open_consumer(config, "relay-check") as consumer:
        partitions = await _partitions(consumer, topic)
        consumer.assign(partitions)
        async with asyncio.timeout(METADATA_S):
            begins = await consumer.beginning_offsets(partitions)
            ends = await consumer.end_offsets(partitions)
            await consumer.seek_to_beginning()
        check = _Check(log, report, len(partitions), types)
        for shard, head in report.heads.items():
            if from_positions is not None:
                check.begin(shard, min(from_positions.get(shard, 0), head))
            elif begins[partitions[partition_of(shard, len(partitions))]] == 0:
                check.begin(shard, min(began.get(shard, 0), head))
        async for records in _all_records(consumer, ends):
            await check.compare(records)
    await check.find_missing()
    return report


async def resend(
    leases: Leases, topic: str, from_positions: Mapping[int, int], ranges: int = 4
) -> list[Mark]:
    """Have the relay send events again, by shard from these positions on (the first one included).

    It may be running: it begins anew from there. Only this topic gets them twice. Shards that no relay has begun on this
    topic have nothing to send again. The marks as they are now are returned.
    """
    found: defaultdict[int, list[Mark]] = defaultdict(list)
    for mark in await leases.marks():
        position = from_positions.get(mark.shard)
        if mark.topic == topic and position is not None and position <= mark.position:
            found[range_of(mark.shard, ranges)].append(mark._replace(position=max(0, position - 1)))
    for number, marks in found.items():
        await leases.rewind(lease_of(number), marks)
    return [mark for marks in found.values() for mark in marks]


async def lag(log: EventLog, leases: Leases, topics: Collection[str]) -> dict[str, dict[int, int]]:
    """For each topic, by shard: events that no relay is known to have brought there. Shards without events are left out."""
    heads = {shard: head for shard, head in (await log.heads()).items() if head}
    marks = {(mark.topic, mark.shard): mark.position for mark in await leases.marks()}
    return {
        topic: {shard: max(0, head - marks.get((topic, shard), 0)) for shard, head in heads.items()}
        for topic in topics
    }


class _Check:
    """The comparison of one topic. A byte for each position of the log says whether it was there."""

    def __init__(
        self,
        log: EventLog,
        report: Report,
        partition_count: int,
        types: Collection[str] | None,
    ) -> None:
        self._log, self._report, self._types = log, report, types
        self._partition_count = partition_count
        self._seen: dict[int, bytearray] = {}
        self._last: dict[int, int] = {}

    def begin(self, shard: int, position: int) -> None:
        """Settle that a shard is compared from the event after a position; else it is from the first one there."""
        self._report.checked_from[shard] = position
        self._seen[shard] = bytearray(self._report.heads[shard] - position)

    async def compare(self, records: Sequence[ConsumerRecord]) -> None:
        """Compare records with the log, in the order in which they are on their partition."""
        by_shard: defaultdict[int, list[tuple[ConsumerRecord, StoredEvent]]] = defaultdict(list)
        for record in records:
            self._report.record_count += 1
            try:
                row = unpack(record.value or b"")
            except (Malformed, UnknownFormat) as failure:
                self._is_wrong(record, str(failure))
                continue
            if (
                not 0 <= row.shard < SHARDS
                or partition_of(row.shard, self._partition_count) != record.partition
            ):
                self._is_wrong(record, f"shard {row.shard} does not belong on partition {record.partition}")
            else:
                by_shard[row.shard].append((record, row))
        for shard, found in by_shard.items():
            if shard not in self._seen:
                self.begin(shard, min(found[0][1].position - 1, self._report.heads[shard]))
            await self._compare_shard(shard, found)

    async def _compare_shard(self, shard: int, found: Sequence[tuple[ConsumerRecord, StoredEvent]]) -> None:
        seen, after = self._seen[shard], self._report.checked_from[shard]
        # What was appended since the check began is the next check's.
        found = [each for each in found if after < each[1].position <= self._report.heads[shard]]
        rows = await self._rows(shard, [row.position for _, row in found])
        for record, row in found:
            if rows.get(row.position) != row:
                self._is_wrong(record, f"event {row.position} of shard {shard} is another one in the log")
                continue
            if self._types is not None and row.type not in self._types:
                self._is_wrong(record, f"{row.type} does not belong on this topic")
            index = row.position - after - 1
            if seen[index]:
                self._report.duplicate_count += 1
            else:
                seen[index] = 1
                self._report.event_count += 1
                if row.position < self._last.get(shard, 0):
                    self._report.out_of_order_count += 1
            self._last[shard] = max(row.position, self._last.get(shard, 0))

    async def _rows(self, shard: int, positions: Sequence[int]) -> dict[int, StoredEvent]:
        """The log's events at these positions."""
        rows: dict[int, StoredEvent] = {}
        for position in sorted(set(positions)):
            if position not in rows:
                page = await self._log.read_after({shard: position - 1}, PAGE)
                rows.update((row.position, row) for row in page)
        return rows

    async def find_missing(self) -> None:
        """What was not there although it should have been."""
        for shard, seen in self._seen.items():
            after = self._report.checked_from[shard]
            for first, last in _runs_of_zeros(seen):
                gap = Positions(shard, after + 1 + first, after + 1 + last)
                for missing in [gap] if self._types is None else await self._wanted(gap):
                    self._report.missing_count += missing.count
                    if len(self._report.missing) < SHOWN_MAX:
                        self._report.missing.append(missing)

    async def _wanted(self, gap: Positions) -> list[Positions]:
        """Those of the positions whose events belong on this work topic."""
        assert self._types is not None
        found: list[Positions] = []
        at = gap.first - 1
        while at < gap.last:
            for row in await self._log.read_after({gap.shard: at}, min(PAGE, gap.last - at)):
                at = row.position
                if row.type in self._types:
                    found.append(Positions(gap.shard, at, at))
        return found

    def _is_wrong(self, record: ConsumerRecord, what: str) -> None:
        self._report.wrong_count += 1
        if len(self._report.wrong) < SHOWN_MAX:
            self._report.wrong.append(Wrong(record.partition, record.offset, what))


def _runs_of_zeros(seen: bytearray) -> Iterator[tuple[int, int]]:
    at = seen.find(0)
    while at >= 0:
        end = seen.find(1, at)
        yield at, (end if end >= 0 else len(seen)) - 1
        at = seen.find(0, end) if end >= 0 else -1


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
    async with asyncio.timeout(METADATA_S):
        # What `topics()` fetches tells no partitions.
        cluster = await consumer._client.fetch_all_metadata()
    numbers = sorted(cluster.partitions_for_topic(topic) or ())
    if not numbers:
        raise TopicMissing(f"there is no topic {topic!r}; run `oshaani topics apply`, and the relay fills it")
    if numbers != list(range(len(numbers))):
        raise KafkaError(f"the broker tells only of partitions {numbers} of {topic!r}")
    return [TopicPartition(topic, number) for number in numbers]


async def _all_records(
    consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]
) -> AsyncIterator[list[ConsumerRecord]]:
    """Everything before the `ends`, in pieces; the records of a partition in order."""
    loop = asyncio.get_running_loop()
    left, heard_at = set(ends), loop.time()
    while left:
        async with asyncio.timeout(METADATA_S):
            left = {to for to in left if await consumer.position(to) < ends[to]}
        found = await consumer.getmany(timeout_ms=FETCH_MS, max_records=RECORDS_AT_ONCE)
        if found:
            heard_at = loop.time()
        elif left and loop.time() - heard_at > SILENCE_S:
            raise TimeoutError(f"the broker has not sent the rest of {sorted(left)} for {SILENCE_S:.0f} s")
        for to, records in found.items():
            yield [record for record in records if record.offset < ends[to]]
