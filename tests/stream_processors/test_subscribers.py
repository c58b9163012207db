"""What clients that are not ours read on the real broker's public topics."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.kafka.publisher import kafka_publisher
from adapters.memory.parked_records import MemoryParkedRecords
from domain.credit_account import CreditAccount
from domain.ids import account_of
from domain.money import credits
from domain.ports import PublicMessage, Publisher
from schemas import wire
from schemas.asyncapi import document
from schemas.topics import AGENT_STATE, CREDIT_BALANCE, PUBLIC, dead_letters, partition_of, work_topic
from stream_processors.faust_app import FaustHost, Names
from stream_processors.public_topics import public_topics
from stream_processors.runner import Supplies
from tests.peers.brokers import PrivateTopics
from tests.programs.asyncapi_consumer import read_all
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import ScriptedModels, Stage, until
from tests.stream_processors.test_public_topics import Subscriber, headers, told_a_story

ROOT = Path(__file__).parents[2]
CONSUMER = ROOT / "tests" / "programs" / "asyncapi_consumer.py"
EXACT_TOTALS = ROOT / "examples" / "exact_totals.py"
PATIENCE_S = 60.0


class Prefixed:
    """Publishes under the names that a test's topics have."""

    def __init__(self, publisher: Publisher, prefix: str) -> None:
        self._publisher, self._prefix = publisher, prefix

    async def send(self, messages: Sequence[PublicMessage]) -> Awaitable[None]:
        return await self._publisher.send(
            [replace(message, topic=self._prefix + message.topic) for message in messages]
        )


@asynccontextmanager
async def publishing(broker: str, topics: PrivateTopics) -> AsyncIterator[Publisher]:
    async with kafka_publisher(lambda: open_producer(KafkaConfig.at(broker), "test")) as publisher:
        yield Prefixed(publisher, topics.prefix)


async def publish(stage: Stage, broker: str, topics: PrivateTopics, times: int = 1) -> Subscriber:
    """Everything that happened on the stage, to a broker; returns what it was."""
    records = await stage.happened()
    expected = await Subscriber(stage).take(records)
    async with publishing(broker, topics) as publisher, asyncio.timeout(PATIENCE_S):
        for _ in range(times):
            await Subscriber(stage, publisher=publisher).take(records)
    return expected


async def test_a_consumer_that_knows_only_the_document_reads_and_validates_every_message(
    broker: str, topics: PrivateTopics, staged: Staged, tmp_path: Path
) -> None:
    topics.create(*PUBLIC.values(), AGENT_STATE, CREDIT_BALANCE)
    expected = await publish(await told_a_story(staged), broker, topics)
    here = deepcopy(document())
    for channel in here["channels"].values():
        channel["address"] = topics.prefix + channel["address"]
    file = tmp_path / "asyncapi.json"
    file.write_text(json.dumps(here), "utf-8")
    command = [sys.executable, str(CONSUMER), str(file), broker]
    ran = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ran.returncode == 0, ran.stderr
    counted = {
        (name, type): count for name, types in json.loads(ran.stdout).items() for type, count in types.items()
    }
    states = {("agent.state", "agent.state.v1"), ("credit.balance", "credit.balance.v1")}
    told = Counter(
        (message.topic.removeprefix("oshaani.").rpartition(".")[0], headers(message)["ce_type"])
        for message in expected.messages
    )
    # States that others follow soon may be left out.
    assert set(counted) == set(told) >= states
    assert {each: counted[each] for each in set(told) - states} == {
        each: told[each] for each in set(told) - states
    }


def ledger(stage_records: Sequence[object]) -> dict[tuple[str, str], str]:
    """What the log says that each account's books hold."""
    books: defaultdict[tuple[str, str], int] = defaultdict(int)
    for record in stage_records:
        event = getattr(record, "event", None)
        if isinstance(event, CreditAccount.Moved):
            for posting in event.postings:
                books[str(event.originator_id), posting.book] += posting.amount_ncr
    return {row: credits(amount_ncr) for row, amount_ncr in books.items()}


def totals(file: Path) -> dict[tuple[str, str], str]:
    with sqlite3.connect(file) as db:
        rows = db.execute("SELECT account, book, credits FROM total").fetchall()
    return {
        (account, book): credits(int(Decimal(amount).scaleb(9).to_integral_exact()))
        for account, book, amount in rows
    }


async def test_the_example_counts_each_credit_once_though_it_is_killed_and_everything_repeated(
    broker: str, topics: PrivateTopics, staged: Staged, tmp_path: Path
) -> None:
    topics.create(*PUBLIC.values(), AGENT_STATE, CREDIT_BALANCE)
    stage = await staged(ScriptedModels()).begin()
    await asyncio.gather(*(stage.ask(f"question {n}") for n in range(20)))
    await stage.idle()
    await publish(stage, broker, topics, times=3)
    file = tmp_path / "totals.sqlite"
    command = [
        sys.executable,
        str(EXACT_TOTALS),
        broker,
        str(file),
        topics.prefix + PUBLIC["credit"].name,
        "once",
    ]
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(*command)
        await asyncio.sleep(random.uniform(0.2, 1.0))
        process.kill()
        await asyncio.wait_for(process.wait(), PATIENCE_S)
    for _ in range(2):
        ran = await asyncio.to_thread(subprocess.run, command, timeout=PATIENCE_S)
        assert ran.returncode == 0
        assert totals(file) == ledger(await stage.happened())
    assert totals(file)[str(account_of(stage.owner.tenant_id)), "available"] == credits(
        (await stage.account()).available_ncr
    )


class Means:
    """What the processor uses of a worker."""

    def __init__(self, stage: Stage, publisher: Publisher) -> None:
        self.bus = stage.bus
        self.publication = Subscriber(stage, publisher=publisher).publication


async def test_under_faust_each_key_is_published_in_the_order_of_the_log_though_workers_end_midway(
    broker: str, topics: PrivateTopics, staged: Staged
) -> None:
    topics.create(*PUBLIC.values(), AGENT_STATE, CREDIT_BALANCE)
    (work_records,) = topics.create(work_topic("public_topics"))
    group = f"{topics.prefix}group"
    names = Names(work_records.name, group, dead_letters(work_records.name, group).name)
    stage = await staged(ScriptedModels()).begin()
    await asyncio.gather(*(stage.talk("one", "two", "three") for _ in range(5)))
    await stage.idle()
    await stage.idle()
    rows = await stage.log.read_after(dict.fromkeys(await stage.log.heads(), 0), 100_000)
    async with open_producer(KafkaConfig.at(broker), "carrier") as producer:
        for row in rows:
            partition = partition_of(row.shard, work_records.partitions)
            await producer.send(names.topic, wire.pack(row), row.stream_id.bytes, partition)
    async with publishing(broker, topics) as publisher, asyncio.timeout(PATIENCE_S):
        for begun in (10, 40, None):
            counted = Counting(publisher)
            work: Any = Means(stage, counted)
            supplies = Supplies(work, stage.log, stage.records, MemoryParkedRecords())
            host = FaustHost(public_topics, supplies, WorkerKafka(KafkaConfig.at(broker)), names=names)
            running = asyncio.create_task(host.run())
            done = partial(is_done, host, counted, begun)
            await until(done, "records to be published", PATIENCE_S)
            if begun is None:
                await host.drain()
            running.cancel()
            await asyncio.wait({running})
    expected = await Subscriber(stage).take(await stage.happened())
    for name in ("turn", "conversation", "credit", "identity", "agent"):
        topic = PUBLIC[name].name
        told: defaultdict[str, list[str]] = defaultdict(list)
        for message in expected.messages:
            if message.topic == topic:
                told[message.key].append(headers(message)["ce_id"])
        found: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for each in read_all(broker, topics.prefix + topic)[1]:
            found[each.key().decode()].setdefault(dict(each.headers())["ce_id"].decode())
        assert {key: list(ids) for key, ids in found.items()} == told


class Counting:
    """Knows how much was given to a publisher."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.count = 0

    async def send(self, messages: Sequence[PublicMessage]) -> Awaitable[None]:
        self.count += len(messages)
        return await self._publisher.send(messages)


async def is_done(host: FaustHost, counted: Counting, begun: int | None) -> bool:
    """Whether a worker has begun so many messages, or has handled all there is."""
    state = host.state
    if begun is not None:
        return counted.count >= begun
    return bool(host.ready() and state.partitions and counted.count and not state.lag and not state.pending)
