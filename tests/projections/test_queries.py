"""What the API is told: by tenant, in order, page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from uuid import uuid4

import pytest

from adapters.postgres.pool import deadline, open_pool
from domain.money import ncr
from domain.prices import MESSAGE
from projections.agents import get_agent, list_agents
from projections.api_keys import find_key, list_keys
from projections.catching_up import CheckpointWatch
from projections.commands import list_commands
from projections.conversations import (
    Found,
    get_conversation,
    list_conversations,
    list_messages,
    search_messages,
)
from projections.credit_ledger import get_account, list_grants, list_ledger, unsettled_turns
from projections.read_side import ReadSide, ReadSideUnavailable
from projections.requests import get_request, list_requests
from projections.runner import Runner
from projections.tool_calls import list_tool_calls
from projections.turns import get_turn, list_turns
from projections.usage import get_usage
from projections.users import get_user
from tests.projections.world import WAIT_S, Person, World, all_applied, life_of, person, running


@dataclass
class Scene:
    world: World
    runner: Runner
    db: ReadSide
    ada: Person

    async def now(self) -> None:
        await all_applied(self.world, self.runner)


@pytest.fixture
async def scene(world: World) -> AsyncIterator[Scene]:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        ada = person(world, 1)
        await ada.signs_up()
        await ada.makes_agent()
        yield Scene(world, runner, world.db(runner), ada)


async def test_people_agents_and_keys(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    await scene.now()
    user = await get_user(db, ada.user_id)
    assert user is not None
    assert (user.email, user.name, user.role) == ("a1@example.org", "Ada 1 \u2713", "user")
    agent = await get_agent(db, ada.user_id, 1)
    assert agent is not None
    assert (agent.name, agent.status, agent.published_version) == ("Better", "published", 3)
    assert list(agent.configuration) == ["system_prompt", "zeta", "use_rag"]
    assert agent.configuration["zeta"] == {"a": [1, 2.5, None], "c": "\u00e9"}
    assert agent.custom_tools == {"weather": {"name": "weather", "url": "https://example.org/w2"}}
    assert await get_agent(db, uuid4(), 1) is None
    assert await list_agents(db, ada.user_id) == [agent]
    assert await list_agents(db, ada.user_id, after=agent.after) == []
    key = await find_key(db, "a1")
    assert key is not None
    assert (key.kind, key.agent_number, key.agent_published, key.digest) == ("agent", 1, True, "d2")
    assert await list_keys(db, ada.user_id, ada.agent_id) == [key]
    assert [each.key_id for each in await list_keys(db, ada.user_id, None)] == ["u1"]
    assert await find_key(db, "nobody") is None


async def test_keys_of_a_deleted_agent_are_revoked(scene: Scene) -> None:
    two = person(scene.world, 2)
    await life_of(two)
    await scene.now()
    key = await find_key(scene.db, "a2")
    assert key is not None
    assert key.revoked_at is not None
    assert not key.agent_published
    assert await get_agent(scene.db, two.user_id, 2) is None


async def test_a_request_from_its_question_to_its_answer(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    turn_id = await ada.asks("2+2?", name="sums")
    queued = await ada.asks("and now?", name="sums")
    await scene.now()
    request = await get_request(db, ada.user_id, turn_id, ada.agent_id)
    assert request is not None
    assert (request.status, request.question, request.response) == ("pending", "2+2?", None)
    assert request.conversation_name == "sums"
    waiting = await get_request(db, ada.user_id, queued)
    assert waiting is not None
    assert waiting.queued
    await ada.model_starts(turn_id)
    await scene.now()
    request = await get_request(db, ada.user_id, turn_id)
    assert request is not None
    assert request.status == "processing"
    await ada.model_says(turn_id, "4")
    await scene.now()
    request = await get_request(db, ada.user_id, turn_id)
    assert request is not None
    assert (request.status, request.response, request.charged_ncr) == ("completed", "4", ncr("3"))
    waiting = await get_request(db, ada.user_id, queued)
    assert waiting is not None
    assert not waiting.queued
    assert await unsettled_turns(db, ada.user_id) == [turn_id]
    await ada.settles(turn_id, MESSAGE)
    await scene.now()
    assert await unsettled_turns(db, ada.user_id) == []
    assert await get_request(db, ada.user_id, turn_id, uuid4()) is None
    assert await get_request(db, uuid4(), turn_id) is None
    newest = await list_requests(db, ada.user_id, agent_id=ada.agent_id, limit=1)
    older = await list_requests(
        db, ada.user_id, conversation_id=request.conversation_id, after=newest[0].after
    )
    assert [each.request_id for each in (*newest, *older)] == [queued, turn_id]


async def test_tool_calls_are_shown_with_the_request(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    turn_id = await ada.is_answered_with_a_tool("2+2?", "four")
    await scene.now()
    request = await get_request(db, ada.user_id, turn_id)
    assert request is not None
    called = {"tool_name": "calculator", "parameters": {"expression": "2+2"}, "result": "4"}
    assert (request.tool_calls, request.iterations) == ([called], 2)
    (call,) = await list_tool_calls(db, ada.user_id, turn_id)
    assert (call.outcome, call.attempts, call.latency_ms) == ("succeeded", 1, 5)
    turn = await get_turn(db, ada.user_id, turn_id)
    assert turn is not None
    assert (turn.model, turn.attempts, turn.input_tokens, turn.model_ms) == ("extractive", 2, 22, 83)
    assert (turn.ttft_ms, turn.outcome, turn.usage_source) == (9, "completed", "provider")
    assert await list_turns(db, ada.user_id) == [turn]


async def test_conversations_and_their_messages(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    for n in range(3):
        await ada.is_answered(f"Question {n} is 100%?", f"Answer {n}", name="thread")
    await scene.now()
    (conversation,) = await list_conversations(db, ada.user_id, ada.agent_id)
    assert (conversation.name, conversation.message_count) == ("thread", 6)
    where = (db, ada.user_id, conversation.conversation_id)
    first = await list_messages(*where, limit=4)
    second = await list_messages(*where, limit=4, after=first[-1].position)
    assert [each.content for each in (*first, *second)][:2] == ["Answer 2", "Question 2 is 100%?"]
    assert len(second) == 2
    assert await list_messages(db, uuid4(), conversation.conversation_id) == []
    found = await search_messages(db, ada.user_id, ada.agent_id, "1 IS 100%")
    assert [each.content for each in found.rows] == ["Question 1 is 100%?"]
    assert found.seen_to is None
    assert await search_messages(db, ada.user_id, ada.agent_id, "1_IS") == Found([], None)
    assert await search_messages(db, ada.user_id, uuid4(), "Question") == Found([], None)
    one = await search_messages(db, ada.user_id, ada.agent_id, "Question", 2)
    two = await search_messages(db, ada.user_id, ada.agent_id, "Question", 2, one.seen_to)
    texts = [[each.content for each in page.rows] for page in (one, two)]
    assert texts == [["Question 2 is 100%?", "Question 1 is 100%?"], ["Question 0 is 100%?"]]
    assert two.seen_to is None
    short = await search_messages(db, ada.user_id, ada.agent_id, "Question 0", searched_max=4)
    assert (short.rows, short.seen_to) == ([], first[-1].position)
    rest = await search_messages(db, ada.user_id, ada.agent_id, "Question 0", after=short.seen_to)
    assert [each.conversation_name for each in rest.rows] == ["thread"]
    assert await get_conversation(db, ada.user_id, ada.agent_id, conversation.conversation_id) == conversation
    assert await get_conversation(db, ada.user_id, uuid4(), conversation.conversation_id) is None


async def test_the_ledger_sums_to_the_balance_and_shows_each_step(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    await life_of(ada2 := person(scene.world, 3))
    open_turn = await ada2.asks("still open")
    await scene.now()
    account = await get_account(db, ada2.user_id)
    assert account is not None
    assert account.held_ncr == ncr("3")
    lines = await list_ledger(db, ada2.user_id, limit=1_000)
    assert sum(line.amount_ncr for line in lines) == account.posted_ncr == lines[0].balance_after_ncr
    for newer, older in pairwise(lines):
        assert newer.balance_after_ncr == older.balance_after_ncr + newer.amount_ncr
    assert len({line.ledger_id for line in lines}) == len(lines)
    pages = await list_ledger(db, ada2.user_id, limit=5)
    assert await list_ledger(db, ada2.user_id, limit=1_000, after=pages[-1].after) == lines[5:]
    grants = await list_grants(db, ada2.user_id)
    assert sum(grant.remaining_ncr for grant in grants) == account.posted_ncr
    assert open_turn not in await unsettled_turns(db, ada2.user_id)
    assert {line.kind for line in lines} == {"grant", "charge", "expiry"}
    whys = {(line.grant_kind, line.reason, line.payment_ref) for line in lines if line.kind == "grant"}
    assert ("adjustment", "an apology", None) in whys
    assert ("purchase", None, f"pi_{ada2.user_id}") in whys
    assert (await list_ledger(db, ada.user_id))[0].meter == "agent_create"


async def test_usage_is_summed_by_what_is_asked_for(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    await ada.is_answered("a", "b")
    await ada.is_answered_with_a_tool("c", "d")
    await scene.now()
    (recorded_at,) = (await scene.world.query("SELECT max(recorded_at) FROM event"))[0]
    today = recorded_at.date()
    yesterday = today - timedelta(days=1)
    by_meter = await get_usage(db, ada.user_id, yesterday, today, ["meter"])
    assert {(row.meter, row.quantity, row.charged_ncr) for row in by_meter} == {
        ("message", 2, ncr("6")),
        ("tool_call", 1, ncr("0.15")),
        ("agent_create", 1, ncr("1.5")),
    }
    assert by_meter[0].day is by_meter[0].agent_id is None
    (total,) = await get_usage(db, ada.user_id, yesterday, today, [])
    assert total.charged_ncr == ncr("7.65")
    assert {row.agent_id for row in await get_usage(db, ada.user_id, yesterday, today, ["agent", "day"])} == {
        ada.agent_id
    }
    assert await get_usage(db, uuid4(), yesterday, today) == []


async def test_commands_are_the_audit_trail(scene: Scene) -> None:
    ada, db = scene.ada, scene.db
    found = await list_commands(db, ada.user_id, limit=200)
    assert found[-1].type == "RegisterUser"
    assert {each.outcome for each in found} == {"accepted"}
    assert (await list_commands(db, None, after=found[0].after))[0] == found[1]


async def test_another_process_waits_by_the_checkpoints(scene: Scene) -> None:
    watch = CheckpointWatch(scene.world.pool, deadline)
    outcome_of = await scene.ada.asks("hello")
    head = (await scene.world.query("SELECT shard, position FROM event WHERE stream_id = %s", outcome_of))[0]
    assert await watch(*head)
    assert not await watch(head[0], head[1] + 1_000, timeout_s=0.05)


async def test_who_waits_before_the_projector_has_begun_is_served_when_it_has(world: World) -> None:
    ada = person(world, 1)
    await ada.signs_up()
    head = (await world.query("SELECT shard, max(position) FROM event GROUP BY shard"))[0]
    watch = CheckpointWatch(world.pool, deadline)
    assert not await watch(*head, timeout_s=0.05)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(watch(*head, timeout_s=WAIT_S))
        await asyncio.sleep(0)
        async with running(world.runner()):
            assert await waiting


async def test_a_database_that_is_gone_is_one_named_error(scene: Scene) -> None:
    async with open_pool(scene.world.dsn, 1) as pool:
        db = ReadSide(pool, deadline, scene.runner.caught_up)
        await pool.close()
        with pytest.raises(ReadSideUnavailable):
            await get_user(db, scene.ada.user_id)
