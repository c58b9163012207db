"""The host of the processor that watches usage: the base app with one Faust table.

The table is kept in memory. Its changelog is a topic of ours, made like all others by `oshaani topics apply`; Faust reads
it to the end before it delivers the first record of a partition that a worker has been given. Many records change the
same few rows: a row is written once for all that changed it within `GATHER_S`, and each of them waits for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from schemas.topics import USAGE_TABLE
from stream_processors.faust_app import FaustHost, Kafka, Names
from stream_processors.processor import Processor
from stream_processors.runner import Supplies
from stream_processors.slot import Slot

TABLE = "usage"
GATHER_S = 0.2


class AnalyticsHost(FaustHost):
    """Implements `stream_processors.processor.UsageRows` for `usage_analytics`, which it hosts."""

    changelog = USAGE_TABLE.name

    def __init__(
        self,
        processor: Processor,
        supplies: Supplies,
        kafka: Kafka,
        slot: Slot | None = None,
        names: Names | None = None,
    ) -> None:
        super().__init__(processor, supplies, kafka, slot, names)
        self._table: Any = None
        self._changed: dict[bytes, int] = {}  # rows that are to be written, and their shards
        self._writing: asyncio.Task[None] | None = None  # those, together
        supplies.work.usage_rows = self

    def get(self, key: bytes) -> bytes | None:
        """As in `UsageRows`; only rows of this worker's partitions are known."""
        found = self._table.data.get(key)
        return None if found is None else bytes(found)

    def put(self, shard: int, key: bytes, value: bytes | None) -> Awaitable[None]:
        """As in `UsageRows`. Not by item assignment, which wants to be inside Faust's own loop over the stream."""
        if value is None:
            self._table.data.pop(key, None)
        else:
            self._table.data[key] = value
        self._changed[key] = shard
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return self._writing

    async def _write(self) -> None:
        await asyncio.sleep(GATHER_S)
        changed, self._changed, self._writing = self._changed, {}, None
        sent = [
            self._table.send_changelog(
                self._partition_of(shard), key, self._table.data.get(key), value_serializer="raw"
            )
            for key, shard in changed.items()
        ]
        await asyncio.gather(*sent)

    def _new_app(self) -> Any:
        app = super()._new_app()
        changelog = app.topic(self.changelog, key_type=bytes, value_type=bytes)
        self._table = app.Table(
            TABLE,
            key_type=bytes,
            value_type=bytes,
            partitions=self._partitions,
            changelog_topic=changelog,
        )
        return app
