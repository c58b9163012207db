"""The distributed layout: what each process of it does. Any of them may run more than once; `up` does all in one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import psycopg
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry
from psycopg_pool import PoolTimeout

from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.kafka.following import follow_topic
from adapters.kafka.publisher import kafka_publisher
from adapters.kafka.relay import Relay
from adapters.kafka.turn_feed import KafkaTurnFeed
from adapters.postgres.hints import Hints
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.parked_records import PostgresParkedRecords
from adapters.postgres.pool import deadline, open_pool
from api.app import create_app
from api.server import Check
from domain.event_log import LogUnavailable, StoredEvent
from oshaani.log_tail import LogTail
from oshaani.metrics import PlatformMetrics
from oshaani.process import Ending, http, listening, quieten_collector
from oshaani.role_metrics import (
    LogHeads,
    ProcessorMetrics,
    ProjectionMetrics,
    watch_lease,
    watch_process,
    watch_processor,
    watch_relay,
)
from oshaani.settings import Settings
from oshaani.store_metrics import StoreMetrics
from oshaani.wiring import LAG_MAX, PROCESSORS, Core, core_of, means_of, open_log, server_of, utc_now, work_of
from oshaani.worker_http import Ready, worker_app
from projections.catching_up import AWAITED, CheckpointWatch
from projections.runner import Runner
from schemas import wire
from schemas.cloud_events import CloudEvents
from schemas.codec import type_of
from schemas.records import AnyRecord
from schemas.topics import LOG, TURN_STREAM, work_topic
from stream_processors.faust_app import FaustHost
from stream_processors.public_topics import public_topics
from stream_processors.publication import Publication
from stream_processors.runner import Supplies
from stream_processors.slot import Slot
from stream_processors.sweeper import Sweeper

log_of = logging.getLogger(__name__)

DRAIN_S = 6.0
PAUSE_S = 1.0
LEASE_S, RENEW_S = 6.0, 2.0
PROJECTOR_LEASE = "projector"
DISTRIBUTED = {each.name: each for each in (*PROCESSORS, public_topics)}
SWEEPING = ("agent_turns", "tool_calls", "notifications")  # those that take up due work
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a process: its slot, which a restart keeps, and its own id."""

    role: str
    slot: str
    id: UUID = field(default_factory=uuid4)

    @classmethod
    def of(cls, settings: Settings, role: str) -> Life:
        """That of this process; without a slot in the settings it has one that nobody else will have."""
        return cls(role, settings.slot or f"{role}-{socket.gethostname()}-{os.getpid()}")

    @property
    def name(self) -> str:
        return f"{self.slot}/{self.id}"


async def api(settings: Settings, dsn: str, announce: Announce) -> None:
    """Commands and queries over HTTP; turns are run by others and followed through the log."""
    ending, life = Ending(), Life.of(settings, "api")
    with listening(settings.host, settings.port, "OSHAANI_PORT") as listener:
        async with AsyncExitStack() as stack:
            core = await stack.enter_async_context(core_of(settings, dsn, projecting=False))
            means = await stack.enter_async_context(means_of(core))
            feed, hints = KafkaTurnFeed(TURN_STREAM.name), Hints(dsn)
            server = await stack.enter_async_context(server_of(core, means, feed, lambda: _serves(core)))
            watch_process(server.metrics, life.role)
            metrics = PlatformMetrics(server.metrics, lambda: {"commands": core.bus.waiting})

            def followed(row: StoredEvent) -> bool:
                return feed.is_followed(row.stream_id) or feed.is_followed(row.correlation_id)

            def committed(records: Sequence[AnyRecord]) -> None:
                tail.offer(records)
                hints.tell(records)
                feed.publish(records)
                metrics.observe(records)

            def heard(records: Sequence[AnyRecord]) -> None:
                feed.publish(records)
                app.state.on_records(records)

            tail = LogTail(core.log, core.records, heard, followed)
            core.bus.on_commit = committed
            app = create_app(server)
            hints.on_hint(tail.hint)
            hints.on_hint(core.bus.hint)
            config = KafkaConfig.of(settings)
            parts = {
                "hints": hints.run(),
                "log tail": tail.run(),
                "turn stream": follow_topic(config, life.slot, TURN_STREAM.name, feed.take),
            }
            await stack.enter_async_context(ending.parts(parts))
            async with http(app, listener) as serving:
                quieten_collector()
                announce(f"{life.slot} serves {settings.base_url}")
                await ending.wait()
                serving.should_exit = True
            await core.bus.drain()
    ending.check()


async def relay(settings: Settings, dsn: str, announce: Announce) -> None:
    """Carries the log to Kafka. Relays share the shards; what a dead one served is taken over."""
    ending, life = Ending(), Life.of(settings, "relay")
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(dsn, 2))
        log = await stack.enter_async_context(open_log(dsn))
        hints = Hints(dsn)
        carrying = Relay(log, PostgresLeases(pool), KafkaConfig.of(settings), life.name, work_types())
        hints.on_hint(lambda heads: carrying.wake())
        metrics, heads = CollectorRegistry(), LogHeads(log)
        watch_relay(metrics, carrying, lambda: heads.latest)

        async def ready() -> Sequence[Check]:
            ranges = f"serves ranges {', '.join(map(str, carrying.held_ranges)) or 'none'}"
            stuck = "; ".join(f"shard {shard}: {why}" for shard, why in carrying.stuck.items())
            return [
                Check("kafka", not carrying.trouble, carrying.trouble),
                Check("topics", not carrying.missing_topics, ", ".join(carrying.missing_topics)),
                Check("relay", not stuck, stuck or ranges),
            ]

        await stack.enter_async_context(operators(settings, life, ready, metrics, announce))
        async with ending.parts({"hints": hints.run(sends=False), "relay": carrying.run(), "heads": heads.run()}):
            await ending.wait()
            await carrying.drain(DRAIN_S)
    ending.check()


def work_types() -> dict[str, frozenset[str]]:
    """By work topic, the types of the events that its processor handles."""
    return {
        work_topic(name).name: frozenset(type_of(event_class).name for event_class in each.handlers)
        for name, each in DISTRIBUTED.items()
    }


async def projector(settings: Settings, dsn: str, announce: Announce) -> None:
    """Keeps the read models. One at a time does; the others stand by and take over."""
    ending, life = Ending(), Life.of(settings, "projector")
    async with AsyncExitStack() as stack:
        core = await stack.enter_async_context(core_of(settings, dsn, projecting=False))
        leases = PostgresLeases(core.pool)
        metrics = CollectorRegistry()
        store = StoreMetrics(metrics)
        working = Working(core, KafkaConfig.of(settings), life, ProjectionMetrics(metrics))
        watch_lease(metrics, PROJECTOR_LEASE, lambda: working.epoch)
        awaited = Hints(dsn, AWAITED)
        awaited.on_hint(lambda heads: working.hurry())

        async def ready() -> Sequence[Check]:
            return [await _database(core), working.check()]

        await stack.enter_async_context(operators(settings, life, ready, metrics, announce))
        parts = {
            "projector": working.run(leases),
            "hints": awaited.run(sends=False),
            "database metrics": store.run(core.pool),
        }
        await stack.enter_async_context(ending.parts(parts))
        await ending.wait()
    ending.check()


async def processor(settings: Settings, dsn: str, announce: Announce, name: str) -> None:
    """Runs one of the stream processors; all processes of it share its records."""
    ending, life = Ending(), Life.of(settings, name)
    config = KafkaConfig.of(settings)
    async with AsyncExitStack() as stack:
        core = await stack.enter_async_context(core_of(settings, dsn, projecting=False))
        means = await stack.enter_async_context(means_of(core))
        hints, feed, metrics = Hints(dsn), KafkaTurnFeed(TURN_STREAM.name), CollectorRegistry()
        work = work_of(core, means, life.name, feed)
        sweeper, leases = Sweeper(core.log, work), PostgresLeases(core.pool)
        if name == public_topics.name:
            work.publication = await stack.enter_async_context(_publication(core, config, life))
        supplies = Supplies(work, core.log, core.records, PostgresParkedRecords(core.pool))
        slot = Slot(leases, settings.slot) if settings.slot else None
        measured = ProcessorMetrics(metrics, name).measured(DISTRIBUTED[name])
        host = FaustHost(measured, supplies, WorkerKafka(config), slot)
        watch_processor(metrics, name, lambda: host.state)
        counted = PlatformMetrics(
            metrics,
            lambda: {
                "commands": core.bus.waiting,
                "processors": host.state.pending,
                "calls": len(work.running),
                "poisoned": host.state.parked,
            },
        )

        def committed(records: Sequence[AnyRecord]) -> None:
            work.history.observe(records)
            hints.tell(records)
            counted.observe(records)

        async def ready() -> Sequence[Check]:
            state = host.state
            detail = f"{len(state.partitions)} partitions, {state.lag} records behind, {state.parked} streams parked"
            waits = f"waits for {state.waits_for}"
            return [await _database(core), Check("records", host.ready(), detail if host.ready() else waits)]

        core.bus.on_commit = committed
        hints.on_hint(core.bus.hint)
        await stack.enter_async_context(operators(settings, life, ready, metrics, announce))
        parts = {"hints": hints.run(), "heartbeat": sweeper.beat(), name: host.run()}
        if name in SWEEPING:
            parts |= {"sweeper": sweeper.run(), "turn stream": _sent(feed, config, life)}
        async with ending.parts(parts):
            quieten_collector()
            await ending.wait()
            await asyncio.gather(host.drain(), work.drain(DRAIN_S))
            await core.bus.drain()
    ending.check()


@asynccontextmanager
async def _publication(core: Core, config: KafkaConfig, life: Life) -> AsyncIterator[Publication]:
    async with kafka_publisher(lambda: open_producer(config, life.slot)) as publisher:
        events = CloudEvents(core.settings.base_url)
        yield Publication(publisher, events, core.log, core.records, utc_now)


async def _sent(feed: KafkaTurnFeed, config: KafkaConfig, life: Life) -> None:
    """Send pieces of answers until cancelled; survives any outage of the broker."""
    while True:
        try:
            async with open_producer(config, life.slot) as producer:
                await feed.send(producer)
        except (KafkaError, TimeoutError, OSError) as failure:
            log_of.info("pieces of answers wait for the broker: %r", failure)
        await asyncio.sleep(PAUSE_S)


class Working:
    """Applies the log while it has the lease."""

    def __init__(self, core: Core, config: KafkaConfig, life: Life, metrics: ProjectionMetrics) -> None:
        self._config, self._life = config, life
        self._runner = Runner(core.pool, deadline, core.log, core.records, metrics=metrics)
        self.epoch: int | None = None

    async def run(self, leases: PostgresLeases) -> None:
        """Take the lease whenever it is free, and work for as long as it is held; until cancelled."""
        runner: asyncio.Task[None] | None = None
        try:
            while True:
                try:
                    async with asyncio.timeout(LEASE_S / 2):
                        self.epoch = await leases.acquire(
                            PROJECTOR_LEASE, self._life.name, LEASE_S, from_earlier_life=True
                        )
                except (LogUnavailable, TimeoutError) as failure:
                    # Whoever takes over notices at the checkpoints what this one has done.
                    log_of.warning("the projector's lease was not renewed: %s", failure)
                if self.epoch is None and runner is not None:
                    log_of.warning("another projector has taken over; standing by")
                    await _ended(runner)
                    runner = None
                elif self.epoch is not None and runner is None:
                    runner = asyncio.create_task(self._work(), name="projections")
                if runner is not None and runner.done():
                    runner.result()
                await asyncio.sleep(RENEW_S)
        finally:
            if runner is not None:
                await _ended(runner)
            if self.epoch is not None:
                async with asyncio.timeout(RENEW_S):
                    await leases.release(PROJECTOR_LEASE, self._life.name)

    def hurry(self) -> None:
        """Somebody waits for the read models."""
        self._runner.hurry()

    def check(self) -> Check:
        """What this projector does."""
        if self.epoch is None:
            return Check("projector", True, "stands by")
        behind = max(self._runner.lag().values(), default=0)
        return Check("projector", True, f"at work, {behind} events behind")

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._runner.run())
            group.create_task(follow_topic(self._config, self._life.slot, LOG.name, self._take))

    async def _take(self, values: Sequence[bytes]) -> None:
        rows = []
        for value in values:
            try:
                rows.append(wire.unpack(value))
            except wire.UnknownFormat as unknown:
                log_of.warning("the projector reads from the log what it cannot from its topic: %s", unknown)
        await self._runner.offer_rows(rows)


@asynccontextmanager
async def operators(
    settings: Settings, life: Life, ready: Ready, metrics: CollectorRegistry, announce: Announce
) -> AsyncIterator[None]:
    """The pages of a worker process, while the block runs."""
    watch_process(metrics, life.role)
    with listening(settings.worker_host, settings.worker_port, "OSHAANI_WORKER_PORT") as listener:
        app = worker_app(life.role, life.slot, ready, metrics, settings.metrics_token)
        async with http(app, listener):
            host, port = listener.getsockname()[:2]
            announce(f"{life.slot} works; /readyz and /metrics at http://{host}:{port}")
            yield


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,), timeout=RENEW_S)


async def _database(core: Core) -> Check:
    try:
        await core.log.heads()
    except LogUnavailable as failure:
        return Check("database", False, str(failure))
    return Check("database", True)


async def _serves(core: Core) -> Sequence[Check]:
    """Whether an API process can answer: the database, and read models that some projector keeps."""
    try:
        behind = await CheckpointWatch(core.pool, deadline).behind(await core.log.heads())
    except (LogUnavailable, psycopg.Error, PoolTimeout, OSError) as failure:
        return [Check("database", False, str(failure))]
    if behind is None:
        return [
            Check("database", True),
            Check("read models", False, "not built yet; a projector builds them"),
        ]
    return [Check("database", True), Check("read models", behind <= LAG_MAX, f"{behind} events behind")]
