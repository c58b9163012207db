"""A relay in a process of its own, which may be told where to die.

python -m tests.programs.relay DSN SERVERS HOLDER FIREHOSE TTL_S [POINT VISIT]
"""

from __future__ import annotations

import asyncio
import sys

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.relay import Relay, RelayOptions
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.pool import open_pool
from domain import crash_points


async def main(dsn: str, servers: str, holder: str, firehose: str, ttl_s: str) -> None:
    """Relay until killed."""
    log = PostgresEventLog(dsn)
    await log.open()
    async with open_pool(dsn, 2) as pool:
        options = RelayOptions(firehose=firehose, ttl_s=float(ttl_s))
        await Relay(log, PostgresLeases(pool), KafkaConfig.at(servers), holder, {}, options).run()


if __name__ == "__main__":
    if sys.argv[6:]:
        crash_points.arm(sys.argv[6], int(sys.argv[7]))
    asyncio.run(main(*sys.argv[1:6]))
