"""A process that appends to the event log from several tasks at once, and fails on purpose now and then.

Prints one line for each batch that was accepted: its command id.
"""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID, uuid4

from adapters.postgres.event_log import PostgresEventLog
from domain.event_log import Batch, CommandSeen, HeadMoved
from domain.ids import shard_of
from tests.peers.log_rows import served, stored

EVENTS_PER_BATCH_MAX = 3
FAILING_ONE_IN = 10


async def write(dsn: str, tenant_id: UUID, batch_count: int) -> None:
    """Append `batch_count` batches to one stream of the tenant, one of ten spoilt so that it must be undone."""
    log = PostgresEventLog(dsn)
    await log.open()
    stream_id, version, shard, seen_id = uuid4(), 0, shard_of(tenant_id), uuid4()
    head = (await log.heads())[shard]
    written = 0
    while written < batch_count:
        count = written % EVENTS_PER_BATCH_MAX + 1
        spoilt = written and uuid4().int % FAILING_ONE_IN == 0
        command_id = seen_id if spoilt else uuid4()
        events = [
            stored(tenant_id, head + n, stream_id, version + n, command_id=command_id)
            for n in range(1, count + 1)
        ]
        batch = Batch({shard: head}, events, [served(tenant_id, command_id)])
        # Nobody else writes this stream: every other batch may follow on what others were faster with.
        batch.based_on = [stream_id] if written % 2 else None
        try:
            await log.append(batch)
        except HeadMoved:
            head = (await log.heads())[shard]
        except CommandSeen:
            assert spoilt
        else:
            assert not spoilt
            print(command_id, flush=True)  # noqa: T201 - how the test hears of it
            head = batch.heads[shard] + count
            version, written, seen_id = version + count, written + 1, command_id
    await log.close()


async def main(dsn: str, writer_count: str, batch_count: str, *tenant_ids: str) -> None:
    """Run the writers, each with connections of its own, spread over the tenants."""
    tenants = [UUID(tenant_ids[n % len(tenant_ids)]) for n in range(int(writer_count))]
    await asyncio.gather(*(write(dsn, tenant_id, int(batch_count)) for tenant_id in tenants))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
