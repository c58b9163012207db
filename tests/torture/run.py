"""`make torture`: three workers on a real broker, killed and stopped all the time; prints one line of JSON.

python -m tests.torture.run --records 100000 --seconds 150
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID, uuid4

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from adapters.kafka.broker import KafkaServer
from adapters.kafka.clients import KafkaConfig, open_consumer, open_producer
from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from adapters.postgres.embedded import PostgresServer
from adapters.postgres.event_log import PostgresEventLog, run_script
from adapters.postgres.pool import open_pool
from commands.bus import Bus
from domain.event_log import StoredEvent
from domain.ids import shard_of
from oshaani.wiring import migrate
from schemas import wire
from schemas.records import Records
from schemas.topics import PRIVATE_PARTITIONS, partition_of
from stream_processors.faust_app import Names
from tests.commands.write_side import Owner, account, rules, signed_up
from tests.torture.effects import TABLES, effects_so_far, found, workers_so_far
from tests.torture.worker import BONUS_EVERY, BONUS_NCR, VARIABLE

STREAMS = 400
OWNERS = 8
SLOTS = ("torture-0", "torture-1", "torture-2")
DWELL_S, TRICKLE_S = 1.0, 0.02
START_S, STOP_S, STALL_S = 60.0, 20.0, 60.0
"""How long a worker may take to begin, a stopped one to end, and how long nothing may happen."""
ROOT = Path(__file__).parents[2]
EVENT = "CreditAccount.PlanChanged"


@dataclass
class Outcome:
    """What came of it. `doubled`: effects behind a fence that happened twice; `redelivered`: handled more than once."""

    records: int
    kills: int = 0
    terms: int = 0
    lost: int = 0
    out_of_order: int = 0
    doubled: int = 0
    redelivered: int = 0
    bonus_missing_ncr: int = 0
    uncommitted: int = 0
    crashes: int = 0
    exits: dict[str, int] = field(default_factory=dict)
    end_s_max: float = 0.0  # of a signal until the process was gone
    back_s: float = 0.0  # from the start of a process to its first effect, the median
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        wrong = (self.lost, self.out_of_order, self.doubled, self.bonus_missing_ncr, self.uncommitted)
        # A process that is told to end before Python has read it all ends as any program does.
        return not any(wrong) and not self.crashes and set(self.exits) <= {"TERM 0", "TERM -15", "KILL -9"}


@dataclass
class Workers:
    """The processes, one for each slot, started again whenever one ends."""

    told: dict[str, Any]
    folder: Path
    outcome: Outcome
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    began_at: dict[str, datetime] = field(default_factory=dict)
    meant: set[int] = field(default_factory=set)  # processes that we ended

    async def start(self, slot: str) -> None:
        told = json.dumps({**self.told, "slot": slot})
        began_at = datetime.now(UTC)
        output = (self.folder / f"{slot}.log").open("ab")
        self.running[slot] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.torture.worker",
            cwd=ROOT,
            env={**os.environ, VARIABLE: told},
            stdout=output,
            stderr=output,
        )
        output.close()
        self.began_at[f"{slot}/{self.running[slot].pid}"] = began_at

    async def at_work(self, pool: Any) -> list[str]:
        """The workers whose present life has handled something."""
        known = await workers_so_far(pool)
        return [slot for slot, process in self.running.items() if f"{slot}/{process.pid}" in known]

    async def end(self, slot: str, number: signal.Signals) -> None:
        """Send a signal, and wait for the end."""
        process = self.running.pop(slot)
        if process.returncode is not None:
            self._crashed(process)
            return
        process.send_signal(number)
        try:
            async with asyncio.timeout(STOP_S):
                code = await process.wait()
        except TimeoutError:
            code = 999
            process.kill()
            await process.wait()
        exits = self.outcome.exits
        key = f"{number.name.removeprefix('SIG')} {code}"
        exits[key] = exits.get(key, 0) + 1

    def kill(self) -> None:
        """End whoever still runs."""
        for process in self.running.values():
            if process.returncode is None:
                process.kill()

    async def restart_crashed(self) -> None:
        for slot, process in list(self.running.items()):
            if process.returncode is not None:
                self._crashed(process)
                await self.start(slot)

    def _crashed(self, process: asyncio.subprocess.Process) -> None:
        self.outcome.crashes += 1
        key = f"crash {process.returncode}"
        self.outcome.exits[key] = self.outcome.exits.get(key, 0) + 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How much, for how long, and how often a worker is ended in that time."""

    records: int
    seconds: float
    kills: int
    terms: int
    seed: int

    def released(self, ends: int) -> int:
        """How many records come at full pace after so many ends, so that there is something to do until the last."""
        return self.records * (ends + 1) // (self.kills + self.terms + 1)


async def torture(plan: Plan, dsn: str, servers: str, folder: Path) -> Outcome:
    """Do it. `dsn` is of an empty database; the broker gets topics of a new name."""
    began = time.monotonic()
    outcome, chance = Outcome(plan.records), random.Random(plan.seed)
    await migrate(dsn)
    await run_script(dsn, TABLES)
    names = await _make_topics(servers)
    log = PostgresEventLog(dsn)
    await log.open()
    owners = [await signed_up(_bus(log)) for _ in range(OWNERS)]
    had_ncr = await _credits_ncr(log, owners)
    streams = [(uuid4(), uuid4()) for _ in range(STREAMS)]
    told = {
        "dsn": dsn,
        "servers": servers,
        "names": asdict(names),
        "streams": [str(stream_id) for _, stream_id in streams],
        "owners": [str(owner.tenant_id) for owner in owners],
    }
    workers = Workers(told, folder, outcome)
    try:
        for slot in SLOTS:
            await workers.start(slot)
        feeding = asyncio.create_task(_feed(plan, chance, outcome, Target(servers, names.topic, streams)))
        async with open_pool(dsn, 2) as pool:
            await _harm(plan, chance, workers, pool)
            sent = await feeding
            await _finished(plan.records, pool, workers)
            for slot in list(workers.running):
                await workers.end(slot, signal.SIGTERM)
            await _judge(workers, pool)
    finally:
        workers.kill()
    bonuses = sum(count // BONUS_EVERY for count in sent.values())
    outcome.bonus_missing_ncr = bonuses * BONUS_NCR - (await _credits_ncr(log, owners) - had_ncr)
    outcome.uncommitted = await _uncommitted(servers, names)
    outcome.seconds = round(time.monotonic() - began, 1)
    await log.close()
    return outcome


async def _judge(workers: Workers, pool: Any) -> None:
    outcome, result = workers.outcome, await found(pool)
    firsts = await workers_so_far(pool)
    backs_s = [(at - workers.began_at[worker]).total_seconds() for worker, at in firsts.items()]
    outcome.back_s = round(median(backs_s), 2) if backs_s else 0.0
    outcome.lost = outcome.records - result.effects
    outcome.out_of_order = result.out_of_order
    outcome.doubled = result.counted - result.effects
    outcome.redelivered = result.delivered - result.counted


def _bus(log: PostgresEventLog) -> Bus:
    return Bus(log, Records(MemoryKeyRing(), MemoryObjectStore()), rules())


async def _credits_ncr(log: PostgresEventLog, owners: Sequence[Owner]) -> int:
    bus = _bus(log)
    return sum([(await account(bus, owner)).available_ncr for owner in owners])


@dataclass(frozen=True, slots=True)
class Target:
    """Where the records go; each stream is a tenant and an id."""

    servers: str
    topic: str
    streams: Sequence[tuple[UUID, UUID]]


async def _feed(plan: Plan, chance: random.Random, outcome: Outcome, target: Target) -> Counter[int]:
    """Write the records at the pace of the time and of the ends; how many of each stream."""
    sent: Counter[int] = Counter()
    positions: Counter[int] = Counter()
    began = time.monotonic()
    async with open_producer(KafkaConfig.at(target.servers), "torture", linger_ms=5) as producer:
        for n in range(plan.records):
            number = chance.randrange(STREAMS)
            sent[number] += 1
            tenant_id, stream_id = target.streams[number]
            shard = shard_of(tenant_id)
            positions[shard] += 1
            row = StoredEvent(
                shard=shard,
                position=positions[shard],
                tenant_id=tenant_id,
                stream_id=stream_id,
                stream_version=sent[number],
                type=EVENT,
                schema_version=1,
                payload=b'{"plan":"starter"}',
                personal=None,
                subject_id=None,
                command_id=UUID(int=n),
                correlation_id=UUID(int=n),
                causation_id=None,
                actor="system:torture",
                traceparent=None,
                recorded_at=datetime.now(UTC),
            )
            partition = partition_of(shard, PRIVATE_PARTITIONS)
            await producer.send(target.topic, wire.pack(row), row.stream_id.bytes, partition)
            if n >= plan.released(outcome.kills + outcome.terms):
                # A trickle, by which a worker is seen to be at work.
                await asyncio.sleep(TRICKLE_S)
            ahead_s = n / plan.records * plan.seconds - (time.monotonic() - began)
            if ahead_s > 0.01:
                await asyncio.sleep(ahead_s)
    return sent


async def _harm(plan: Plan, chance: random.Random, workers: Workers, pool: Any) -> None:
    """End workers, one after the other, evenly over the time; each is started again at once."""
    ends = [signal.SIGKILL] * plan.kills + [signal.SIGTERM] * plan.terms
    chance.shuffle(ends)
    began = time.monotonic()
    for n, number in enumerate(ends, 1):
        await asyncio.sleep(max(0.0, began + n * plan.seconds / (len(ends) + 1) - time.monotonic()))
        slot = chance.choice(await _at_work(workers, pool))
        await asyncio.sleep(chance.uniform(0.0, DWELL_S))
        at_s = time.monotonic()
        await workers.end(slot, number)
        workers.outcome.end_s_max = max(workers.outcome.end_s_max, round(time.monotonic() - at_s, 2))
        await workers.start(slot)
        if number == signal.SIGKILL:
            workers.outcome.kills += 1
        else:
            workers.outcome.terms += 1


async def _at_work(workers: Workers, pool: Any) -> list[str]:
    """Workers that have something to lose, once most of them have; any, when they do not begin."""
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s:
        await workers.restart_crashed()
        if len(at_work := await workers.at_work(pool)) > len(SLOTS) // 2:
            return at_work
        await asyncio.sleep(0.1)
    return list(SLOTS)


async def _finished(records: int, pool: Any, workers: Workers) -> None:
    """Wait for all effects, for as long as there are more; what is missing then shows in the outcome."""
    so_far, moved_s = -1, time.monotonic()
    while so_far < records and time.monotonic() - moved_s < STALL_S:
        now = await effects_so_far(pool)
        if now > so_far:
            so_far, moved_s = now, time.monotonic()
        await asyncio.sleep(0.25)
        await workers.restart_crashed()


async def _make_topics(servers: str) -> Names:
    prefix = f"torture-{uuid4().hex[:8]}"
    names = Names(f"{prefix}.work", f"{prefix}.group", f"{prefix}.dlq")
    partitions = {names.topic: PRIVATE_PARTITIONS, names.dead_letters: 1}
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, count, 1) for name, count in partitions.items()])
    finally:
        await admin.close()
    return names


async def _uncommitted(servers: str, names: Names) -> int:
    """Records that the group would be delivered again."""
    partitions = [TopicPartition(names.topic, each) for each in range(PRIVATE_PARTITIONS)]
    async with open_consumer(KafkaConfig.at(servers), "torture-check", group_id=names.group) as consumer:
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        return sum([ends[each] - (await consumer.committed(each) or 0) for each in partitions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--terms", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    chosen = parser.parse_args()
    plan = Plan(chosen.records, chosen.seconds, chosen.kills, chosen.terms, chosen.seed)
    # As Ctrl-C does: the servers and workers end with us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oshaani-torture-")))
        folder.chmod(0o755)
        postgres = PostgresServer(folder, {"fsync": "off"})
        postgres.start()
        stack.callback(postgres.stop)
        kafka = KafkaServer(folder / "kafka")
        kafka.start()
        stack.callback(kafka.stop)
        outcome = asyncio.run(torture(plan, postgres.dsn, kafka.bootstrap_servers, folder))
        sys.stdout.write(json.dumps({**asdict(outcome), "seed": plan.seed, "ok": outcome.is_good}) + "\n")
        if not outcome.is_good:
            kept = Path(tempfile.mkdtemp(prefix="oshaani-torture-logs-"))
            for log in folder.glob("*.log"):
                (kept / log.name).write_bytes(log.read_bytes())
            sys.stderr.write(f"the workers' logs are in {kept}\n")
    sys.exit(0 if outcome.is_good else 1)


if __name__ == "__main__":
    main()
