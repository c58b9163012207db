"""`oshaani relay`: from the log to Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.relay import Relay, RelayOptions
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.pool import open_pool
from adapters.postgres.server_secret import server_secret
from api.server import Check
from oshaani.master_key import master_key
from oshaani.process import Ending
from oshaani.role_metrics import LogHeads, watch_relay
from oshaani.roles.life import DRAIN_S, Announce, Life, operators
from oshaani.roles.processor import DISTRIBUTED, GATHER_MS
from oshaani.settings import Settings
from oshaani.wiring import hints_of, open_log, secret_of
from schemas.codec import type_of
from schemas.topics import work_topic


async def relay(settings: Settings, dsn: str, announce: Announce) -> None:
    """Carries the log to Kafka. Relays share the shards; what a dead one served is taken over."""
    ending, life = Ending(), Life.of(settings, "relay")
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(dsn, 2))
        log = await stack.enter_async_context(open_log(dsn))
        root = await server_secret(pool, master_key(settings), settings.previous_master_keys)
        hints = hints_of(dsn, secret_of(root))
        options = RelayOptions(gather_s={work_topic(name).name: ms / 1000 for name, ms in GATHER_MS.items()})
        carrying = Relay(
            log, PostgresLeases(pool), KafkaConfig.of(settings), life.name, work_types(), options
        )
        hints.on_hint(lambda hint: carrying.wake(hint.rows))
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
        async with ending.parts(
            {"hints": hints.run(sends=False), "relay": carrying.run(), "heads": heads.run()}
        ):
            await ending.wait()
            await carrying.drain(DRAIN_S)
    ending.check()


def work_types() -> dict[str, frozenset[str]]:
    """By work topic, the types of the events that its processor handles."""
    return {
        work_topic(name).name: frozenset(type_of(event_class).name for event_class in each.handlers)
        for name, each in DISTRIBUTED.items()
    }
