"""Whatever people ask and whichever workers die: every turn ends once, in order, and is charged what it cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from commands.turn import CancelTurn, SendMessage
from domain.errors import Refusal
from domain.ids import ConversationId
from domain.ports import (
    Effect,
    ModelErrorClass,
    ModelReply,
    ModelRequest,
    ToolContext,
    ToolFailed,
    ToolResult,
)
from domain.turn import Turn
from stream_processors.processor import handlers_of
from tests.commands.write_side import BY
from tests.stream_processors.stage import (
    PROCESSORS,
    CountedTool,
    ScriptedModels,
    Stage,
    Worker,
    fails,
    says,
    wants,
)

CONVERSATIONS = 3
WORKERS_MAX = 3
LITTLE_S = 0.02
EXAMPLES, STEPS = 15, 20
BEHAVIOURS = ("answer", "look", "order", "both", "loop", "flaky", "refused", "empty", "slow", "broken")


class ModelByText(ScriptedModels):
    """Behaves as the question says."""

    async def _play(self, request: ModelRequest, on_text: Callable[[str], None] | None) -> ModelReply:
        question = next(m.content for m in reversed(request.messages) if m.role == "user")
        tried = self.of_call()[request.idempotency_key]
        answered = sum(message.role == "tool" for message in request.messages)
        await asyncio.sleep(LITTLE_S if question == "slow" else 0)
        match question:
            case "look" | "order" | "broken" if not answered:
                return wants((question, {"q": str(request.idempotency_key)}))
            case "both" if not answered:
                return wants(("look", {"q": "1"}), ("order", {"q": "2"}), ("missing", {}))
            case "loop":
                return wants(("look", {"q": "again"}))
            case "flaky" if tried < 3:
                raise fails(ModelErrorClass.OVERLOADED)
            case "refused":
                raise fails(ModelErrorClass.REFUSED)
            case "empty" if tried < 2:
                return says("")
            case _:
                return says("So it is.")


async def take_time(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
    await asyncio.sleep(LITTLE_S / 2)
    return ToolResult("taken")


async def break_down(arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
    raise ToolFailed("It is broken.")


class Engine(RuleBasedStateMachine):
    """People, workers that come and go, and a log."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.tools = {
            "look": CountedTool("look", take_time, Effect.PURE),
            "order": CountedTool("order", take_time, Effect.UNSAFE),
            "broken": CountedTool("broken", break_down, Effect.IDEMPOTENT),
        }
        self.stage = Stage(ModelByText(), *self.tools.values())
        self.conversations = [ConversationId(uuid4()) for _ in range(CONVERSATIONS)]
        self.alive: list[Worker] = []
        self.sent: list[SendMessage] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize()
    def sign_up(self) -> None:
        async def begin() -> None:
            # It takes what is asked, and does none of the work.
            self.stage.worker("gate/1").start(host=False, sweeper=False)
            await self.stage.begin(max_tool_iterations=4)

        self.run(begin())

    @rule(behaviour=st.sampled_from(BEHAVIOURS), which=st.integers(0, CONVERSATIONS - 1))
    def send(self, behaviour: str, which: int) -> None:
        async def send() -> None:
            try:
                sent = await self.stage.send(
                    behaviour,
                    conversation_id=self.conversations[which],
                    beginning="named",
                    name=f"thread {which}",
                )
                self.sent.append(sent)
            except Refusal:
                pass  # the queue is full

        self.run(send())

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        async def cancel(sent: SendMessage) -> None:
            with suppress(Refusal):  # it may have ended
                await self.stage.bus.execute(
                    CancelTurn(tenant_id=sent.tenant_id, turn_id=sent.turn_id), by=BY
                )

        if self.sent:
            self.run(cancel(data.draw(st.sampled_from(self.sent))))

    @rule()
    def start_worker(self) -> None:
        async def start() -> None:
            self.alive.append(self.stage.worker().start())

        if len(self.alive) < WORKERS_MAX:
            self.run(start())

    @rule()
    def kill_worker(self) -> None:
        if self.alive:
            self.run(self.alive.pop(0).kill())

    @rule(times=st.integers(1, 3))
    def let_time_pass(self, times: int) -> None:
        self.run(asyncio.sleep(times * LITTLE_S))

    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        async def deliver(worker: Worker, at: int) -> None:
            records = await self.stage.happened()
            record = records[at % len(records)]
            for handler in handlers_of(PROCESSORS).get(type(record.event), ()):
                await handler(record, worker.work)

        if self.alive:
            worker = data.draw(st.sampled_from(self.alive))
            self.run(deliver(worker, data.draw(st.integers(0, 10_000))))

    def teardown(self) -> None:
        try:
            self.run(self.check())
        finally:
            self.run(self.end())
            self.loop.close()

    async def check(self) -> None:
        if not self.stage.workers:
            return  # Hypothesis stopped before the beginning
        self.alive.append(self.stage.worker().start())
        for sent in self.sent:
            told = await self.stage.end_of(sent.turn_id)
            calls = [event.call_id for event in told.events(Turn.ModelCallCompleted)]
            assert len(calls) == len(set(calls))
            called = Counter(event.tool_call_id for event in told.events(Turn.ToolCalled))
            assert set(called.values()) <= {1}
        await self.stage.check()
        orders = Counter(context.idempotency_key for _, context in self.tools["order"].runs)
        assert set(orders.values()) <= {1}
        self.check_order(await self.stage.happened())

    def check_order(self, records: list[Any]) -> None:
        """At most one turn of a conversation is under way, and they take their turns in the order of their messages."""
        conversation_of: dict[UUID, UUID] = {}
        under_way: dict[UUID, UUID] = {}
        begun: dict[UUID, list[UUID]] = {}
        asked: dict[UUID, list[UUID]] = {}
        for record in records:
            conversation_id = conversation_of.get(record.stream_id)
            if record.type == "Turn.Accepted":
                conversation_of[record.stream_id] = record.event.conversation_id
                asked.setdefault(record.event.conversation_id, []).append(record.stream_id)
            elif record.type == "Turn.ContextAssembled":
                assert conversation_id not in under_way
                under_way[conversation_id] = record.stream_id  # type: ignore[index]
                begun.setdefault(conversation_id, []).append(record.stream_id)  # type: ignore[arg-type]
            elif isinstance(record.event, Turn.Ended) and under_way.get(conversation_id) == record.stream_id:  # type: ignore[arg-type]
                del under_way[conversation_id]  # type: ignore[arg-type]
        for conversation_id, turn_ids in begun.items():
            assert turn_ids == [turn_id for turn_id in asked[conversation_id] if turn_id in turn_ids]

    async def end(self) -> None:
        for worker in self.stage.workers:
            await worker.kill()


def test_whatever_happens_every_turn_ends_once_in_order_and_is_charged_what_it_cost() -> None:
    run_state_machine_as_test(
        Engine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
