"""What the bus keeps, on the log in memory and on Postgres."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from uuid import UUID, uuid4

import pytest

from commands.agent import ChangeAgent, CreateAgent, DeleteAgent
from commands.bus import GROUP_MAX, LATEST, Bus, Overloaded
from commands.command import Command, IdempotencyKeyReused, Outcome, RefusedBefore, Result, WriteSide, handles
from commands.credit_account import ChangePlan, GrantCredits, SettleHold
from commands.turn import CancelTurn, SendMessage
from commands.user import LogIn, RegisterUser
from domain.agent import Agent
from domain.conversation import Conversation
from domain.credit_account import ChargeLine, CreditAccount, Origin
from domain.errors import (
    AlreadyExists,
    Conflict,
    ConversationBusy,
    InsufficientCredits,
    InvalidValue,
    NotFound,
    PlanLimitExceeded,
    Refusal,
)
from domain.event_log import Batch, EventLog, LogUnavailable, StoredEvent
from domain.ids import CommandId, ConversationId, TurnId, UserId, account_of, agent_of, hold_of, shard_of
from domain.money import ncr
from domain.plans import UNLIMITED
from domain.turn import Turn
from domain.user import User
from schemas.codec import UnknownEvent
from schemas.records import AnyRecord, Records
from tests.commands.write_side import (
    AGENT_NCR,
    BY,
    CREDITS,
    EVERYTHING,
    TURN_NCR,
    Owner,
    account,
    known,
    log_of,
    rules,
    signed_up,
)
from tests.peers.log_rows import happened, tenant_on

PATIENCE_S = 20.0
MEGABYTE = 1_000_000
SEEDS = (1, 2, 3)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stumble(Command):
    """A command whose handler has a bug."""


@handles(Stumble)
def stumble(command: Stumble, write: WriteSide) -> Result:
    account = write.get(CreditAccount, account_of(command.tenant_id))
    account.change_plan("enterprise")
    raise ZeroDivisionError("a bug")


class CountingLog:
    """A log that counts what is written to it."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self.batches: list[Batch] = []
        self.locks = self.syncs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def append(self, batch: Batch) -> Any:
        self.batches.append(batch)
        return await self._log.append(batch)

    async def sync(self, *arguments: Any) -> Any:
        self.syncs += 1
        return await self._log.sync(*arguments)

    def locked(self, shards: Sequence[int]) -> Any:
        self.locks += 1
        return self._log.locked(shards)


def another(bus: Bus, log: EventLog, records: Records) -> Bus:
    """The bus of another process on the same log."""
    return Bus(log, records, bus.rules)


async def together(*asked: Any) -> list[Any]:
    """What came of each, refusals and all."""
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*asked, return_exceptions=True)


def only(kind: type[T], results: Sequence[Any]) -> list[T]:
    return [result for result in results if isinstance(result, kind)]


async def row_of(log: EventLog, tenant_id: UUID, command_id: UUID) -> Any:
    return (await log.commands([(shard_of(tenant_id), command_id)])).get(command_id)


async def same_as_replayed(bus: Bus, log: EventLog, records: Records, owner: Owner, *ids: UUID) -> None:
    """What the bus has in memory is what its events say."""
    fresh = another(bus, log, records)
    for aggregate_class, id in ((CreditAccount, account_of(owner.tenant_id)), (Agent, owner.agent_id)):
        cached = await bus.read(aggregate_class, id, owner.tenant_id)
        assert known(cached) == known(await fresh.read(aggregate_class, id, owner.tenant_id))
    for id in ids:
        cached_conversation = await bus.read(Conversation, id, owner.tenant_id)
        assert known(cached_conversation) == known(await fresh.read(Conversation, id, owner.tenant_id))


# --- once for ever


async def test_a_command_id_is_served_once_and_answered_with_what_it_gave(
    bus: Bus, log: EventLog, owner: Owner
) -> None:
    command, id = owner.message(), uuid4()
    first = await bus.execute(command, by=BY, command_id=id)
    events = await log_of(log, owner.tenant_id)
    second = await bus.execute(command, by=BY, command_id=id)
    assert not first.seen
    assert second == Outcome(first.result, first.shard, first.position, seen=True)
    assert await log_of(log, owner.tenant_id) == events


async def test_a_command_id_is_served_once_also_by_another_process(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    command, id = owner.message(), uuid4()
    first = await bus.execute(command, by=BY, command_id=id)
    second = await another(bus, log, records).execute(command, by="another key", command_id=id)
    assert (second.seen, second.result, second.position) == (True, first.result, first.position)
    assert (await account(bus, owner)).held_ncr == TURN_NCR


async def test_fifty_equal_commands_at_once_are_one(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    command, id = owner.message(), uuid4()
    buses = (bus, another(bus, log, records))
    outcomes = await together(
        *(buses[number % 2].execute(command, by=BY, command_id=id) for number in range(50))
    )
    assert only(BaseException, outcomes) == []
    assert Counter(outcome.seen for outcome in outcomes) == {True: 49, False: 1}
    assert len({(outcome.position, str(outcome.result)) for outcome in outcomes}) == 1
    assert (await account(another(bus, log, records), owner)).held_ncr == TURN_NCR


async def test_another_payload_under_a_served_id_is_refused(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    id = uuid4()
    command = owner.message("one thing")
    await bus.execute(command, by=BY, command_id=id)
    events = await log_of(log, owner.tenant_id)
    for each in (bus, another(bus, log, records)):
        with pytest.raises(IdempotencyKeyReused) as refused:
            await each.execute(owner.message("another thing"), by=BY, command_id=id)
        assert refused.value.code == "idempotency_key_reused"
    assert await log_of(log, owner.tenant_id) == events


async def test_another_payload_under_an_id_that_is_being_served_is_refused(bus: Bus, owner: Owner) -> None:
    id = uuid4()
    results = await together(
        bus.execute(owner.message("one thing"), by=BY, command_id=id),
        bus.execute(owner.message("another thing"), by=BY, command_id=id),
    )
    assert [type(result) for result in results] == [Outcome, IdempotencyKeyReused]


async def test_a_digest_of_the_callers_own_decides_what_is_the_same(bus: Bus, owner: Owner) -> None:
    id, turn_id = uuid4(), TurnId(uuid4())
    digest = b"the bytes of the request"
    await bus.execute(owner.message("So?", turn_id=turn_id), by=BY, command_id=id, digest=digest)
    again = await bus.execute(owner.message("Or so?", turn_id=turn_id), by=BY, command_id=id, digest=digest)
    assert again.seen


# --- refusals


async def test_a_refusal_is_recorded_and_writes_no_events(log: EventLog, records: Records) -> None:
    bus = Bus(log, records, rules(AGENT_NCR))
    owner = await signed_up(bus)
    events, id = await log_of(log, owner.tenant_id), uuid4()
    with pytest.raises(InsufficientCredits):
        await bus.execute(owner.message(), by=BY, command_id=id)
    assert await log_of(log, owner.tenant_id) == events
    row = await row_of(log, owner.tenant_id, id)
    assert (row.type, row.actor, row.outcome, row.position) == ("SendMessage", BY, "insufficient_credits", 0)
    assert (await account(bus, owner)).available_ncr == 0


async def test_a_refusal_that_may_pass_leaves_the_id_free(log: EventLog, records: Records) -> None:
    bus = Bus(log, records, rules(AGENT_NCR))
    owner = await signed_up(bus)
    command, id = owner.message(), uuid4()
    for _ in range(2):
        with pytest.raises(InsufficientCredits):
            await bus.execute(command, by=BY, command_id=id)
    await bus.execute(
        GrantCredits(
            tenant_id=owner.tenant_id,
            grant_id=uuid4(),
            kind="purchase",
            amount_ncr=ncr("10"),
            expires_at=None,
        ),
        by=BY,
    )
    assert not (await bus.execute(command, by=BY, command_id=id)).seen
    assert (await bus.execute(command, by=BY, command_id=id)).seen
    assert (await row_of(log, owner.tenant_id, id)).outcome == "accepted"


async def test_an_id_left_free_may_be_used_for_something_else(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    first, id = owner.message(), uuid4()
    await bus.execute(first, by=BY)
    busy = owner.message(
        "now", conversation_id=first.conversation_id, beginning="existing", when_busy="reject"
    )
    with pytest.raises(ConversationBusy):
        await bus.execute(busy, by=BY, command_id=id)
    other = owner.message("something else")
    assert not (await bus.execute(other, by="another key", command_id=id)).seen
    assert (await another(bus, log, records).execute(other, by=BY, command_id=id)).seen
    with pytest.raises(IdempotencyKeyReused):
        await bus.execute(busy, by=BY, command_id=id)
    assert (await row_of(log, owner.tenant_id, id)).actor == "another key"


async def test_a_remembered_refusal_is_served_for_ever(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    command, id = ChangePlan(tenant_id=owner.tenant_id, plan="imaginary"), uuid4()
    with pytest.raises(InvalidValue) as refused:
        await bus.execute(command, by=BY, command_id=id)
    for each in (bus, another(bus, log, records)):
        with pytest.raises(RefusedBefore) as again:
            await each.execute(command, by=BY, command_id=id)
        assert (again.value.code, str(again.value)) == (refused.value.code, str(refused.value))
        assert again.value.facts == refused.value.facts


async def test_a_stream_that_exists_is_not_begun_again(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    turn_id = TurnId(uuid4())
    await bus.execute(owner.message(turn_id=turn_id), by=BY)
    again, id = owner.message(turn_id=turn_id), uuid4()
    for each, refusal in ((bus, AlreadyExists), (another(bus, log, records), RefusedBefore)):
        results = await together(
            each.execute(again, by=BY, command_id=id),
            each.execute(again, by=BY),
            each.execute(owner.message(), by=BY),
        )
        assert [type(result) for result in results] == [refusal, AlreadyExists, Outcome]
    assert (await account(another(bus, log, records), owner)).held_ncr == 3 * TURN_NCR


async def test_two_commands_that_begin_the_same_stream_at_once_begin_it_once(bus: Bus, owner: Owner) -> None:
    turn_id = TurnId(uuid4())
    results = await together(*(bus.execute(owner.message(turn_id=turn_id), by=BY) for _ in range(5)))
    assert len(only(Outcome, results)) == 1
    assert len(only(AlreadyExists, results)) == 4
    assert (await account(bus, owner)).held_ncr == TURN_NCR


# --- neighbours


async def test_a_handlers_bug_fails_its_own_command_only(bus: Bus, log: EventLog, owner: Owner) -> None:
    stumbling = Stumble(tenant_id=owner.tenant_id)
    results = await together(
        bus.execute(owner.message(), by=BY),
        bus.execute(stumbling, by=BY),
        bus.execute(owner.message(), by=BY),
        bus.execute(stumbling, by=BY),
    )
    assert [type(result) for result in results] == [Outcome, ZeroDivisionError, Outcome, ZeroDivisionError]
    assert (await account(bus, owner)).plan == "free"
    assert (await account(bus, owner)).held_ncr == 2 * TURN_NCR


async def test_a_refusal_leaves_nothing_behind_for_its_neighbours(log: EventLog, records: Records) -> None:
    bus = Bus(log, records, rules(AGENT_NCR + TURN_NCR))
    owner = await signed_up(bus)
    results = await together(*(bus.execute(owner.message(), by=BY) for _ in range(3)))
    assert [type(result) for result in results] == [Outcome, InsufficientCredits, InsufficientCredits]
    assert (await account(bus, owner)).available_ncr == 0


@pytest.mark.parametrize("bad", ["\0", "\ud800"])
async def test_data_that_cannot_be_stored_fails_its_own_command_only(
    bus: Bus, log: EventLog, owner: Owner, bad: str, request: pytest.FixtureRequest
) -> None:
    if "memory" in request.node.name:
        pytest.skip("memory takes any text")
    results = await together(
        bus.execute(owner.message("before"), by=BY),
        bus.execute(owner.message("between"), by=f"share:{bad}"),
        bus.execute(owner.message("after"), by=BY),
    )
    assert [isinstance(result, Outcome) for result in results] == [True, False, True]
    assert not isinstance(results[1], Refusal)
    assert (await account(bus, owner)).held_ncr == 2 * TURN_NCR


async def test_text_that_is_not_unicode_never_reaches_the_queue(bus: Bus, owner: Owner) -> None:
    results = await together(bus.execute(owner.message("\ud800"), by=BY), bus.execute(owner.message(), by=BY))
    assert [type(result) for result in results] == [UnicodeEncodeError, Outcome]


# --- groups


async def test_waiting_commands_are_written_together(log: EventLog, records: Records) -> None:
    counting = CountingLog(log)
    bus = Bus(counting, records, rules())
    owners = [await signed_up(bus) for _ in range(4)]
    counting.batches.clear()
    results = await together(*(bus.execute(owners[n % 4].message(), by=BY) for n in range(100)))
    assert len(only(Outcome, results)) == 100
    assert len(counting.batches) <= 2
    assert max(len(batch.commands) for batch in counting.batches) <= GROUP_MAX
    assert {shard_of(owner.tenant_id) for owner in owners} == set(counting.batches[-1].heads)


async def test_a_patient_command_is_written_with_whatever_comes_next(log: EventLog, records: Records) -> None:
    counting = CountingLog(log)
    bus = Bus(counting, records, rules())
    owner = await signed_up(bus)
    counting.batches.clear()
    patient = asyncio.create_task(bus.execute(owner.message(), by=BY, patience_s=PATIENCE_S))
    await asyncio.sleep(0)
    await together(bus.execute(owner.message(), by=BY), patient)
    assert [len(batch.commands) for batch in counting.batches] == [2]


async def test_a_patient_command_is_written_also_when_nobody_comes(bus: Bus, owner: Owner) -> None:
    by_itself = await asyncio.wait_for(bus.execute(owner.message(), by=BY, patience_s=0.01), PATIENCE_S)
    drained = asyncio.create_task(bus.execute(owner.message(), by=BY, patience_s=PATIENCE_S))
    await asyncio.sleep(0)
    await bus.drain()
    assert not by_itself.seen
    assert drained.done()


async def test_who_was_overtaken_decides_again_on_what_is_new(log: EventLog, records: Records) -> None:
    counting = CountingLog(log)
    bus, other = Bus(counting, records, rules()), Bus(log, records, rules())
    owner = await signed_up(bus)
    opened: list[int] = []

    def counted(open_rows: Any) -> Any:
        async def open_and_count(rows: Any, *types: Any) -> Any:
            opened.append(len(rows))
            return await open_rows(rows, *types)

        return open_and_count

    records.open, records.open_some = counted(records.open), counted(records.open_some)  # type: ignore[method-assign]
    for _ in range(5):
        await other.execute(owner.message(), by=BY)
        opened.clear()
        counting.batches.clear()
        await bus.execute(owner.message(), by=BY)
        assert (len(counting.batches), counting.locks) == (2, 0)
        # The account's and the agent's news, not their whole stories.
        assert sum(opened) <= 2


async def neighbours(bus: Bus, shard: int) -> tuple[Owner, Owner]:
    """Two tenants on one shard."""
    return await signed_up(bus, tenant_on(shard)), await signed_up(bus, tenant_on(shard))


async def test_who_was_overtaken_by_what_concerns_others_is_written_behind_it(
    log: EventLog, records: Records
) -> None:
    counting = CountingLog(log)
    bus, other = Bus(counting, records, rules()), Bus(log, records, rules())
    owner, neighbour = await neighbours(bus, 13)
    told: list[AnyRecord] = []
    rows: list[StoredEvent] = []
    bus.on_commit, bus.on_append = told.extend, lambda _, its_rows: rows.extend(its_rows)
    for _ in range(5):
        await other.execute(neighbour.message(), by=BY)
        counting.batches.clear()
        told.clear()
        rows.clear()
        id = uuid4()
        outcome = await bus.execute(owner.message(), by=BY, command_id=id)
        assert (len(counting.batches), counting.locks) == (1, 0)
        # Where it stands is said as it is, to everybody.
        written = [row for row in await log_of(log, owner.tenant_id) if row.command_id == id]
        assert rows == written and written
        assert [record.position for record in told] == [row.position for row in written]
        assert outcome.position == written[-1].position == (await log.heads())[13]
    # What it has missed it looks at before it decides on the shard again.
    await bus.execute(neighbour.message(), by=BY)
    assert counting.locks == 0
    assert (await account(bus, neighbour)).held_ncr == 6 * TURN_NCR
    for tenant in (owner, neighbour):
        await same_as_replayed(bus, log, records, tenant)
    await dense(log, owner.tenant_id)


async def test_what_was_only_looked_at_must_not_have_changed_either(log: EventLog, records: Records) -> None:
    bus, other = Bus(log, records, rules()), Bus(log, records, rules())
    owner = await signed_up(bus)
    await other.execute(DeleteAgent(tenant_id=owner.tenant_id, agent_id=owner.agent_id), by=BY)
    with pytest.raises(NotFound):
        await bus.execute(owner.message(), by=BY)


async def test_a_look_that_is_older_than_what_was_written_since_does_not_count_as_one(
    log: EventLog, records: Records
) -> None:
    counting, looked, go_on = CountingLog(log), asyncio.Event(), asyncio.Event()
    bus, other = Bus(counting, records, rules()), Bus(log, records, rules())
    owner, neighbour = await neighbours(bus, 15)
    sync = counting.sync

    async def slow_sync(*arguments: Any) -> Any:
        found = await sync(*arguments)
        looked.set()
        await go_on.wait()
        return found

    counting.sync = slow_sync  # type: ignore[method-assign]
    looking = asyncio.create_task(exists(bus, Conversation, uuid4(), owner))
    await looked.wait()
    await other.execute(neighbour.message(), by=BY)
    await bus.execute(owner.message(), by=BY)
    go_on.set()
    assert not await looking
    counting.batches.clear()
    await bus.execute(neighbour.message(), by=BY)
    assert len(counting.batches) == 1
    assert (await account(bus, neighbour)).held_ncr == 2 * TURN_NCR
    await same_as_replayed(bus, log, records, owner)


async def test_what_others_wrote_behind_a_command_before_its_answer_came_is_not_forgotten(
    log: EventLog, records: Records
) -> None:
    counting, written, go_on = CountingLog(log), asyncio.Event(), asyncio.Event()
    bus, other = Bus(counting, records, rules()), Bus(log, records, rules())
    owner = await signed_up(bus)
    append = counting.append

    async def slow_append(batch: Batch) -> Any:
        at = await append(batch)
        written.set()
        await go_on.wait()
        return at

    counting.append = slow_append  # type: ignore[method-assign]
    sending = asyncio.create_task(bus.execute(owner.message(), by=BY))
    await written.wait()
    await other.execute(owner.message(), by=BY)
    # Whoever looks now sees both.
    assert (await bus.read(CreditAccount, account_of(owner.tenant_id), owner.tenant_id, LATEST)).holds
    go_on.set()
    await sending
    bus.hint(await log.heads())
    counting.batches.clear()
    await bus.execute(owner.message(), by=BY)
    assert len(counting.batches) == 1
    assert (await account(bus, owner)).held_ncr == 3 * TURN_NCR
    await same_as_replayed(bus, log, records, owner)


class Forgetful(CountingLog):
    """A log that loses something: a request to append, the answer to one, or a look. Others may be faster than an append."""

    loses: Literal["request", "answer", "look"] | None = None
    faster: Callable[[], Awaitable[Any]] | None = None

    async def append(self, batch: Batch) -> Any:
        faster, self.faster = self.faster, None
        if faster is not None:
            await faster()
        self._lose("request")
        at = await super().append(batch)
        self._lose("answer")
        return at

    async def sync(self, *arguments: Any) -> Any:
        self._lose("look")
        return await super().sync(*arguments)

    def _lose(self, what: str) -> None:
        if self.loses == what:
            self.loses = None
            raise LogUnavailable(f"the {what} was lost")


async def test_a_command_that_somebody_else_was_faster_with_is_theirs_whatever_is_lost(
    log: EventLog, records: Records
) -> None:
    forgetful = Forgetful(log)
    bus, other = Bus(forgetful, records, rules()), Bus(log, records, rules())
    owner = await signed_up(bus)
    command, id = owner.message(), uuid4()
    forgetful.faster = lambda: other.execute(command, by=BY, command_id=id)
    forgetful.loses = "look"
    outcome = await bus.execute(command, by=BY, command_id=id)
    assert (outcome.seen, forgetful.loses) == (True, None)


async def test_a_command_written_behind_others_whose_answer_is_lost_is_its_callers(
    log: EventLog, records: Records
) -> None:
    forgetful = Forgetful(log)
    bus, other = Bus(forgetful, records, rules()), Bus(log, records, rules())
    owner, neighbour = await neighbours(bus, 14)

    async def others_are_faster() -> None:
        await other.execute(neighbour.message(), by=BY)

    for number in range(1, 4):
        forgetful.loses, forgetful.faster = "answer", others_are_faster
        command, id = owner.message(), uuid4()
        outcome = await bus.execute(command, by=BY, command_id=id)
        assert not outcome.seen
        row = await row_of(log, owner.tenant_id, id)
        assert outcome.position == row.position == (await log.heads())[14]
        assert (await account(bus, owner)).held_ncr == number * TURN_NCR
        # Asked for again it has been served, whatever gets lost now.
        forgetful.loses, forgetful.faster = "request", others_are_faster
        again = await bus.execute(command, by=BY, command_id=id)
        assert (again.seen, again.position) == (True, outcome.position)
    await same_as_replayed(bus, log, records, owner)


async def test_a_group_has_a_limit(log: EventLog, records: Records) -> None:
    counting = CountingLog(log)
    bus = Bus(counting, records, rules())
    owner = await signed_up(bus)
    counting.batches.clear()
    await together(*(bus.execute(owner.message(), by=BY) for _ in range(2 * GROUP_MAX + 1)))
    assert [len(batch.commands) for batch in counting.batches] == [GROUP_MAX, GROUP_MAX, 1]


async def test_events_come_back_in_the_order_in_which_they_were_decided(
    bus: Bus, log: EventLog, owner: Owner
) -> None:
    heard: list[AnyRecord] = []
    bus.on_commit = heard.extend
    await together(*(bus.execute(owner.message(), by=BY) for _ in range(20)))
    rows = await log_of(log, owner.tenant_id)
    assert [(record.position, record.type) for record in heard] == [
        (row.position, row.type) for row in rows[-len(heard) :]
    ]
    await dense(log, owner.tenant_id)


async def test_who_waits_hears_after_everybody_was_told(bus: Bus, owner: Owner) -> None:
    told: list[CommandId] = []
    bus.on_commit = lambda records: told.extend(CommandId(record.command_id) for record in records)
    id = uuid4()
    await bus.execute(owner.message(), by=BY, command_id=id)
    assert id in told


async def test_what_caused_a_command_is_kept_with_its_events(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    heard: list[AnyRecord] = []
    bus.on_commit = heard.extend
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    first = uuid4()
    await bus.execute(owner.message(), by=BY, command_id=first, traceparent=trace)
    cause = heard[0]
    await bus.execute(owner.message(), by="worker:1", caused_by=cause)
    row = (await log_of(log, owner.tenant_id))[-1]
    assert (row.correlation_id, row.causation_id, row.actor) == (first, cause.event_id, "worker:1")
    assert row.traceparent == trace


# --- money and limits under load


async def test_a_hundred_messages_at_once_with_credit_for_ten_are_ten_turns(
    log: EventLog, records: Records
) -> None:
    bus = Bus(log, records, rules(AGENT_NCR + 10 * TURN_NCR))
    owner = await signed_up(bus)
    buses = (bus, another(bus, log, records))
    results = await together(*(buses[number % 2].execute(owner.message(), by=BY) for number in range(100)))
    assert len(only(Outcome, results)) == 10
    assert len(only(InsufficientCredits, results)) == 90
    after = await account(another(bus, log, records), owner)
    assert (after.available_ncr, after.held_ncr, len(after.holds)) == (0, 10 * TURN_NCR, 10)


async def test_a_plans_limit_cannot_be_raced(log: EventLog, records: Records) -> None:
    limits = {**UNLIMITED, "message": 5}
    bus = Bus(log, records, rules(plans={"free": limits}))
    owner = await signed_up(bus)
    buses = (bus, another(bus, log, records))
    results = await together(*(buses[n % 2].execute(owner.message(), by=BY) for n in range(40)))
    assert len(only(Outcome, results)) == 5
    assert len(only(PlanLimitExceeded, results)) == 35


async def test_a_new_user_gets_the_free_credits_once(bus: Bus, log: EventLog, records: Records) -> None:
    tenant = UserId(uuid4())
    await bus.execute(RegisterUser(tenant_id=tenant, email="a@example.com", name="A"), by=BY)
    buses = (bus, another(bus, log, records))
    results = await together(*(buses[n % 2].execute(LogIn(tenant_id=tenant), by=BY) for n in range(20)))
    assert Counter(outcome.result["first"] for outcome in results) == {True: 1, False: 19}
    after = await another(bus, log, records).read(CreditAccount, account_of(tenant), tenant)
    assert after.available_ncr == ncr(str(CREDITS))


@pytest.mark.parametrize("seed", SEEDS)
async def test_two_processes_on_one_account_lose_nothing(log: EventLog, records: Records, seed: int) -> None:
    """Both hold, settle, grant and resend at random; the account is exact and its streams are dense."""
    chance = random.Random(seed)
    first = Bus(log, records, rules())
    owner = await signed_up(first)
    buses = (first, another(first, log, records))
    price_ncr, granted_ncr = TURN_NCR, ncr("7")
    held: list[TurnId] = []
    spent, grants = 0, 0
    open_turns: set[TurnId] = set()
    for _ in range(6):
        asked: list[tuple[Bus, Command, UUID]] = []
        for _ in range(chance.randint(5, 30)):
            asked.append((chance.choice(buses), owner.message(), uuid4()))
        for turn_id in chance.sample(sorted(open_turns), min(len(open_turns), chance.randint(0, 12))):
            lines = [ChargeLine("message", 1, price_ncr, "rc-1")]
            settle = SettleHold(
                tenant_id=owner.tenant_id,
                hold_id=hold_of(turn_id),
                lines=lines,
                origin=Origin(turn_id=turn_id),
            )
            # The same from both, as after a redelivery.
            asked += [(bus, settle, hold_of(turn_id)) for bus in buses]
            spent, open_turns = spent + 1, open_turns - {turn_id}
        grant = GrantCredits(
            tenant_id=owner.tenant_id, grant_id=uuid4(), kind="promotion", amount_ncr=granted_ncr
        )
        asked += [(bus, grant, uuid4()) for bus in buses]
        grants += 1
        chance.shuffle(asked)
        results = await together(*(bus.execute(command, by=BY, command_id=id) for bus, command, id in asked))
        assert only(BaseException, results) == []
        sent = [command.turn_id for _, command, _ in asked if isinstance(command, SendMessage)]
        held, open_turns = held + sent, open_turns | set(sent)
    for bus in (*buses, another(first, log, records)):
        after = await account(bus, owner) if bus not in buses else await refreshed(bus, log, owner)
        assert set(after.holds) == {hold_of(turn_id) for turn_id in open_turns}
        assert after.held_ncr == price_ncr * len(open_turns)
        expected_ncr = ncr(str(CREDITS)) - AGENT_NCR + grants * granted_ncr - spent * price_ncr
        assert after.posted_ncr == expected_ncr
        assert after.available_ncr == expected_ncr - after.held_ncr
    await dense(log, owner.tenant_id)
    await same_as_replayed(first, log, records, owner)


async def refreshed(bus: Bus, log: EventLog, owner: Owner) -> CreditAccount:
    """The account after the bus was told that others may have written."""
    bus.hint(await log.heads())
    await bus.execute(ChangePlan(tenant_id=owner.tenant_id, plan="free"), by=BY)
    return await account(bus, owner)


async def dense(log: EventLog, tenant_id: UUID) -> None:
    rows = await log.read_after({shard_of(tenant_id): 0}, EVERYTHING)
    assert [row.position for row in rows] == list(range(1, len(rows) + 1))
    versions: dict[UUID, int] = {}
    for row in rows:
        assert row.stream_version == versions.get(row.stream_id, 0) + 1
        versions[row.stream_id] = row.stream_version


# --- memory


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_is_kept_in_memory_equals_what_is_replayed(
    bus: Bus, log: EventLog, records: Records, owner: Owner, seed: int
) -> None:
    chance = random.Random(seed)
    buses = (bus, another(bus, log, records))
    conversations = [owner.message().conversation_id for _ in range(3)]
    turns: list[TurnId] = []
    for _ in range(60):
        turn_id = TurnId(uuid4())
        commands: list[Command] = [
            owner.message(
                turn_id=turn_id,
                conversation_id=chance.choice(conversations),
                beginning="named",
                name="thread",
                when_busy=chance.choice(["queue", "reject", "interrupt"]),
            ),
            ChangeAgent(
                tenant_id=owner.tenant_id,
                agent_id=owner.agent_id,
                patch={"configuration": {"temperature": chance.randint(0, 2), "nested": {"n": len(turns)}}},
            ),
        ]
        if turns:
            cancelled = chance.choice(turns)
            commands.append(CancelTurn(tenant_id=owner.tenant_id, turn_id=cancelled))
        command = chance.choice(commands)
        result = (await together(chance.choice(buses).execute(command, by=BY)))[0]
        assert isinstance(result, Outcome | Refusal), result
        if isinstance(result, Outcome) and isinstance(command, SendMessage):
            turns.append(turn_id)
    for each in buses:
        await refreshed(each, log, owner)
        begun = [id for id in conversations if await exists(each, Conversation, id, owner)]
        await same_as_replayed(each, log, records, owner, *begun)


@pytest.mark.parametrize("seed", SEEDS)
async def test_processes_that_share_a_shard_keep_what_is_replayed_however_they_overtake_each_other(
    log: EventLog, records: Records, seed: int
) -> None:
    chance = random.Random(seed)
    first = Bus(log, records, rules())
    owners = [await signed_up(first, tenant_on(seed)) for _ in range(3)]
    buses = (first, another(first, log, records), another(first, log, records))
    threads = {owner: [owner.message().conversation_id for _ in range(2)] for owner in owners}
    sent: Counter[Owner] = Counter()
    for _ in range(25):
        asked: list[tuple[Bus, Command]] = []
        for _ in range(chance.randint(1, 6)):
            owner = chance.choice(owners)
            thread = chance.choice(threads[owner])
            message = owner.message(conversation_id=thread, beginning="named", name=str(thread))
            patch = {"configuration": {"temperature": chance.randint(0, 2)}}
            change = ChangeAgent(tenant_id=owner.tenant_id, agent_id=owner.agent_id, patch=patch)
            command = chance.choice([message, change])
            sent[owner] += command is message
            asked.append((chance.choice(buses), command))
        results = await together(*(bus.execute(command, by=BY) for bus, command in asked))
        assert only(BaseException, results) == []
        if chance.random() < 0.3:
            chance.choice(buses).hint(await log.heads())
    for each in buses:
        for owner in owners:
            assert (await refreshed(each, log, owner)).held_ncr == TURN_NCR * sent[owner]
            begun = [id for id in threads[owner] if await exists(each, Conversation, id, owner)]
            await same_as_replayed(each, log, records, owner, *begun)
    await dense(log, owners[0].tenant_id)


async def exists(bus: Bus, aggregate_class: type[Any], id: UUID, owner: Owner) -> bool:
    try:
        await bus.read(aggregate_class, id, owner.tenant_id)
    except NotFound:
        return False
    return True


async def test_an_ended_turn_is_read_from_the_log(bus: Bus, owner: Owner) -> None:
    command = owner.message()
    await bus.execute(command, by=BY)
    await bus.execute(CancelTurn(tenant_id=owner.tenant_id, turn_id=command.turn_id), by=BY)
    turn = await bus.read(Turn, command.turn_id, owner.tenant_id)
    assert turn.outcome == "cancelled"
    with pytest.raises(Conflict):
        await bus.execute(CancelTurn(tenant_id=owner.tenant_id, turn_id=command.turn_id), by=BY)


async def test_reading_while_writing_never_gives_less_than_was_written(bus: Bus, owner: Owner) -> None:
    async def write() -> None:
        for number in range(1, 31):
            await bus.execute(owner.message(), by=BY)
            assert (await account(bus, owner)).held_ncr >= number * TURN_NCR

    async def read() -> None:
        for _ in range(60):
            await account(bus, owner)
            await asyncio.sleep(0)

    results = await together(write(), read())
    assert results == [None, None]


async def test_a_reader_that_was_first_does_not_spoil_what_is_decided_next(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    fresh = another(bus, log, records)
    await account(fresh, owner)
    await bus.execute(owner.message(), by=BY)
    await fresh.execute(owner.message(), by=BY)
    assert (await account(fresh, owner)).held_ncr == 2 * TURN_NCR


async def test_a_reader_that_knows_of_a_version_never_gets_an_older_one(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    other = another(bus, log, records)
    stale = await account(other, owner)
    id = account_of(owner.tenant_id)
    for number in range(1, 4):
        await bus.execute(owner.message(), by=BY)
        version = stale.version + number
        assert (await other.read(CreditAccount, id, owner.tenant_id, version)).version == version
    await other.execute(owner.message(), by=BY)
    assert (await account(other, owner)).held_ncr == 4 * TURN_NCR


async def test_who_has_read_what_another_process_wrote_need_not_look_again_to_decide_on_it(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    counting = CountingLog(log)
    there = Bus(counting, records, bus.rules)
    log_in = LogIn(tenant_id=owner.tenant_id)
    await there.execute(log_in, by=BY)
    await bus.execute(owner.message(), by=BY)
    seen = await account(bus, owner)
    await there.read(CreditAccount, seen.id, owner.tenant_id, seen.version)
    synced, appended = counting.syncs, len(counting.batches)
    await there.execute(log_in, by=BY)
    assert (counting.syncs, len(counting.batches)) == (synced, appended + 1)


async def test_what_somebody_else_has_begun_since_is_found(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    other, command = another(bus, log, records), owner.message()
    with pytest.raises(NotFound):
        await other.read(Turn, command.turn_id, owner.tenant_id)
    await bus.execute(command, by=BY)
    assert (await other.read(Turn, command.turn_id, owner.tenant_id)).outcome is None


# --- told by others


@dataclass(slots=True)
class Told:
    """What a process tells of its appends."""

    rows: list[StoredEvent]

    def __call__(self, records: Sequence[AnyRecord], rows: Sequence[StoredEvent]) -> None:
        self.rows += rows

    async def to(self, bus: Bus, *, begun: bool = False) -> Sequence[AnyRecord]:
        heads = {row.shard: row.position for row in self.rows}
        rows, self.rows = self.rows, []
        return await bus.take_in(heads, rows, begun=begun)


def telling(bus: Bus) -> Told:
    bus.on_append = told = Told([])
    return told


async def test_who_is_told_what_another_process_wrote_decides_on_it_without_a_look(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    counting, told = CountingLog(log), telling(bus)
    there = Bus(counting, records, bus.rules)
    await there.execute(owner.message(), by=BY)
    await told.to(there)
    synced, appended = counting.syncs, len(counting.batches)
    for number in range(2, 5):
        await bus.execute(owner.message(), by=BY)
        await told.to(there)
        assert (await account(there, owner)).held_ncr == number * TURN_NCR
    await there.execute(owner.message(), by=BY)
    assert (counting.syncs, len(counting.batches)) == (synced, appended + 1)


async def test_what_begins_elsewhere_is_known_to_who_wants_to_know_it(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    counting, told = CountingLog(log), telling(bus)
    there = Bus(counting, records, bus.rules)
    await account(there, owner)
    unknown, known_, wanted = owner.message(), owner.message(), []
    for message, begun in ((unknown, False), (known_, True)):
        await bus.execute(message, by=BY)
        wanted = [record.type for record in await told.to(there, begun=begun)]
    assert {"Turn.Accepted", "Conversation.Started", "Conversation.MessageSent"} <= set(wanted)
    synced = counting.syncs
    assert (await there.read(Turn, known_.turn_id, owner.tenant_id)).outcome is None
    assert counting.syncs == synced
    assert (await there.read(Turn, unknown.turn_id, owner.tenant_id)).outcome is None
    assert counting.syncs == synced + 1


async def test_who_was_not_told_everything_looks_before_deciding(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    counting, told = CountingLog(log), telling(bus)
    there = Bus(counting, records, bus.rules)
    await account(there, owner)
    await bus.execute(owner.message(), by=BY)
    told.rows = told.rows[1:]
    await told.to(there)
    synced, appended = counting.syncs, len(counting.batches)
    await there.execute(owner.message(), by=BY)
    assert (counting.syncs, len(counting.batches)) == (synced + 1, appended + 1)
    assert (await account(there, owner)).held_ncr == 2 * TURN_NCR


async def test_what_cannot_be_understood_of_what_one_is_told_is_left_to_be_looked_up(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    counting, told = CountingLog(log), telling(bus)
    there = Bus(counting, records, bus.rules)
    await account(there, owner)
    await bus.execute(owner.message(), by=BY)
    told.rows = [row._replace(schema_version=1_000) for row in told.rows]
    assert not await told.to(there, begun=True)
    synced = counting.syncs
    await there.execute(owner.message(), by=BY)
    assert counting.syncs == synced + 1
    assert (await account(there, owner)).held_ncr == 2 * TURN_NCR


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_is_lost_doubled_or_late_of_what_one_is_told_changes_nothing(
    bus: Bus, log: EventLog, records: Records, owner: Owner, seed: int
) -> None:
    rng, asked = random.Random(seed), 0
    both = [bus, another(bus, log, records)]
    tellers = [telling(each) for each in both]
    late: list[tuple[Bus, Told]] = []

    async def tell() -> None:
        for teller, there in zip(tellers, reversed(both), strict=True):
            rows, teller.rows = teller.rows, []
            for _ in range(rng.choice((0, 1, 1, 1, 2))):
                late.append((there, Told(list(rows))))
        while late and rng.random() < 0.8:
            there, told = late.pop(rng.randrange(len(late)) if rng.random() < 0.3 else 0)
            await told.to(there, begun=rng.random() < 0.5)

    while asked < 40:
        count = rng.randint(1, 3)
        commands = [rng.choice(both).execute(owner.message(), by=BY) for _ in range(count)]
        results = await together(*commands, tell())
        assert len(only(Outcome, results)) == count, results
        asked += count
    fresh = another(bus, log, records)
    expected = (await account(fresh, owner)).held_ncr
    assert expected == asked * TURN_NCR
    for each in both:
        await each.execute(owner.message(), by=BY)
        expected += TURN_NCR
        assert (await account(each, owner)).held_ncr == expected


# --- what a newer version of the program wrote


@pytest.mark.parametrize("told", ["at once", "later", "never"])
async def test_an_event_from_the_future_stops_its_own_stream_only(
    bus: Bus, log: EventLog, owner: Owner, told: str
) -> None:
    named: dict[str, Any] = {"beginning": "named", "name": "thread"}
    ours, theirs = ConversationId(uuid4()), ConversationId(uuid4())
    for conversation_id in (ours, theirs):
        await bus.execute(owner.message(conversation_id=conversation_id, **named), by=BY)
    version = (await bus.read(Conversation, theirs, owner.tenant_id)).version
    (row,) = await happened(log, owner.tenant_id, theirs, version + 1)
    if told == "at once":
        assert not await bus.take_in({row.shard: row.position}, [row])
    elif told == "later":
        bus.hint({row.shard: row.position})

    reads = [bus.read(Conversation, id, owner.tenant_id, LATEST) for id in (ours, theirs)]
    found, unreadable = await together(*reads)
    assert (found.id, type(unreadable)) == (ours, UnknownEvent)
    on_ours, on_theirs, on_another = await together(
        bus.execute(owner.message(conversation_id=ours, **named), by=BY),
        bus.execute(owner.message(conversation_id=theirs, **named), by=BY),
        bus.execute(owner.message(), by=BY),
    )
    assert (type(on_ours), type(on_theirs), type(on_another)) == (Outcome, UnknownEvent, Outcome)
    assert (await account(bus, owner)).held_ncr == 4 * TURN_NCR


# --- callers


async def test_a_caller_that_goes_away_does_not_take_the_command_along(bus: Bus, owner: Owner) -> None:
    command, id = owner.message(), uuid4()
    caller = asyncio.create_task(bus.execute(command, by=BY, command_id=id))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await bus.drain()
    assert (await bus.execute(command, by=BY, command_id=id)).seen


async def test_a_refused_caller_that_went_away_leaves_no_noise(
    bus: Bus, owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    caller = asyncio.create_task(bus.execute(ChangePlan(tenant_id=owner.tenant_id, plan="no"), by=BY))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait({caller})
    await bus.drain()
    assert caplog.records == []


async def test_more_than_may_wait_are_told_to_come_back(
    bus: Bus, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.bus.WAITING_MAX", 10)
    results = await together(*(bus.execute(owner.message(), by=BY) for _ in range(30)))
    assert len(only(Outcome, results)) == 10
    assert len(only(Overloaded, results)) == 20
    assert isinstance(await bus.execute(owner.message(), by=BY), Outcome)


# --- tenants


async def test_what_is_somebody_elses_does_not_exist(
    bus: Bus, log: EventLog, records: Records, owner: Owner
) -> None:
    # On the same shard, where nothing but the check keeps them apart.
    stranger = await signed_up(bus, tenant_on(shard_of(owner.tenant_id)))
    theirs = owner.message()
    await bus.execute(theirs, by=BY)
    before = await log_of(log, owner.tenant_id)
    for each in (bus, another(bus, log, records)):
        for aggregate_class, id in (
            (Agent, owner.agent_id),
            (Conversation, theirs.conversation_id),
            (Turn, theirs.turn_id),
            (CreditAccount, account_of(owner.tenant_id)),
            (User, owner.tenant_id),
        ):
            with pytest.raises(NotFound):
                await each.read(aggregate_class, id, stranger.tenant_id)  # type: ignore[type-var]
        for command in (
            stranger.message(agent_id=owner.agent_id),
            stranger.message(conversation_id=theirs.conversation_id, beginning="existing"),
            CancelTurn(tenant_id=stranger.tenant_id, turn_id=theirs.turn_id),
            ChangeAgent(tenant_id=stranger.tenant_id, agent_id=owner.agent_id, patch={"name": "mine"}),
        ):
            with pytest.raises(NotFound):
                await each.execute(command, by=BY)
    assert await log_of(log, owner.tenant_id) == before


@pytest.mark.parametrize("apart", [0, 1])
async def test_a_stream_of_another_tenant_is_never_continued(bus: Bus, owner: Owner, apart: int) -> None:
    stranger = await signed_up(bus, tenant_on((shard_of(owner.tenant_id) + apart) % 32))
    theirs = owner.message()
    await bus.execute(theirs, by=BY)
    taken = [
        stranger.message(turn_id=theirs.turn_id),
        stranger.message(conversation_id=theirs.conversation_id, beginning="named", name="x"),
    ]
    results = await together(
        *(bus.execute(command, by=BY) for command in taken), bus.execute(stranger.message(), by=BY)
    )
    assert isinstance(results[2], Outcome)
    for result in results[:2]:
        # On another shard it is another stream; on the same one there is no second of its id.
        assert isinstance(result, AlreadyExists if apart == 0 else Outcome)
    assert (await bus.read(Turn, theirs.turn_id, owner.tenant_id)).owner_id == owner.tenant_id


# --- large


@pytest.mark.parametrize("chars", [300_000, MEGABYTE])
async def test_large_messages_go_by_reference_and_come_back(
    bus: Bus, log: EventLog, records: Records, owner: Owner, chars: int
) -> None:
    content = "ü" * (chars // 2)
    command = owner.message(content)
    await bus.execute(command, by=BY)
    rows = await log_of(log, owner.tenant_id)
    assert max(len(row.payload) + len(row.personal or b"") for row in rows) < 1_000
    (record,) = [r for r in await records.open(rows) if isinstance(r.event, Conversation.MessageSent)]
    assert record.event.content == content


async def test_what_is_decided_together_is_kept_apart_by_tenant(bus: Bus, owner: Owner) -> None:
    stranger = await signed_up(bus, tenant_on(shard_of(owner.tenant_id)))
    elsewhere = await signed_up(bus, tenant_on((shard_of(owner.tenant_id) + 1) % 32))
    theirs = owner.message()
    stolen = [
        who.message(**what)
        for who in (stranger, elsewhere)
        for what in (
            {"agent_id": owner.agent_id},
            {"conversation_id": theirs.conversation_id, "beginning": "existing"},
        )
    ]
    results = await together(*(bus.execute(command, by=BY) for command in (theirs, *stolen)))
    assert [type(result) for result in results] == [Outcome, *[NotFound] * len(stolen)]
    assert (await account(bus, owner)).held_ncr == TURN_NCR


async def test_a_large_configuration_goes_by_reference_and_comes_back(
    bus: Bus, log: EventLog, records: Records
) -> None:
    prompt = "p" * 90_000 + "\N{GRINNING FACE}" * 10_000
    owner = await signed_up(
        bus, configuration={"system_prompt": prompt, "notes": "n" * 90_000, "m": "ü" * 9_000}
    )
    change = {"configuration": {"notes": ["ü" * 50_000]}}
    await bus.execute(ChangeAgent(tenant_id=owner.tenant_id, agent_id=owner.agent_id, patch=change), by=BY)
    agent = await another(bus, log, records).read(Agent, owner.agent_id, owner.tenant_id)
    assert agent.configuration["system_prompt"] == prompt
    assert agent.configuration["notes"] == ["ü" * 50_000]


async def test_an_agent_number_that_is_taken_is_refused(bus: Bus, owner: Owner) -> None:
    taken = (await bus.read(Agent, owner.agent_id, owner.tenant_id)).number
    assert agent_of(taken) == owner.agent_id
    with pytest.raises(AlreadyExists):
        await bus.execute(CreateAgent(tenant_id=owner.tenant_id, number=taken, name="Twin"), by=BY)
