"""A write side and a read side on a database of their own, and a story that makes every event the read models handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.pool import deadline, open_pool
from commands import agent as agents
from commands import callback as callbacks
from commands import credit_account as credits_of
from commands import turn as turns
from commands import user as users
from commands.bus import Bus
from commands.command import Command, Outcome, Rules, WriteSide, handles
from domain.callback import callback_of
from domain.credit_account import CreditAccount, Origin
from domain.ids import (
    ConversationId,
    HoldId,
    ToolCallId,
    TurnId,
    UserId,
    account_of,
    agent_of,
    grant_of_payment,
    hold_of,
    named_conversation,
)
from domain.money import ncr
from domain.ports import Effect, ModelErrorClass, TokenUsage
from domain.prices import MESSAGE, rate_card_at
from domain.turn import AskedTool, AskModel, Turn, call_of, tool_call_of
from projections.checkpoints import migrate
from projections.projection import Projection
from projections.read_side import Pool, ReadSide
from projections.runner import Runner
from projections.tables import table_names
from schemas.records import Records

WORKER = "turns-1/a"
WAIT_S = 10.0
PLENTY = Rules(plans={name: {} for name in ("free", "starter", "payg")}, free_credits_ncr=ncr("69"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpireHold(Command):
    """Give back what was set aside for work that never reported."""

    hold_id: HoldId


@handles(ExpireHold)
def expire_hold(command: ExpireHold, write: WriteSide) -> None:
    write.get(CreditAccount, account_of(command.tenant_id)).expire_hold(command.hold_id, write.now)


@dataclass
class Clock:
    """Told how late it is."""

    now: datetime = field(default_factory=lambda: datetime(2026, 3, 1, 12, tzinfo=UTC))

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=7)
        return self.now

    def pass_(self, **span: float) -> None:
        self.now += timedelta(**span)


@dataclass
class World:
    """Everything a test of the read side needs."""

    dsn: str
    log: PostgresEventLog
    records: Records
    bus: Bus
    clock: Clock
    pool: Pool
    keys: MemoryKeyRing

    def runner(self, **options: Any) -> Runner:
        return Runner(self.pool, deadline, self.log, self.records, **options)

    def db(self, runner: Runner) -> ReadSide:
        return ReadSide(self.pool, deadline, runner.caught_up)

    async def heads(self) -> dict[int, int]:
        return await self.log.heads()

    async def query(self, text: str, *arguments: Any) -> list[tuple[Any, ...]]:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(text.encode(), arguments)
            return await cursor.fetchall() if cursor.description else []

    async def dump(self, projections: Sequence[Projection]) -> dict[str, list[str]]:
        """Every row of the projections' tables, byte for byte, in the order of the keys."""
        found = {}
        for projection in projections:
            for table in table_names(projection):
                rows = await self.query(f"SELECT t::text FROM {table} t ORDER BY t::text")
                found[table] = [row[0] for row in rows]
        return found


@asynccontextmanager
async def world_on(dsn: str) -> AsyncIterator[World]:
    """Open both sides on an empty database."""
    log = PostgresEventLog(dsn)
    await log.migrate()
    await log.open()
    keys, clock = MemoryKeyRing(), Clock()
    records = Records(keys, MemoryObjectStore())
    try:
        async with open_pool(dsn, 6) as pool:
            async with pool.connection() as connection:
                await migrate(connection)
            yield World(dsn, log, records, Bus(log, records, PLENTY, clock), clock, pool, keys)
    finally:
        await log.close()


@asynccontextmanager
async def running(runner: Runner) -> AsyncIterator[Runner]:
    """The runner at work while the block runs."""
    task = asyncio.create_task(runner.run())
    try:
        assert await runner.ready(WAIT_S), "the projections were not built in time"
        yield runner
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def all_applied(world: World, runner: Runner) -> None:
    """Wait until the read models show everything that is in the log."""
    for shard, head in (await world.heads()).items():
        assert await runner.caught_up(shard, head, WAIT_S), f"shard {shard} is not at {head}"


# --- the story --------------------------------------------------------------------------------------------------


@dataclass
class Person:
    """A user with an agent, and what this person does."""

    world: World
    user_id: UserId
    number: int

    @property
    def agent_id(self) -> UUID:
        return agent_of(self.number)

    @property
    def account_id(self) -> UUID:
        return account_of(self.user_id)

    async def does(self, command: Command, by: str = "") -> Outcome:
        return await self.world.bus.execute(command, by=by or f"user:{self.user_id}")

    async def signs_up(self) -> None:
        tenant = self.user_id
        name = f"Ada {self.number} \u2713"
        await self.does(users.RegisterUser(tenant_id=tenant, email=f"a{self.number}@example.org", name=name))
        await self.does(users.LogIn(tenant_id=tenant))
        await self.does(
            users.IssueUserKey(
                tenant_id=tenant, key_id=f"u{self.number}", name="laptop", prefix="osh_u", digest="d1"
            )
        )

    async def makes_agent(self) -> None:
        tenant, agent_id = self.user_id, agent_of(self.number)
        await self.does(
            agents.CreateAgent(
                tenant_id=tenant,
                number=self.number,
                name="Helper",
                configuration={"system_prompt": "Be brief.", "zeta": {"b": 1, "a": [1, 2.5, None]}},
            )
        )
        patch = {"name": "Better", "configuration": {"zeta": {"b": None, "c": "\u00e9"}, "use_rag": False}}
        await self.does(agents.ChangeAgent(tenant_id=tenant, agent_id=agent_id, patch=patch))
        await self.does(agents.TrainAgent(tenant_id=tenant, agent_id=agent_id))
        await self.does(agents.TestAgent(tenant_id=tenant, agent_id=agent_id))
        tool = {"name": "weather", "url": "https://example.org/w"}
        await self.does(agents.AddCustomTool(tenant_id=tenant, agent_id=agent_id, tool=tool))
        tool = {"name": "weather", "url": "https://example.org/w2"}
        await self.does(
            agents.ChangeCustomTool(tenant_id=tenant, agent_id=agent_id, name="weather", tool=tool)
        )
        await self.does(agents.PublishAgent(tenant_id=tenant, agent_id=agent_id))
        await self.does(
            agents.IssueAgentKey(
                tenant_id=tenant,
                agent_id=agent_id,
                key_id=f"a{self.number}",
                name="site",
                prefix="osh_a",
                digest="d2",
            )
        )

    async def asks(
        self,
        text: str,
        name: str | None = None,
        conversation: UUID | None = None,
        callback_url: str | None = None,
    ) -> TurnId:
        turn_id = TurnId(uuid4())
        agent_id = agent_of(self.number)
        conversation_id = (
            named_conversation(agent_id, name) if name else ConversationId(conversation or uuid4())
        )
        await self.does(
            turns.SendMessage(
                tenant_id=self.user_id,
                turn_id=turn_id,
                conversation_id=conversation_id,
                beginning="named" if name else "existing" if conversation else "new",
                name=name,
                agent_id=agent_id,
                content=text,
                channel="api",
                mode="async",
                meter=MESSAGE,
                by_owner=True,
                callback_url=callback_url,
            )
        )
        return turn_id

    async def model_starts(self, turn_id: TurnId, iteration: int = 1, attempt: int = 1) -> None:
        await self.does(
            turns.StartModelCall(
                tenant_id=self.user_id,
                turn_id=turn_id,
                action=AskModel(iteration, attempt, True, None),
                plan=turns.ModelCallPlan(
                    provider="offline",
                    model="extractive",
                    worker=WORKER,
                    deadline_at=self.world.clock.now + timedelta(seconds=60),
                    history_versions=(1, 2),
                    history_count=1,
                    prompt_digest="p",
                    tools_offered=("calculator",),
                    with_tools=True,
                ),
            ),
            by=f"worker:{WORKER}",
        )

    async def model_says(self, turn_id: TurnId, text: str, *asked: AskedTool, iteration: int = 1) -> None:
        await self.does(
            turns.CompleteModelCall(
                tenant_id=self.user_id,
                turn_id=turn_id,
                call_id=call_of(turn_id, iteration),
                attempt=1,
                text=text,
                finish_reason="tool_calls" if asked else "stop",
                asked=asked,
                usage=TokenUsage(11, 7, 3, 0, "provider"),
                latency_ms=40 + iteration,
                ttft_ms=9,
            ),
            by=f"worker:{WORKER}",
        )

    async def model_fails(self, turn_id: TurnId, error_class: ModelErrorClass) -> None:
        await self.does(
            turns.FailModelCall(
                tenant_id=self.user_id,
                turn_id=turn_id,
                call_id=call_of(turn_id, 1),
                attempt=1,
                error_class=error_class,
                sentence="The provider said no.",
            ),
            by=f"worker:{WORKER}",
        )

    async def tool_runs(self, turn_id: TurnId, tool_call_id: ToolCallId, result: str) -> None:
        at = self.world.clock.now + timedelta(seconds=60)
        start = turns.StartToolCall(
            tenant_id=self.user_id,
            turn_id=turn_id,
            tool_call_id=tool_call_id,
            worker=WORKER,
            deadline_at=at,
        )
        await self.does(start, by=f"worker:{WORKER}")
        await self.does(
            turns.CompleteToolCall(
                tenant_id=self.user_id,
                turn_id=turn_id,
                tool_call_id=tool_call_id,
                attempt=1,
                outcome="succeeded",
                text=result,
                latency_ms=5,
                units={},
                error_class=None,
            ),
            by=f"worker:{WORKER}",
        )

    async def tool_is_lost(self, turn_id: TurnId, tool_call_id: ToolCallId) -> None:
        at = self.world.clock.now + timedelta(seconds=60)
        of_call = {"tenant_id": self.user_id, "turn_id": turn_id, "tool_call_id": tool_call_id}
        await self.does(turns.StartToolCall(**of_call, worker=WORKER, deadline_at=at))
        await self.does(
            turns.RetakeToolCall(**of_call, lost_worker=WORKER, worker="turns-2/b", deadline_at=at)
        )

    async def settles(self, turn_id: TurnId, *meters: str) -> None:
        """What the processor of finished turns does."""
        card = rate_card_at(self.world.clock.now)
        lines = [
            credits_of.ChargeLine(meter, 1, card.price_ncr(meter), card.rate_card_id) for meter in meters
        ]
        origin = Origin(agent_id=agent_of(self.number), turn_id=turn_id, actor=f"user:{self.user_id}")
        await self.does(
            credits_of.SettleHold(
                tenant_id=self.user_id, hold_id=hold_of(turn_id), lines=lines, origin=origin
            ),
            by="worker:credits",
        )

    async def hold_expires(self, turn_id: TurnId) -> None:
        self.world.clock.pass_(hours=3)
        await self.does(ExpireHold(tenant_id=self.user_id, hold_id=hold_of(turn_id)))

    async def is_answered(self, text: str, answer: str, **where: Any) -> TurnId:
        turn_id = await self.asks(text, **where)
        await self.model_starts(turn_id)
        await self.model_says(turn_id, answer)
        await self.settles(turn_id, MESSAGE)
        return turn_id

    async def is_answered_with_a_tool(self, text: str, answer: str) -> TurnId:
        turn_id = await self.asks(text)
        await self.model_starts(turn_id)
        await self.model_says(turn_id, "", calculation())
        await self.tool_runs(turn_id, tool_call_of(turn_id, 1, 0), "4")
        await self.model_starts(turn_id, iteration=2)
        await self.model_says(turn_id, answer, iteration=2)
        await self.settles(turn_id, MESSAGE, "tool_call")
        return turn_id

    async def is_called_back(self, turn_id: TurnId, *status_codes: int) -> None:
        """The callback's receiver answers one attempt after the other with these."""
        of_callback = {"tenant_id": self.user_id, "callback_id": callback_of(turn_id)}
        for attempt, status_code in enumerate(status_codes, 1):
            self.world.clock.pass_(hours=1)
            at = self.world.clock.now + timedelta(seconds=15)
            start = callbacks.StartCallback(**of_callback, worker=WORKER, lost_worker="", deadline_at=at)
            await self.does(start, by=f"worker:{WORKER}")
            came = {**of_callback, "attempt": attempt, "status_code": status_code, "latency_ms": 5}
            if status_code < 300:
                await self.does(callbacks.CompleteCallback(**came), by=f"worker:{WORKER}")
            else:
                failed = callbacks.FailCallback(**came, reason=f"http_{status_code}", retry_after_s=None)
                await self.does(failed, by=f"worker:{WORKER}")

    async def turn(self, turn_id: TurnId) -> Turn:
        return await self.world.bus.read(Turn, turn_id, self.user_id)


def calculation(expression: str = "2+2", effect: Effect = Effect.PURE) -> AskedTool:
    """A wish of a model to run the calculator."""
    arguments = {"expression": expression}
    return AskedTool("ref", "calculator", "builtin", effect, arguments, expression)


def person(world: World, number: int) -> Person:
    """A person with an id of its own."""
    return Person(world, UserId(uuid4()), number)


async def life_of(someone: Person) -> None:
    """Everything that can happen to one person, in one go."""
    await someone.signs_up()
    await someone.makes_agent()
    await talks(someone)
    await is_told(someone)
    await fails(someone)
    await pays(someone)
    await leaves(someone)


async def talks(someone: Person) -> None:
    """Answers, with and without tools, also of a worker that is lost, and a tool without a model."""
    await someone.is_answered("What is it?", "It is \u2603 'quoted' \\ and\ttabbed\nin lines.")
    await someone.is_answered_with_a_tool("2+2?", "4")
    lost = await someone.asks("Send it!")
    await someone.model_starts(lost)
    await someone.model_says(lost, "", calculation("1", Effect.UNSAFE), calculation("2"))
    await someone.tool_is_lost(lost, tool_call_of(lost, 1, 0))
    await someone.tool_runs(lost, tool_call_of(lost, 1, 1), "\u00fcber \x00")
    await someone.model_starts(lost, iteration=2)
    await someone.model_says(lost, "I do not know.", iteration=2)
    await someone.settles(lost, MESSAGE, "tool_call")
    invoked = TurnId(uuid4())
    await someone.does(
        turns.InvokeTool(
            tenant_id=someone.user_id,
            turn_id=invoked,
            agent_id=agent_of(someone.number),
            asked=calculation(),
            mode="sync",
            by_owner=True,
        )
    )
    await someone.tool_runs(invoked, tool_call_of(invoked, 1, 0), "4")
    await someone.settles(invoked, "tool_call")


async def is_told(someone: Person) -> None:
    """Ends that are told to a server of the caller's, at the second attempt, or not at all."""
    for status_codes in ((503, 204), (410,), ()):
        url = "https://example.com/done"
        turn_id = await someone.is_answered("Call me.", "Calling.", callback_url=url)
        await someone.is_called_back(turn_id, *status_codes)


async def fails(someone: Person) -> None:
    """A refusal of the provider, a cancellation, a timeout, and a charge that comes after its hold has expired."""
    tenant = someone.user_id
    await someone.is_answered("again", "and again", name="my thread")
    waiting = [await someone.asks(f"first {n}", name="my thread") for n in range(3)]
    await someone.model_starts(waiting[0])
    await someone.model_fails(waiting[0], ModelErrorClass.REFUSED)
    await someone.settles(waiting[0])
    await someone.does(turns.CancelTurn(tenant_id=tenant, turn_id=waiting[2], reason="changed my mind"))
    await someone.settles(waiting[2])
    late = await someone.asks("Take your time.")
    await someone.model_starts(late)
    await someone.model_says(late, "Done.")
    await someone.hold_expires(late)
    await someone.does(turns.EndOverdueTurn(tenant_id=tenant, turn_id=waiting[1]))
    await someone.settles(waiting[1])
    await someone.settles(late, MESSAGE)


async def pays(someone: Person) -> None:
    """Grants that come and expire, and a balance that falls below the warning and recovers."""
    tenant = someone.user_id
    await someone.does(
        credits_of.GrantCredits(
            tenant_id=tenant,
            grant_id=uuid4(),
            kind="promotion",
            amount_ncr=ncr("12.5"),
            expires_at=someone.world.clock.now + timedelta(hours=1),
        )
    )
    someone.world.clock.pass_(hours=2)
    for n in range(12):
        await someone.is_answered(f"question {n}", f"answer {n}", name=f"thread {n % 2}")
    adjusted = credits_of.GrantCredits(
        tenant_id=tenant, grant_id=uuid4(), kind="adjustment", amount_ncr=ncr("25"), reason="an apology"
    )
    bought = credits_of.GrantCredits(
        tenant_id=tenant,
        grant_id=grant_of_payment(tenant, f"pi_{tenant}"),
        kind="purchase",
        amount_ncr=ncr("25"),
        payment_ref=f"pi_{tenant}",
    )
    for grant in (adjusted, bought, bought):
        await someone.does(grant)
    await someone.does(credits_of.ChangePlan(tenant_id=tenant, plan="starter"))


async def leaves(someone: Person) -> None:
    """Keys are revoked, agents taken away."""
    tenant, agent_id = someone.user_id, agent_of(someone.number)
    await someone.does(users.RevokeUserKey(tenant_id=tenant, key_id=f"u{someone.number}"))
    await someone.does(users.PromoteUser(tenant_id=tenant, role="operator"))
    if someone.number % 2:
        key_id = f"a{someone.number}"
        await someone.does(agents.RevokeAgentKey(tenant_id=tenant, agent_id=agent_id, key_id=key_id))
        await someone.does(agents.UnpublishAgent(tenant_id=tenant, agent_id=agent_id))
        await someone.does(agents.RemoveCustomTool(tenant_id=tenant, agent_id=agent_id, name="weather"))
    else:
        await someone.does(agents.DeleteAgent(tenant_id=tenant, agent_id=agent_id))


async def is_forgotten(someone: Person) -> None:
    """The person is erased; what was personal is so for nobody any more."""
    tenant = someone.user_id
    erase = users.EraseUser(tenant_id=tenant, agent_ids=(agent_of(someone.number),), turn_ids=())
    await someone.does(erase)
    await someone.world.keys.destroy(tenant)
    await someone.does(users.CompleteErasure(tenant_id=tenant, destroyed_keys=2))
