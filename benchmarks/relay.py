"""The relay beside bare clients of Kafka, on the same broker and in turns.

    python -m benchmarks.relay [--events N] [--rounds R] [--rate PER_S] [--seconds S]

Throughput: the relay carries a filled log (records of about 500 bytes) to a topic, and a bare idempotent producer sends
the same bytes to another. Latency: events are appended one by one at a steady rate and read by a consumer, the relay
being a process of its own; beside it the same consumer reads what is sent to the broker directly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from adapters.kafka.broker import embedded_kafka
from adapters.kafka.clients import KafkaConfig, open_consumer, open_producer
from adapters.kafka.relay import Relay, RelayOptions
from adapters.postgres import leases as postgres_leases
from adapters.postgres.embedded import embedded_postgres
from adapters.postgres.event_log import PostgresEventLog, run_script
from adapters.postgres.hints import Hints
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.pool import open_pool
from benchmarks.processes import machine_load, program
from domain.event_log import Batch, StoredEvent
from domain.ids import SHARDS, shard_of
from schemas.records import AnyRecord, Record
from schemas.topics import LOG, Topic, partition_of
from schemas.wire import pack

VALUE_BYTES = 500
APPENDED_AT_ONCE = 500
WARM_UP = 100
START_S = 30.0


class Rate(NamedTuple):
    """How fast something went, and what it took of this process's CPU."""

    per_s: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a measurement happens."""

    dsn: str
    config: KafkaConfig
    log: PostgresEventLog


def tenants() -> list[UUID]:
    """One for each shard."""
    found: dict[int, UUID] = {}
    while len(found) < SHARDS:
        tenant = uuid4()
        found.setdefault(shard_of(tenant), tenant)
    return [found[shard] for shard in range(SHARDS)]


def event(tenant: UUID, position: int) -> StoredEvent:
    """One whose record has about `VALUE_BYTES`."""
    filling = json.dumps({"text": uuid4().hex * 9}).encode()
    return StoredEvent(
        shard=shard_of(tenant),
        position=position,
        tenant_id=tenant,
        stream_id=uuid4(),
        stream_version=1,
        type="Bench.Happened",
        schema_version=1,
        payload=filling,
        personal=None,
        subject_id=None,
        command_id=uuid4(),
        correlation_id=uuid4(),
        causation_id=None,
        actor="system:bench",
        traceparent=None,
        recorded_at=None,
    )


async def fill(log: PostgresEventLog, count: int) -> None:
    """Append `count` events, spread over all shards."""
    owners, heads = tenants(), await log.heads()
    for begin in range(0, count, APPENDED_AT_ONCE):
        tenant = owners[begin // APPENDED_AT_ONCE % SHARDS]
        shard, size = shard_of(tenant), min(APPENDED_AT_ONCE, count - begin)
        events = [event(tenant, heads[shard] + n) for n in range(1, size + 1)]
        await log.append(Batch({shard: heads[shard]}, events))
        heads[shard] += size


async def new_topic(place: Place) -> str:
    """A topic as the log's, without records."""
    topic: Topic = replace(LOG, name=f"bench.{uuid4().hex[:8]}")
    admin = AdminClient({"bootstrap.servers": ",".join(place.config.bootstrap_servers)})
    made = admin.create_topics([NewTopic(topic.name, topic.partitions, 1, config=topic.settings)])
    await asyncio.to_thread(made[topic.name].result, START_S)
    return topic.name


# --- throughput


class Stopwatch:
    """Time on the wall, and of this process's CPU."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def rate(self, count: int) -> Rate:
        """What happened `count` times since."""
        cpu_s, wall_s = time.process_time() - self._cpu_s, time.perf_counter() - self._wall_s
        return Rate(count / wall_s, cpu_s / count * 1e6)


async def relayed(place: Place, rows: list[StoredEvent]) -> Rate:
    """How the relay carries events: from its first record until all are acknowledged."""
    topic = await new_topic(place)
    await run_script(place.dsn, "DELETE FROM lease; DELETE FROM relay_mark;")
    async with open_pool(place.dsn, 2) as pool:
        relay = Relay(
            place.log, PostgresLeases(pool), place.config, "bench/1", {}, RelayOptions(firehose=topic)
        )
        task = asyncio.create_task(relay.run())
        while not relay.in_flight_count and not relay.sent_count:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        watch = Stopwatch()
        while relay.sent_count < len(rows):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        rate = watch.rate(len(rows))
        await relay.drain(5.0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return rate


async def sent(place: Place, rows: list[StoredEvent]) -> Rate:
    """How a bare producer sends the same bytes, until all are acknowledged."""
    topic = await new_topic(place)
    partitions = LOG.partitions
    records = [(pack(row), row.stream_id.bytes, partition_of(row.shard, partitions)) for row in rows]
    async with open_producer(place.config, "bench") as producer:
        await producer.send_and_wait(topic, b"x", b"x", 0)
        watch = Stopwatch()
        last: asyncio.Future[Any] | None = None
        for value, key, partition in records:
            last = await producer.send(topic, value, key, partition)
        await producer.flush()
        assert last is not None and last.done()
        return watch.rate(len(rows))


async def throughput(place: Place, events: int, rounds: int) -> dict[str, object]:
    """Alternate both; the ratio of the medians."""
    await fill(place.log, events)
    rows = await place.log.read_after(dict.fromkeys(range(SHARDS), 0), events)
    size_bytes = statistics.mean(len(pack(row)) for row in rows)
    found: dict[str, list[Rate]] = {"bare producer": [], "relay": []}
    ways: dict[str, Callable[[Place, list[StoredEvent]], Awaitable[Rate]]] = {
        "bare producer": sent,
        "relay": relayed,
    }
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(await way(place, rows))
            rate = found[name][-1]
            print(  # noqa: T201
                f"{name:14} {rate.per_s:8.0f} records/s {rate.cpu_us:5.1f} us CPU  load {machine_load()}",
                flush=True,
            )
    medians = {name: round(statistics.median(rate.per_s for rate in rates)) for name, rates in found.items()}
    cpu = {name: round(statistics.median(rate.cpu_us for rate in rates), 1) for name, rates in found.items()}
    ratio = round(medians["relay"] / medians["bare producer"], 2)
    return {
        "records_per_s": medians,
        "ratio": ratio,
        "client_cpu_us_per_record": cpu,
        "record_bytes": round(size_bytes),
    }


# --- latency


@asynccontextmanager
async def reading(place: Place, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer at the topic's end."""
    async with open_consumer(place.config, "bench-reader") as consumer:
        partitions = [TopicPartition(topic, n) for n in range(LOG.partitions)]
        consumer.assign(partitions)
        await consumer.seek_to_end()
        for to in partitions:
            await consumer.position(to)
        yield consumer


async def latencies_ms(
    consumer: AIOKafkaConsumer, rate: float, seconds: float, put: Callable[[int], Awaitable[bytes]]
) -> list[float]:
    """`put(n)` at a steady rate; how long each record took from the call until it was read, the first ones left out."""
    count = WARM_UP + int(rate * seconds)
    begun: dict[bytes, float] = {}
    arrived: dict[bytes, float] = {}

    async def read() -> None:
        while len(arrived) < count:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    arrived.setdefault(record.key, time.perf_counter())

    reader = asyncio.create_task(read())
    start = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        at = time.perf_counter()
        begun[await put(number)] = at
    async with asyncio.timeout(START_S):
        await reader
    return sorted((arrived[key] - at) * 1000 for key, at in list(begun.items())[WARM_UP:])


def record_of(row: StoredEvent, at: datetime) -> AnyRecord:
    """What is told of a row: where it is. Its event is nothing that anybody waits for."""
    where = row.shard, row.position, row.stream_id, row.stream_version, row.tenant_id
    return Record(None, row.type, *where, row.command_id, row.correlation_id, None, row.actor, None, at)


async def appended_ms(place: Place, rate: float, seconds: float) -> list[float]:
    """Append → relay → consumer."""
    topic = await new_topic(place)
    owners, heads = tenants(), await place.log.heads()
    hints = Hints(place.dsn, bytes(32))
    telling = asyncio.create_task(hints.run())
    await run_script(place.dsn, "DELETE FROM lease; DELETE FROM relay_mark;")
    await _mark_all(place, topic, heads)

    async def put(number: int) -> bytes:
        shard = number % SHARDS
        row = event(owners[shard], heads[shard] + 1)
        at = await place.log.append(Batch({shard: heads[shard]}, [row]))
        heads[shard] += 1
        hints.tell([record_of(row, at)], [row._replace(recorded_at=at)])
        return row.stream_id.bytes

    serve = ["-m", "benchmarks.relay", "--serve", place.dsn, ",".join(place.config.bootstrap_servers), topic]
    with tempfile.NamedTemporaryFile() as output, program(serve, {}, Path(output.name)):
        async with reading(place, topic) as consumer:
            await put(0)
            async with asyncio.timeout(START_S):
                while not await consumer.getmany(timeout_ms=100):
                    pass
            found = await latencies_ms(consumer, rate, seconds, put)
    telling.cancel()
    return found


async def _mark_all(place: Place, topic: str, heads: dict[int, int]) -> None:
    rows = ", ".join(f"('{topic}', {shard}, {head}, 0, {head})" for shard, head in heads.items())
    await run_script(place.dsn, f"INSERT INTO relay_mark VALUES {rows};")  # noqa: S608 - our own numbers


async def produced_ms(place: Place, rate: float, seconds: float) -> list[float]:
    """Bare produce → consume of the same record."""
    topic, owners = await new_topic(place), tenants()
    async with open_producer(place.config, "bench") as producer, reading(place, topic) as consumer:

        async def put(number: int) -> bytes:
            row = event(owners[number % SHARDS], number)
            key = row.stream_id.bytes
            await producer.send_and_wait(topic, pack(row), key, partition_of(row.shard, LOG.partitions))
            return key

        return await latencies_ms(consumer, rate, seconds, put)


def quantiles(values: list[float]) -> dict[str, float]:
    return {"p50": round(values[len(values) // 2], 2), "p99": round(values[int(len(values) * 0.99)], 2)}


async def latency(place: Place, rate: float, seconds: float, rounds: int) -> dict[str, object]:
    """Alternate both; medians over the rounds of each quantile, and their ratios."""
    found: dict[str, list[dict[str, float]]] = {"produce → consume": [], "append → consume": []}
    for _ in range(rounds):
        for name, way in (("produce → consume", produced_ms), ("append → consume", appended_ms)):
            found[name].append(quantiles(await way(place, rate, seconds)))
            print(f"{name:18} {found[name][-1]} ms  load {machine_load()}", flush=True)  # noqa: T201
    medians = {
        name: {which: statistics.median(each[which] for each in values) for which in ("p50", "p99")}
        for name, values in found.items()
    }
    bare, ours = medians.values()
    ratios = {which: round(ours[which] / bare[which], 2) for which in ("p50", "p99")}
    return {"ms": medians, "ratio": ratios}


async def serve(dsn: str, servers: str, topic: str) -> None:
    """A relay, woken by hints, until this process is ended."""
    log = PostgresEventLog(dsn)
    await log.open()
    hints = Hints(dsn, bytes(32))
    async with open_pool(dsn, 2) as pool:
        options = RelayOptions(firehose=topic)
        relay = Relay(log, PostgresLeases(pool), KafkaConfig.at(servers), "bench/1", {}, options)
        hints.on_hint(lambda hint: relay.wake(hint.rows))
        await asyncio.gather(hints.run(), relay.run())


async def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="oshaani-bench-") as folder:
        Path(folder).chmod(0o755)
        async with (
            embedded_postgres(Path(folder) / "data") as dsn,
            embedded_kafka(Path(folder)) as servers,
        ):
            log = PostgresEventLog(dsn)
            await log.migrate()
            await run_script(dsn, postgres_leases.TABLES)
            await log.open()
            place = Place(dsn, KafkaConfig.at(servers), log)
            found: dict[str, object] = {"throughput": await throughput(place, options.events, options.rounds)}
            if options.seconds:
                found["latency"] = await latency(place, options.rate, options.seconds, options.rounds)
            found["load"] = machine_load()
            print(json.dumps(found))  # noqa: T201
            await log.close()


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        uvloop.run(serve(*sys.argv[2:5]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
