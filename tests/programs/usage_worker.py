"""A worker that watches usage, to be killed: `python usage_worker.py host:port work-topic group dead-letters changelog`.

It prints a line for each row that it keeps, before that is durable.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.memory.event_log import MemoryEventLog
from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.leases import MemoryLeases
from adapters.memory.object_store import MemoryObjectStore
from adapters.memory.parked_records import MemoryParkedRecords
from adapters.memory.publisher import MemoryPublisher
from domain.ports import Publisher
from schemas.cloud_events import CloudEvents
from schemas.records import Records
from stream_processors.analytics_app import AnalyticsHost
from stream_processors.faust_app import Names
from stream_processors.publication import Publication
from stream_processors.runner import Supplies
from stream_processors.slot import Slot
from stream_processors.usage_analytics import usage_analytics


class TellingHost(AnalyticsHost):
    """Says what it does."""

    def put(self, shard: int, key: bytes, value: bytes | None) -> Awaitable[None]:
        sys.stdout.write("kept\n")
        sys.stdout.flush()
        return super().put(shard, key, value)


def usage_host(
    servers: str, names: Names, changelog: str, publisher: Publisher, told: bool = False
) -> AnalyticsHost:
    """A host with nothing behind it but a broker; the same worker each time, so that nobody waits for the old one."""
    log, records = MemoryEventLog(), Records(MemoryKeyRing(), MemoryObjectStore())
    publication = Publication(
        publisher, CloudEvents("https://agents.example"), log, records, lambda: datetime.now(UTC)
    )
    work: Any = SimpleNamespace(publication=publication, usage_rows=None)
    host = (TellingHost if told else AnalyticsHost)(
        usage_analytics,
        Supplies(work, log, records, MemoryParkedRecords()),
        WorkerKafka(KafkaConfig.at(servers)),
        Slot(MemoryLeases(), "usage-0"),
        names=names,
    )
    host.changelog = changelog
    return host


if __name__ == "__main__":
    servers, topic, group, letters, changelog = sys.argv[1:]
    asyncio.run(
        usage_host(servers, Names(topic, group, letters), changelog, MemoryPublisher(), told=True).run()
    )
