"""`oshaani processor NAME`: one of the stream processors under Faust."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry

from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.kafka.publisher import kafka_publisher
from adapters.kafka.turn_feed import KafkaTurnFeed
from adapters.postgres.hints import Hints
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.parked_records import PostgresParkedRecords
from api.server import Check
from oshaani.metrics import PlatformMetrics
from oshaani.process import Ending, quieten_collector, step_back
from oshaani.role_metrics import ProcessorMetrics, watch_processor
from oshaani.roles.life import DRAIN_S, Announce, Life, database_answers, operators
from oshaani.settings import Settings
from oshaani.wiring import PROCESSORS, Core, core_of, hints_of, means_of, utc_now, work_of
from schemas.cloud_events import CloudEvents
from schemas.hints import Serving
from schemas.records import AnyRecord
from schemas.topics import TURN_STREAM
from stream_processors.agent_turns import agent_turns
from stream_processors.analytics_app import AnalyticsHost
from stream_processors.eager import Eager
from stream_processors.faust_app import FaustHost
from stream_processors.processor import Work
from stream_processors.public_topics import public_topics
from stream_processors.publication import Publication
from stream_processors.runner import Supplies
from stream_processors.slot import Slot
from stream_processors.sweeper import Sweeper
from stream_processors.usage_analytics import usage_analytics

log_of = logging.getLogger(__name__)

PAUSE_S = 1.0
DISTRIBUTED = {each.name: each for each in (*PROCESSORS, public_topics, usage_analytics)}
PUBLISHING = (public_topics.name, usage_analytics.name)
SWEEPING = ("agent_turns", "tool_calls", "notifications")  # those that take up due work


# Those whose work nobody waits for get records together: the relay lets them wait so long for company.
GATHER_MS = {
    "agent_turns": 250,  # a hint came before
    "credit_debits": 100,
    "notifications": 250,
    "public_topics": 500,
    "usage_analytics": 500,
}

# Faust tells of each of its parts that begins and ends under the name of the module that derives from it.
TALKATIVE = ("stream_processors.faust_app", "adapters.kafka.faust_consumer")


async def processor(settings: Settings, dsn: str, announce: Announce, name: str) -> None:
    """Runs one of the stream processors; all processes of it share its records."""
    for module in TALKATIVE:
        logging.getLogger(module).setLevel(logging.WARNING)
    ending, life = Ending(), Life.of(settings, name)
    config = KafkaConfig.of(settings)
    async with AsyncExitStack() as stack:
        core = await stack.enter_async_context(core_of(settings, dsn, projecting=False))
        means = await stack.enter_async_context(means_of(core))
        hints, feed, metrics = (
            hints_of(dsn, core.secret),
            KafkaTurnFeed(TURN_STREAM.name),
            CollectorRegistry(),
        )
        work = work_of(core, means, life.name, feed)
        sweeper, leases = Sweeper(core.log, work), PostgresLeases(core.pool)
        if name in PUBLISHING:
            work.publication = await stack.enter_async_context(_publication(core, config, life))
        supplies = Supplies(work, core.log, core.records, PostgresParkedRecords(core.pool))
        slot = Slot(leases, settings.slot) if settings.slot else None
        measured = ProcessorMetrics(metrics, name).measured(DISTRIBUTED[name])
        host_class = AnalyticsHost if name == usage_analytics.name else FaustHost
        host = host_class(measured, supplies, WorkerKafka(config), slot)
        host.on_grown = core.bus.hint
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
            counted.observe(records)

        async def ready() -> Sequence[Check]:
            state = host.state
            detail = f"{len(state.partitions)} partitions, {state.lag} records behind, {state.parked} streams parked"
            waits = f"waits for {state.waits_for}"
            return [
                await database_answers(core),
                Check("records", host.ready(), detail if host.ready() else waits),
            ]

        core.bus.on_commit, core.bus.on_append = committed, hints.tell
        core.bus.on_loaded = work.history.loaded
        _listen(hints, name, host, work)
        await stack.enter_async_context(operators(settings, life, ready, metrics, announce))
        parts = {"hints": hints.run(), "heartbeat": sweeper.beat(), name: host.run()}
        if name in SWEEPING:
            parts |= {"sweeper": sweeper.run(), "turn stream": _sent(feed, config, life)}
        async with ending.parts(parts):
            _settle(name)
            await ending.wait()
            await _drain(host, work, hints)
    ending.check()


async def _drain(host: FaustHost, work: Work, hints: Hints) -> None:
    draining = asyncio.gather(host.drain(), work.drain(DRAIN_S))
    await asyncio.sleep(0)
    hints.wake()  # nothing more is served here
    await draining
    await work.bus.drain()


def _settle(name: str) -> None:
    """All has begun, and takes its course."""
    quieten_collector()
    if name in PUBLISHING:
        step_back()


def _listen(hints: Hints, name: str, host: FaustHost, work: Work) -> None:
    """Have those told who gain by it: each listener is woken by every commit."""
    if name == agent_turns.name:
        hints.on_hint(Eager(host.serves, work).hear)
        hints.announce(lambda: Serving(work.worker, host.shards))


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
