"""The turn engine on a log in memory, with a model that plays a script and tools that count."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from adapters.memory.event_log import MemoryEventLog
from adapters.memory.parked_records import MemoryParkedRecords
from adapters.memory.turn_feed import MemoryTurnFeed
from commands.bus import Bus
from commands.command import Rules
from commands.turn import SendMessage
from domain.agent import Agent
from domain.configuration import Settings
from domain.credit_account import CreditAccount
from domain.ids import ConversationId, TurnId, shard_of
from domain.ports import (
    Effect,
    ModelCard,
    ModelErrorClass,
    ModelFault,
    ModelReply,
    ModelRequest,
    TokenUsage,
    Tool,
    ToolContext,
    ToolKind,
    ToolRequest,
    ToolResult,
)
from domain.turn import Turn
from oshaani.processor_host import ProcessorHost
from schemas.records import AnyRecord, Records
from stream_processors.agent_turns import agent_turns, with_first_call
from stream_processors.credit_debits import credit_debits
from stream_processors.history import ConversationHistory
from stream_processors.processor import Processor, Work, handlers_of
from stream_processors.sweeper import Sweeper
from stream_processors.tool_calls import tool_calls
from tests.commands.write_side import BY, Owner, account, known, memory_records, rules, signed_up

PROCESSORS = (agent_turns, tool_calls, credit_debits)
PATIENCE_S = 10.0
POLL_S = 0.005
ANSWER = "It is so."
CARD = ModelCard("peer:script", "peer", "Script", True, False, None, "free")
ENDS = {"Turn.Completed", "Turn.Failed", "Turn.TimedOut", "Turn.Cancelled"}
FOREVER = asyncio.Event  # awaited by a step that never ends

Step = ModelReply | ModelFault | Callable[[ModelRequest], Awaitable[ModelReply]]


def says(text: str) -> ModelReply:
    return ModelReply(text, usage=TokenUsage(10, 5))


def wants(*requests: tuple[str, Mapping[str, Any] | None]) -> ModelReply:
    """Asks for tools; arguments None stand for what is not JSON."""
    asked = tuple(
        ToolRequest(f"ref_{n}", name, None if arguments is None else dict(arguments), "{not json")
        for n, (name, arguments) in enumerate(requests)
    )
    return ModelReply("", asked, "tool_calls", TokenUsage(10, 5))


def fails(error_class: ModelErrorClass, retry_after_s: float | None = None) -> ModelFault:
    return ModelFault(error_class, f"It failed: {error_class}.", retry_after_s)


async def hangs(request: ModelRequest) -> ModelReply:
    """Takes no notice of any time limit."""
    await asyncio.Event().wait()
    raise AssertionError


class ScriptedModels:
    """Plays its steps one by one, those of a text apart from the others; then answers."""

    def __init__(self, *steps: Step, **by_text: Sequence[Step]) -> None:
        self.steps = deque(steps)
        self.by_text = {text: deque(its) for text, its in by_text.items()}
        self.requests: list[ModelRequest] = []
        self.card: ModelCard | None = CARD
        self.under_way = 0
        self.most_under_way = 0

    async def resolve(self, model_id: int) -> ModelCard | None:
        return self.card

    async def complete(
        self, name: str, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._play(request, on_text)
        finally:
            self.under_way -= 1

    async def _play(self, request: ModelRequest, on_text: Callable[[str], None] | None) -> ModelReply:
        question = next(m.content for m in reversed(request.messages) if m.role == "user")
        steps = self.by_text.get(question, self.steps)
        step = steps.popleft() if steps else says(ANSWER)
        await asyncio.sleep(0)
        if isinstance(step, ModelFault):
            raise step
        reply = step if isinstance(step, ModelReply) else await step(request)
        if on_text is not None and reply.text:
            on_text(reply.text)
        return reply

    def of_call(self) -> Counter[str]:
        """How often each call was made: attempts of the same call have the same key."""
        return Counter(request.idempotency_key for request in self.requests)


async def echo(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
    return ToolResult(f"echo {dict(arguments)!r}")


@dataclass(slots=True)
class CountedTool:
    """A tool that remembers what it was asked."""

    name: str = "lookup"
    run_once: Callable[[Mapping[str, Any], ToolContext], Awaitable[ToolResult]] = echo
    effect: Effect = Effect.PURE
    timeout_s: float = 5.0
    description: str = "Looks something up."
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    kind: ToolKind = "builtin"
    runs: list[tuple[dict[str, Any], ToolContext]] = field(default_factory=list)

    def missing(self) -> str | None:
        return None

    def validate(self, arguments: Mapping[str, Any]) -> str | None:
        return "The field 'q' must not be 'bad'." if arguments.get("q") == "bad" else None

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        self.runs.append((dict(arguments), context))
        return await self.run_once(arguments, context)


class Tools:
    """The tools of this server."""

    def __init__(self, *tools: CountedTool) -> None:
        self.tools = {tool.name: tool for tool in tools}

    def offered(self, agent: Agent, settings: Settings) -> Mapping[str, Tool]:
        return {name: tool for name, tool in self.tools.items() if settings.offers(name)}


class Worker:
    """One process: its bus, its processors, its sweeper. Each part can be left out, or killed."""

    def __init__(
        self, stage: Stage, name: str, bus: Bus, model_timeout_s: float, processors: Sequence[Processor]
    ) -> None:
        self.bus = bus
        self.feed = MemoryTurnFeed()
        self.history = ConversationHistory(stage.log, stage.records)
        self.work = Work(
            name, bus, stage.models, stage.tools, self.history, self.feed, bus._clock, model_timeout_s
        )
        self.host = ProcessorHost(stage.log, stage.records, processors, self.work, stage.parked)
        self.sweeper = Sweeper(stage.log, self.work)
        self.tasks: list[asyncio.Task[None]] = []
        self.heard: list[AnyRecord] = []
        self.delivers = True
        bus.on_commit = self._committed

    def _committed(self, records: Sequence[AnyRecord]) -> None:
        self.heard.extend(records)
        self.history.observe(records)
        self.feed.publish(records)
        if self.delivers:
            self.host.offer(records)

    def start(self, *, host: bool = True, sweeper: bool = True) -> Worker:
        parts = [self.sweeper.beat(), *([self.host.run()] if host else [])]
        parts += [self.sweeper.run()] if sweeper else []
        self.delivers = host
        self.tasks += [asyncio.create_task(part) for part in parts]
        return self

    async def kill(self) -> None:
        """As kill -9 does: everything ends where it stands, and nothing is written any more."""
        self.delivers = False
        running = [running.task for running in self.work.running.values()]
        await self.host.abandon()
        tasks = [*self.tasks, *running, *self.sweeper._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)


class Stage:
    """A log, the workers on it, and an owner who asks."""

    def __init__(self, models: ScriptedModels, *tools: CountedTool) -> None:
        self.models, self.tools = models, Tools(*tools)
        self.log = MemoryEventLog(lambda: datetime.now(UTC))
        self.records: Records = memory_records()
        self.parked = MemoryParkedRecords()
        self.workers: list[Worker] = []
        self.owner: Owner
        self.sent: list[TurnId] = []
        self.settings: Rules = rules()
        self.at_once = False  # whether messages come with their first model call

    def worker(
        self, name: str = "", model_timeout_s: float = 5.0, processors: Sequence[Processor] = PROCESSORS
    ) -> Worker:
        bus = Bus(self.log, self.records, self.settings)
        name = name or f"slot{len(self.workers)}/{uuid4()}"
        worker = Worker(self, name, bus, model_timeout_s, processors)
        self.workers.append(worker)
        return worker

    @property
    def bus(self) -> Bus:
        return self.workers[0].bus

    async def begin(self, rules: Rules | None = None, **configuration: Any) -> Stage:
        """One worker at work, and an owner with an agent."""
        self.settings = rules or self.settings
        if not self.workers:
            self.worker().start()
        self.owner = await signed_up(self.bus, configuration=configuration)
        return self

    # --- asking

    async def send(self, content: str = "Is it so?", **changes: Any) -> SendMessage:
        command = self.owner.message(content, **changes)
        if self.at_once and self.workers[0].delivers:
            work = self.workers[0].work
            command = await with_first_call(command, work, work.worker)
        await self.bus.execute(command, by=BY)
        self.sent.append(command.turn_id)
        return command

    async def ask(self, content: str = "Is it so?", **changes: Any) -> Told:
        """Send a message and wait for the end of its turn."""
        return await self.end_of((await self.send(content, **changes)).turn_id)

    async def talk(self, *contents: str, **changes: Any) -> list[Told]:
        """Messages of one conversation, each after the answer to the one before."""
        conversation_id = ConversationId(uuid4())
        return [
            await self.ask(
                content, conversation_id=conversation_id, beginning="named", name="thread", **changes
            )
            for content in contents
        ]

    async def end_of(self, turn_id: TurnId) -> Told:
        async def ended() -> Told | None:
            told = await self.told(turn_id)
            return told if told.types and told.types[-1] in ENDS else None

        return await until(ended, f"the end of turn {turn_id}")

    # --- what became of it

    async def told(self, turn_id: TurnId) -> Told:
        rows = await self.log.read_stream(shard_of(self.owner.tenant_id), turn_id, 1_000)
        return Told(turn_id, await self.records.open(rows))

    async def account(self) -> CreditAccount:
        return await account(Bus(self.log, self.records, self.settings), self.owner)

    async def happened(self) -> list[AnyRecord]:
        """Everything in the log, shard by shard."""
        heads = await self.log.heads()
        rows = await self.log.read_after(dict.fromkeys(heads, 0), 1_000_000)
        return await self.records.open(rows)

    async def idle(self) -> None:
        """Every record is handled, nothing runs, nothing is due."""

        async def is_idle() -> bool:
            heads = await self.log.heads()
            alive = [worker for worker in self.workers if worker.delivers]
            busy = any(worker.host.lag(heads) or worker.work.running for worker in alive)
            return not busy and not self.log.waiting

        await until(is_idle, "the end of all work")

    async def check(self) -> None:
        """What must be true in the end of every story, and stays so when every record comes twice more."""
        await self.idle()
        told = [await self.told(turn_id) for turn_id in self.sent]
        assert all(each.types[-1] in ENDS for each in told)
        assert all(sum(type in ENDS for type in each.types) == 1 for each in told)
        before = await self.account()
        assert (before.held_ncr, before.holds) == (0, {})
        granted_ncr = self.settings.free_credits_ncr
        charged_ncr = sum(each.end.charged_ncr for each in told)
        assert granted_ncr - before.available_ncr - charged_ncr == 1_500_000_000  # the agent's price
        await self.deliver_again()
        await self.deliver_again()
        assert known(await self.account()) == known(before)

    async def deliver_again(self) -> None:
        """Every record once more, to every processor of a living worker; nothing happens."""
        heads = await self.log.heads()
        handlers = handlers_of(PROCESSORS)
        worker = next(worker for worker in self.workers if worker.delivers)
        asked = len(self.models.requests)
        for record in await self.happened():
            for handler in handlers.get(type(record.event), ()):
                await handler(record, worker.work)
        await self.idle()
        assert await self.log.heads() == heads
        assert len(self.models.requests) == asked


@dataclass(frozen=True, slots=True)
class Told:
    """A turn's story."""

    turn_id: TurnId
    records: Sequence[AnyRecord]

    @property
    def types(self) -> list[str]:
        return [record.type for record in self.records]

    @property
    def story(self) -> list[str]:
        return [record.type.partition(".")[2] for record in self.records]

    @property
    def end(self) -> Any:
        return self.records[-1].event

    @property
    def charged(self) -> list[str]:
        """The meters charged."""
        return [line.meter for line in self.end.lines]

    def events(self, event_class: type[Any]) -> list[Any]:
        return [record.event for record in self.records if isinstance(record.event, event_class)]

    @property
    def tool_results(self) -> list[tuple[str, str]]:
        return [(event.outcome, event.result) for event in self.events(Turn.ToolCalled)]


async def until(ask: Callable[[], Awaitable[Any]], what: str, within_s: float = PATIENCE_S) -> Any:
    """What `ask` answers as soon as that is true."""
    try:
        async with asyncio.timeout(within_s):
            while not (answer := await ask()):  # noqa: ASYNC110 - what is waited for may be anywhere
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"waited {within_s} s for {what}") from None
    return answer


def replies(records: Iterable[AnyRecord], conversation_id: UUID) -> list[str]:
    """The texts of a conversation's stream, in order."""
    return [
        record.event.content
        for record in records
        if record.stream_id == conversation_id
        and record.type in ("Conversation.MessageSent", "Conversation.AssistantReplied")
    ]
