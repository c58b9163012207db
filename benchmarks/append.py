"""Commands through the bus beside bare INSERTs of a row of the same size, 32 writers each, on the same Postgres.

    python -m benchmarks.append [--seconds S] [--rounds R]

A command here is the smallest there is (a plan changed: one aggregate loaded from memory, decided, one event, one
command row, positions and heads proved); an INSERT is one prepared statement in autocommit on a connection of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import uvloop

from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from adapters.postgres.embedded import embedded_postgres
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.pool import connect
from benchmarks.processes import machine_load
from commands.bus import Bus
from commands.command import Rules
from commands.credit_account import ChangePlan
from commands.user import LogIn, RegisterUser
from domain.ids import UserId
from schemas.records import Records

WRITERS = 32
ROW = b"x" * 250
FLOOR = """
    CREATE TABLE IF NOT EXISTS floor (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, stream uuid, version integer, payload bytea,
        at timestamptz DEFAULT clock_timestamp()
    )
"""


async def per_second(seconds: float, writer: Callable[[int], Awaitable[None]]) -> float:
    """How often `writer(n)` returns in a second, called in a loop by each of the writers."""
    until, count = time.perf_counter() + seconds, 0

    async def loop(number: int) -> None:
        nonlocal count
        while time.perf_counter() < until:
            await writer(number)
            count += 1

    await asyncio.gather(*(loop(number) for number in range(WRITERS)))
    return count / seconds


async def measure(seconds: float, rounds: int) -> None:
    """Alternate floor and product; print each round and the ratio of the medians."""
    with tempfile.TemporaryDirectory(prefix="oshaani-bench-") as folder:
        Path(folder).chmod(0o755)
        async with embedded_postgres(Path(folder) / "data") as dsn:
            log = PostgresEventLog(dsn)
            await log.migrate()
            await log.open()
            bus = Bus(log, Records(MemoryKeyRing(), MemoryObjectStore()), Rules())
            tenants = [UserId(uuid4()) for _ in range(WRITERS)]
            for tenant in tenants:
                await bus.execute(RegisterUser(tenant_id=tenant, email="a@b.example", name="A"), by="bench")
                await bus.execute(LogIn(tenant_id=tenant), by="bench")
            connections = [await connect(dsn) for _ in range(WRITERS)]
            await connections[0].execute(FLOOR)
            plans = ["free"] * WRITERS

            async def insert(number: int) -> None:
                statement = "INSERT INTO floor (stream, version, payload) VALUES (%b, %b, %b)"
                await connections[number].execute(statement, (tenants[number], 1, ROW))

            async def command(number: int) -> None:
                plans[number] = "payg" if plans[number] == "free" else "free"
                await bus.execute(ChangePlan(tenant_id=tenants[number], plan=plans[number]), by="bench")

            found: dict[str, list[float]] = {"bare insert": [], "command": []}
            for _ in range(rounds):
                for name, writer in (("bare insert", insert), ("command", command)):
                    found[name].append(await per_second(seconds, writer))
                    print(f"{name:12} {found[name][-1]:8.0f}/s  load {machine_load()}", flush=True)  # noqa: T201
            medians = {name: round(statistics.median(values)) for name, values in found.items()}
            ratio = round(medians["command"] / medians["bare insert"], 2)
            print(json.dumps({"medians_per_s": medians, "ratio": ratio, "load": machine_load()}))  # noqa: T201
            for connection in connections:
                await connection.close()
            await log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    uvloop.run(measure(options.seconds, options.rounds))


if __name__ == "__main__":
    main()
