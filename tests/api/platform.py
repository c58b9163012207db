"""A whole server for the tests of the HTTP layer: real HTTP, log, processors and read models; a scripted model.

It runs in a thread with a loop of its own, once for all tests of a run; each test registers people of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Annotated, Any

import uvicorn
from pydantic import Field

from adapters.api_keys import HmacApiKeys
from adapters.egress.client import ANY_PORT, EgressClient
from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.faust_consumer import WorkerKafka
from adapters.kafka.following import follow_topic
from adapters.kafka.relay import Relay, RelayOptions
from adapters.kafka.turn_feed import KafkaTurnFeed
from adapters.memory.identity import MemoryKeyUses, MemoryLogins, MemorySessions
from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from adapters.memory.parked_records import MemoryParkedRecords
from adapters.memory.turn_feed import MemoryTurnFeed
from adapters.memory.vault import MemoryVault
from adapters.passwords import Argon2Passwords
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.hints import Hints, listen
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.pool import deadline, open_pool
from adapters.tools.catalogue import ToolCatalogue
from adapters.tools.tool import tool
from adapters.webhooks import DerivedWebhookSecrets
from api.app import create_app
from api.server import Check, Limits, NumberedModel, Prepare, Server
from commands.bus import Bus
from commands.command import Rules
from commands.turn import SendMessage
from domain.event_log import LockedLog, LogUnavailable
from domain.ids import shard_of
from domain.plans import plans_with
from domain.ports import (
    Effect,
    Message,
    ModelCard,
    ModelErrorClass,
    ModelFault,
    ModelReply,
    ModelRequest,
    TokenUsage,
    ToolFailed,
    ToolRequest,
)
from oshaani.log_tail import LogTail
from oshaani.processor_host import ProcessorHost
from oshaani.toolbox import OwnersToolbox, ServerToolbox
from oshaani.wiring import PROCESSORS, migrate
from projections.catching_up import AWAITED, CheckpointWatch
from projections.read_side import Pool, ReadSide
from projections.runner import Runner
from schemas import wire
from schemas.codec import type_of
from schemas.hints import Hint, Serving
from schemas.records import AnyRecord, Records
from schemas.topics import LOG, TURN_STREAM, work_topic
from schemas.turn_feed import TurnFeed
from stream_processors.agent_turns import agent_turns, with_first_call
from stream_processors.eager import Eager
from stream_processors.faust_app import FaustHost, Names
from stream_processors.history import ConversationHistory
from stream_processors.processor import Processor, WayOut, Work
from stream_processors.runner import Supplies
from stream_processors.sweeper import Sweeper
from stream_processors.workers import Workers
from tests.peers.brokers import PrivateTopics

MASTER_KEY = bytes(range(32))
SIGNING_KEY = bytes(range(32, 64))
CARD = ModelCard("scripted:one", "scripted", "Scripted", True, False, None, "free")
STARTED_S = 20.0
GATE_S = 20.0
_DIRECTIVE = re.compile(r"\[\[(\w+)\s*([^\]]*)\]\]")


@tool(timeout_s=5.0, effect=Effect.PURE)
async def echo(text: Annotated[str, Field(max_length=1000)]) -> str:
    """Say the text again."""
    if text == "fail":
        raise ToolFailed("The echo is broken.")
    return f"echo: {text}"


@tool(timeout_s=5.0, effect=Effect.PURE, missing=lambda: "This server has no crystal ball; buy one.")
async def oracle(question: str) -> str:
    """Tell the future."""
    return question


class ScriptedModel:
    """Does what the last message asks for in double square brackets.

    [[tool NAME {json}]] asks for the tool once, then repeats its result; [[gate NAME]] writes half of its answer and
    waits until `open_gate(NAME)`; [[fail CLASS]] fails; [[flaky NAME]] fails at the first attempt, after a few words and
    when the gate is open.
    """

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self._tries: dict[str, int] = {}

    def open_gate(self, name: str) -> None:
        self.gates.setdefault(name, threading.Event()).set()

    async def resolve(self, model_id: int) -> ModelCard | None:
        return CARD

    async def complete(
        self, name: str, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        say = on_text or (lambda text: None)
        asked = next(m.content for m in reversed(request.messages) if m.role == "user")
        results = _results(request.messages)
        wish = _DIRECTIVE.search(asked)
        match wish.group(1) if wish else None, wish.group(2) if wish else "":
            case "tool", words if not results:
                tool_name, _, arguments = words.partition(" ")
                wanted = ToolRequest("call_1", tool_name, json.loads(arguments or "{}"))
                return ModelReply("", (wanted,), "tool_calls", TokenUsage(3, 2))
            case "gate", gate:
                say("Half of ")
                await self._wait(gate)
                say("it.")
                return ModelReply("Half of it.", usage=TokenUsage(3, 2))
            case "fail", error_class:
                raise ModelFault(ModelErrorClass(error_class), "The scripted model will not.")
            case "flaky", key if self._tries.setdefault(key, 0) == 0:
                self._tries[key] += 1
                say("These words are ")
                await self._wait(key)
                raise ModelFault(ModelErrorClass.OVERLOADED, "Not now.", retry_after_s=0.01)
            case _:
                text = f"The tool said: {results[-1]}" if results else f"You said: {asked}"
                for word in re.findall(r"\S+\s*", text):
                    say(word)
                return ModelReply(text, usage=TokenUsage(3, 2))

    async def _wait(self, name: str) -> None:
        gate = self.gates.setdefault(name, threading.Event())
        assert await asyncio.to_thread(gate.wait, GATE_S)


def _results(messages: Sequence[Message]) -> list[str]:
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    return [message.content for message in messages[last:] if message.role == "tool"]


class Models:
    """What the server offers: the scripted model as number 1."""

    async def cards(self) -> Sequence[NumberedModel]:
        return [NumberedModel(1, CARD)]

    def knows(self, model_id: int) -> bool:
        return model_id == 1


class Breakable(PostgresEventLog):
    """A log that can be unreachable."""

    broken = False

    async def append(self, batch: Any) -> datetime:
        if self.broken:
            raise LogUnavailable("broken by the test")
        return await super().append(batch)

    def locked(self, shards: Sequence[int]) -> AbstractAsyncContextManager[LockedLog]:
        if self.broken:
            raise LogUnavailable("broken by the test")
        return super().locked(shards)


@dataclass(slots=True)
class Platform:
    """A running server and what tests may turn on it."""

    base_url: str
    loop: asyncio.AbstractEventLoop
    server: Server
    model: ScriptedModel
    log: Breakable
    app: Any

    def run(self, work: Any) -> Any:
        """Run a coroutine where the server runs."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(STARTED_S)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class _Parts:
    """What turns are run with, whatever carries the records."""

    log: Breakable
    pool: Pool
    records: Records
    rules: Rules
    model: ScriptedModel
    vault: MemoryVault
    toolbox: ServerToolbox
    out: WayOut

    def work(self, worker: str, bus: Bus, feed: TurnFeed) -> Work:
        history = ConversationHistory(self.log, self.records)
        return Work(worker, bus, self.model, self.toolbox, history, feed, utc_now, 30.0, out=self.out)


@dataclass(slots=True)
class _Layout:
    """Who serves commands and queries, and what goes on beside. `heard` is told of what others committed."""

    bus: Bus
    db: ReadSide
    feed: TurnFeed
    tasks: list[Coroutine[Any, Any, None]]
    works: list[Work]
    heard: list[Callable[[Sequence[AnyRecord]], None]]
    prepare: Prepare


def _parts(log: Breakable, pool: Pool, closing: AsyncExitStack) -> _Parts:
    records = Records(MemoryKeyRing(), MemoryObjectStore())
    rules = Rules(
        plans_with({"free": {"message": 200, "agent_create": 20}, "starter": {"message": 1}}),
        turn_deadline_s=60.0,
    )
    vault, egress = MemoryVault(), EgressClient()
    # Callbacks may go to this machine, where the tests' receivers are.
    door = EgressClient(allow=("127.0.0.0/8",), ports=ANY_PORT)
    closing.push_async_callback(egress.close)
    closing.push_async_callback(door.close)
    toolbox = ServerToolbox(ToolCatalogue(echo, oracle), egress, vault)
    out = WayOut(log, records, door, DerivedWebhookSecrets(MASTER_KEY))
    return _Parts(log, pool, records, rules, ScriptedModel(), vault, toolbox, out)


def _embedded(parts: _Parts) -> _Layout:
    """All in one process: what the bus commits is handed over at once."""
    bus = Bus(parts.log, parts.records, parts.rules)
    projector, feed = Runner(parts.pool, deadline, parts.log, parts.records), MemoryTurnFeed()
    work = parts.work("tests/1", bus, feed)
    host = ProcessorHost(parts.log, parts.records, PROCESSORS, work, MemoryParkedRecords())
    sweeper = Sweeper(parts.log, work)

    def committed(batch: Sequence[AnyRecord]) -> None:
        work.history.observe(batch)
        feed.publish(batch)
        host.offer(batch)
        projector.offer(batch)

    bus.on_commit = committed
    tasks = [projector.run(), host.run(), sweeper.beat(), sweeper.run()]
    db = ReadSide(parts.pool, deadline, projector.caught_up)
    return _Layout(
        bus, db, feed, tasks, [work], [], lambda message: with_first_call(message, work, work.worker)
    )


async def _over_kafka(parts: _Parts, database_url: str, broker: str, closing: AsyncExitStack) -> _Layout:
    """As separate processes do it: the log is relayed to a broker, workers and read models hear of it from there."""
    config, topics = KafkaConfig.at(broker), PrivateTopics(broker)
    closing.callback(topics.remove)
    names = [work_topic(each.name) for each in PROCESSORS]
    firehose, stream, *works = topics.create(LOG, TURN_STREAM, *names)
    bus, hints = Bus(parts.log, parts.records, parts.rules), Hints(database_url, bytes(32))
    feed = KafkaTurnFeed(stream.name)
    heard: list[Callable[[Sequence[AnyRecord]], None]] = [feed.publish]

    def hear(records: Sequence[AnyRecord]) -> None:
        for listener in heard:
            listener(records)

    work, workers = parts.work("tests-api/1", bus, feed), Workers()

    def committed(batch: Sequence[AnyRecord]) -> None:
        tail.offer(batch)
        work.history.observe(batch)
        feed.publish(batch)

    async def take_in(hint: Hint) -> None:
        work.history.observe(await bus.take_in(hint.heads, hint.rows))

    def prepare(message: SendMessage) -> Awaitable[SendMessage]:
        return with_first_call(message, work, workers.of(shard_of(message.tenant_id)))

    tail = LogTail(parts.log, parts.records, hear, feed.is_followed)
    bus.on_commit, bus.on_append, bus.on_loaded = committed, hints.tell, work.history.loaded
    leases = PostgresLeases(parts.pool)
    types = {
        topic.name: {type_of(event_class).name for event_class in each.handlers}
        for topic, each in zip(works, PROCESSORS, strict=True)
    }
    relay = Relay(parts.log, leases, config, "relay/1", types, RelayOptions(firehose.name))
    runner = Runner(parts.pool, deadline, parts.log, parts.records)

    async def project(values: Sequence[bytes]) -> None:
        await runner.offer_rows([wire.unpack(value) for value in values])

    hints.on_hint(tail.hear)
    hints.on_hint(take_in)
    hints.on_serving(workers.hear)
    hints.on_hint(lambda hint: relay.wake(hint.rows))

    async def awaited(said: str) -> None:
        runner.hurry()

    tasks = [
        *(hints.run(), listen(database_url, AWAITED, awaited), tail.run(), relay.run(), runner.run()),
        follow_topic(config, "tests-api", stream.name, feed.take),
        follow_topic(config, "tests-projector", firehose.name, project),
    ]
    producer = await closing.enter_async_context(open_producer(config, "tests-worker"))
    tasks.append(feed.send(producer))
    processors = [
        await _worker(each, topic.name, parts, feed, hints, database_url, config, closing)
        for topic, each in zip(works, PROCESSORS, strict=True)
    ]
    tasks += [task for _, own in processors for task in own]
    db = ReadSide(parts.pool, deadline, CheckpointWatch(parts.pool, deadline))
    return _Layout(bus, db, feed, tasks, [work for work, _ in processors], heard, prepare)


async def _worker(
    processor: Processor,
    topic: str,
    parts: _Parts,
    feed: TurnFeed,
    hints: Hints,
    database_url: str,
    config: KafkaConfig,
    closing: AsyncExitStack,
) -> tuple[Work, list[Coroutine[Any, Any, None]]]:
    """A processor with a bus of its own, under Faust."""
    log = PostgresEventLog(database_url)
    await log.open()
    closing.push_async_callback(log.close)
    bus = Bus(log, parts.records, parts.rules)
    bus.on_append = hints.tell
    work = parts.work(f"{processor.name}-1/1", bus, feed)
    supplies = Supplies(work, log, parts.records, MemoryParkedRecords())
    names = Names(topic, f"{topic}.group", f"{topic}.dlq")
    host, sweeper = FaustHost(processor, supplies, WorkerKafka(config), names=names), Sweeper(log, work)
    host.on_grown = bus.hint
    if processor is agent_turns:
        hints.on_hint(Eager(host.serves, work).hear)
        hints.announce(lambda: Serving(work.worker, host.shards))
    return work, [host.run(), sweeper.beat(), sweeper.run()]


def _server(parts: _Parts, layout: _Layout, base_url: str, passwords: Argon2Passwords) -> Server:
    numbers = count(1)

    async def next_number() -> int:
        return next(numbers)

    async def ready() -> Sequence[Check]:
        return [Check("database", not parts.log.broken)]

    return Server(
        bus=layout.bus,
        db=layout.db,
        feed=layout.feed,
        log=parts.log,
        records=parts.records,
        rules=parts.rules,
        clock=utc_now,
        keys=HmacApiKeys(MASTER_KEY),
        key_uses=MemoryKeyUses(),
        logins=MemoryLogins(),
        sessions=MemorySessions(),
        passwords=passwords,
        vault=parts.vault,
        webhook_secrets=DerivedWebhookSecrets(MASTER_KEY),
        models=Models(),
        toolbox=OwnersToolbox(parts.toolbox),
        base_url=base_url,
        signing_key=SIGNING_KEY,
        next_agent_number=next_number,
        ready=ready,
        prepare=layout.prepare,
        limits=Limits(sync_timeout_s=3.0, heartbeat_s=1.0),
        version="0.0.0",
    )


@asynccontextmanager
async def _served(database_url: str, broker: str | None) -> AsyncIterator[Platform]:
    await migrate(database_url)
    log = Breakable(database_url)
    await log.open()
    async with AsyncExitStack() as closing:
        closing.push_async_callback(log.close)
        pool = await closing.enter_async_context(open_pool(database_url, 4))
        passwords = Argon2Passwords()
        closing.push_async_callback(passwords.close)
        listener = socket.create_server(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        parts = _parts(log, pool, closing)
        layout = await _over_kafka(parts, database_url, broker, closing) if broker else _embedded(parts)
        server = _server(parts, layout, base_url, passwords)
        app = create_app(server)
        layout.heard.append(app.state.on_records)
        http = _Http(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
        tasks = [asyncio.create_task(each) for each in (*layout.tasks, http.serve([listener]))]
        await asyncio.wait_for(http.serves.wait(), STARTED_S)
        try:
            yield Platform(base_url, asyncio.get_running_loop(), server, parts.model, log, app)
        finally:
            http.should_exit = True
            await asyncio.wait(tasks[-1:], timeout=5)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=5)
            for work in layout.works:
                await work.drain(1.0)


class _Http(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serves = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serves.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def running(database_url: str, broker: str | None = None) -> Iterator[Platform]:
    """A server in a thread of its own; with a broker, laid out around that."""
    ready, stop = threading.Event(), threading.Event()
    found: list[Platform] = []
    failures: list[BaseException] = []

    async def serve() -> None:
        async with _served(database_url, broker) as platform:
            found.append(platform)
            ready.set()
            await asyncio.to_thread(stop.wait)

    def main() -> None:
        try:
            asyncio.run(serve())
        except BaseException as failure:
            failures.append(failure)
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="platform")
    thread.start()
    try:
        assert ready.wait(STARTED_S)
        if failures:
            raise failures[0]
        yield found[0]
    finally:
        stop.set()
        thread.join(STARTED_S)
    if failures:
        raise failures[0]
