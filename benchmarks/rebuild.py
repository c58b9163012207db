"""Read models built anew from the log beside the floor: the event table copied out and in again through Python.

    python -m benchmarks.rebuild [--turns N] [--rounds R]

Both in events of the whole log per second. The floor decodes nothing: COPY of every column out, COPY into a table with
the same primary key. A rebuild reads what its projection handles, decodes it, folds it, writes its tables, their
primary keys and indexes, and swaps them in. Projections are built one at a time; "all" builds the nine in one pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import uvloop

from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from adapters.postgres.embedded import embedded_postgres
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.pool import connect, deadline, open_pool
from benchmarks.processes import machine_load
from commands.agent import CreateAgent
from commands.bus import Bus
from commands.command import Rules
from commands.credit_account import SettleHold
from commands.turn import CompleteModelCall, ModelCallPlan, SendMessage, StartModelCall
from commands.user import LogIn, RegisterUser
from domain.credit_account import ChargeLine, Origin
from domain.ids import ConversationId, TurnId, UserId, agent_of, hold_of
from domain.money import ncr
from domain.plans import METERS
from domain.ports import TokenUsage
from domain.prices import MESSAGE, RATE_CARDS
from domain.turn import AskModel, call_of
from projections.catalogue import PROJECTIONS
from projections.checkpoints import migrate
from projections.read_side import Pool
from projections.rebuild import rebuild
from schemas.records import Records

TENANTS = 64
ANSWER = "The answer is in the second paragraph of the document that you gave me. " * 4
RULES = Rules(plans={"free": dict.fromkeys(METERS)}, free_credits_ncr=ncr("9000000"))


async def converse(bus: Bus, number: int, turn_count: int) -> None:
    """A tenant, its agent, and its turns: the commands of the product, without a model."""
    tenant, agent_id = UserId(uuid4()), agent_of(number)
    await bus.execute(RegisterUser(tenant_id=tenant, email=f"{number}@b.example", name="A"), by="bench")
    await bus.execute(LogIn(tenant_id=tenant), by="bench")
    await bus.execute(CreateAgent(tenant_id=tenant, number=number, name="A"), by="bench")
    conversation_id = ConversationId(uuid4())
    card = RATE_CARDS[0]
    line = ChargeLine(MESSAGE, 1, card.price_ncr(MESSAGE), card.rate_card_id)
    for n in range(turn_count):
        turn_id = TurnId(uuid4())
        await bus.execute(
            SendMessage(
                tenant_id=tenant,
                turn_id=turn_id,
                conversation_id=conversation_id,
                beginning="existing" if n else "new",
                name=None,
                agent_id=agent_id,
                content=f"What does the document say about number {n}?",
                channel="api",
                mode="async",
                meter=MESSAGE,
                by_owner=True,
            ),
            by=f"user:{tenant}",
        )
        await bus.execute(
            StartModelCall(
                tenant_id=tenant,
                turn_id=turn_id,
                action=AskModel(1, 1, True, None),
                plan=ModelCallPlan(
                    provider="offline",
                    model="extractive",
                    worker="w/1",
                    deadline_at=RATE_CARDS[0].effective_from,
                    history_versions=(1, 2),
                    history_count=1,
                    prompt_digest="p",
                    tools_offered=(),
                    with_tools=True,
                ),
            ),
            by="worker:w",
        )
        await bus.execute(
            CompleteModelCall(
                tenant_id=tenant,
                turn_id=turn_id,
                call_id=call_of(turn_id, 1),
                attempt=1,
                text=ANSWER,
                finish_reason="stop",
                asked=(),
                usage=TokenUsage(900, 80),
                latency_ms=300,
                ttft_ms=40,
            ),
            by="worker:w",
        )
        origin = Origin(agent_id=agent_id, turn_id=turn_id, actor=f"user:{tenant}")
        settle = SettleHold(tenant_id=tenant, hold_id=hold_of(turn_id), lines=[line], origin=origin)
        await bus.execute(settle, by="worker:credits")


async def floor_s(dsn: str) -> float:
    """Seconds to copy the event table out and in."""
    reader, writer = await connect(dsn), await connect(dsn)
    try:
        await writer.execute("DROP TABLE IF EXISTS floor")
        await writer.execute("CREATE TABLE floor (LIKE event, PRIMARY KEY (shard, position))")
        began = time.perf_counter()
        async with (
            reader.cursor().copy("COPY event TO STDOUT (FORMAT binary)") as out,
            writer.cursor().copy("COPY floor FROM STDIN (FORMAT binary)") as into,
        ):
            async for chunk in out:
                await into.write(chunk)
        return time.perf_counter() - began
    finally:
        await reader.close()
        await writer.close()


async def rebuild_s(pool: Pool, records: Records, names: set[str]) -> float:
    """Seconds to build projections anew."""
    began = time.perf_counter()
    await rebuild(pool, deadline, records, [each for each in PROJECTIONS if each.name in names])
    return time.perf_counter() - began


async def measure(turn_count: int, rounds: int) -> None:
    """Fill a log, then alternate floor and rebuilds; print the medians of the ratios."""
    with tempfile.TemporaryDirectory(prefix="oshaani-bench-") as folder:
        Path(folder).chmod(0o755)
        async with embedded_postgres(Path(folder) / "data") as dsn, open_pool(dsn, 4) as pool:
            log, records = PostgresEventLog(dsn), Records(MemoryKeyRing(), MemoryObjectStore())
            await log.migrate()
            await log.open()
            bus = Bus(log, records, RULES)
            each = turn_count // TENANTS
            await asyncio.gather(*(converse(bus, 1 + number, each) for number in range(TENANTS)))
            events = sum((await log.heads()).values())
            async with pool.connection() as connection:
                await migrate(connection)
                await connection.execute("VACUUM ANALYZE event")
            groups = {projection.name: {projection.name} for projection in PROJECTIONS}
            groups["all"] = set(groups)
            rates: dict[str, list[float]] = {name: [] for name in groups}
            ratios: dict[str, list[float]] = {name: [] for name in groups}
            for _ in range(rounds):
                for name, names in groups.items():
                    floor = events / await floor_s(dsn)
                    rates[name].append(events / await rebuild_s(pool, records, names))
                    ratios[name].append(rates[name][-1] / floor)
                print({name: round(found[-1], 2) for name, found in ratios.items()}, flush=True)  # noqa: T201
            summary = {
                "events": events,
                "events_per_s": {name: round(statistics.median(found)) for name, found in rates.items()},
                "ratio": {name: round(statistics.median(found), 2) for name, found in ratios.items()},
                "load": machine_load(),
            }
            print(json.dumps(summary))  # noqa: T201
            await log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    uvloop.run(measure(options.turns, options.rounds))


if __name__ == "__main__":
    main()
