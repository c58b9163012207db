"""A message may come with its first model call, claimed by the process that accepts it: one write less, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import pytest

from commands.agent import ChangeAgent
from commands.turn import SendMessage
from domain.ids import ConversationId, TurnId
from domain.prompt import digest_of
from domain.turn import Turn
from schemas.hints import News
from schemas.records import AnyRecord
from stream_processors.agent_turns import step, with_first_call
from stream_processors.eager import Eager
from stream_processors.processor import Work
from tests.commands.write_side import BY, log_of
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import CountedTool, ScriptedModels, Stage, Told, says
from tests.stream_processors.test_agent_turns import ANSWERED

pytestmark = pytest.mark.parametrize("staged", [True], indirect=True, ids=["claimed with the message"])


def work_of(stage: Stage) -> Work:
    return stage.workers[0].work


async def writers_of(stage: Stage, told: Told) -> dict[str, Any]:
    """By kind of event of the turn, the command that wrote it."""
    rows = await log_of(stage.log, stage.owner.tenant_id)
    return {row.type: row.command_id for row in rows if row.stream_id == told.turn_id}


async def execute(stage: Stage, command: SendMessage) -> Told:
    await stage.bus.execute(command, by=BY)
    stage.sent.append(command.turn_id)
    return await stage.end_of(command.turn_id)


async def test_the_call_is_claimed_in_the_message_s_own_transaction(staged: Staged) -> None:
    stage = await staged().begin()
    told = await stage.ask()
    writers = await writers_of(stage, told)
    assert told.story == ANSWERED
    assert writers["Turn.Accepted"] == writers["Turn.ContextAssembled"] == writers["Turn.ModelCallStarted"]
    assert told.events(Turn.ModelCallStarted)[0].worker == work_of(stage).worker


async def test_a_conversation_at_hand_goes_on_so_too_and_what_is_recorded_is_what_was_sent(
    staged: Staged,
) -> None:
    stage = await staged(CountedTool("lookup")).begin(system_prompt="Be brief.")
    told = await stage.talk("one", "two", "three")
    contexts = [each.events(Turn.ContextAssembled)[0] for each in told]
    requests: Sequence[Any] = stage.models.requests
    assert [each.prompt_digest for each in contexts] == [
        digest_of("Be brief.", request.messages) for request in requests
    ]
    assert [each.history_count for each in contexts] == [0, 2, 4]
    for each in told[1:]:
        writers = await writers_of(stage, each)
        assert writers["Turn.Accepted"] == writers["Turn.ModelCallStarted"]


async def test_a_message_without_a_past_is_planned_without_one(staged: Staged) -> None:
    stage = await staged().begin()
    conversation_id = ConversationId(uuid4())
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    await stage.ask("one", **named)
    told = await stage.ask("two", stateless=True, **named)
    assert told.events(Turn.ContextAssembled)[0].history_count == 0
    assert len(stage.models.requests[-1].messages) == 1


async def test_a_plan_that_the_configuration_has_overtaken_is_dropped(staged: Staged) -> None:
    stage = await staged().begin(system_prompt="Be brief.")
    planned = await with_first_call(stage.owner.message(), work_of(stage), work_of(stage).worker)
    assert planned.first_call is not None
    changed = ChangeAgent(
        tenant_id=stage.owner.tenant_id,
        agent_id=stage.owner.agent_id,
        patch={"configuration": {"system_prompt": "Be long."}},
    )
    await stage.bus.execute(changed, by=BY)
    told = await execute(stage, planned)
    writers = await writers_of(stage, told)
    assert writers["Turn.Accepted"] != writers["Turn.ModelCallStarted"]
    assert stage.models.requests[-1].system == "Be long."


async def test_a_plan_that_another_message_has_overtaken_is_dropped(staged: Staged) -> None:
    stage = await staged(ScriptedModels(one=[says("first")], two=[says("second")])).begin()
    conversation_id = ConversationId(uuid4())
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    await stage.ask("zero", **named)
    planned = await with_first_call(
        stage.owner.message("two", **named), work_of(stage), work_of(stage).worker
    )
    assert planned.first_call is not None
    await stage.ask("one", **named)
    told = await execute(stage, planned)
    assert told.events(Turn.ContextAssembled)[0].history_count == 4
    assert [message.content for message in stage.models.requests[-1].messages][-3:] == ["one", "first", "two"]


async def test_a_message_planned_again_is_asked_with_what_was_claimed(staged: Staged) -> None:
    stage = await staged(ScriptedModels(one=[says("first")], two=[says("second")])).begin()
    work, conversation_id = work_of(stage), ConversationId(uuid4())
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    await stage.ask("zero", **named)
    message = stage.owner.message("two", **named)
    before = await with_first_call(message, work, work.worker)
    await stage.ask("one", **named)
    now = await with_first_call(message, work, work.worker)
    assert before.first_call and now.first_call and before.first_call != now.first_call
    told = await execute(stage, now)
    assert told.events(Turn.ContextAssembled)[0].prompt_digest == digest_of(
        stage.models.requests[-1].system, stage.models.requests[-1].messages
    )
    assert len(stage.models.requests[-1].messages) == 5


async def test_a_claimed_call_whose_plan_is_forgotten_or_another_one_s_is_planned_anew(
    staged: Staged,
) -> None:
    stage = await staged(ScriptedModels(one=[says("first")], two=[says("second")])).begin()
    work, conversation_id = work_of(stage), ConversationId(uuid4())
    named: dict[str, Any] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    await stage.ask("zero", **named)
    forgotten = await with_first_call(stage.owner.message("one", **named), work, work.worker)
    work.planned.take(forgotten.turn_id)
    await execute(stage, forgotten)
    message = stage.owner.message("two", **named)
    await with_first_call(message, work, work.worker)
    stale = work.planned.take(message.turn_id)
    await stage.ask("three", **named)
    planned = await with_first_call(message, work, work.worker)
    work.planned.put(message.turn_id, stale)
    told = await execute(stage, planned)
    writers = await writers_of(stage, told)
    assert writers["Turn.Accepted"] == writers["Turn.ModelCallStarted"]
    assert [message.content for message in stage.models.requests[-1].messages][-3] == "three"


async def test_a_conversation_that_is_not_at_hand_is_left_to_whoever_hears_of_it(staged: Staged) -> None:
    stage = await staged().begin()
    message = stage.owner.message(conversation_id=ConversationId(uuid4()), beginning="existing")
    assert await with_first_call(message, work_of(stage), work_of(stage).worker) == message


async def test_a_message_whose_worker_nobody_knows_is_left_to_whoever_hears_of_it(staged: Staged) -> None:
    stage = await staged().begin()
    message = stage.owner.message()
    assert await with_first_call(message, work_of(stage), None) == message


async def test_a_call_claimed_for_another_worker_is_made_by_that_one_once(staged: Staged) -> None:
    stage = await staged().begin()
    here, there = stage.workers[0], stage.worker()
    news = News()
    planned = await with_first_call(stage.owner.message(), here.work, there.work.worker)
    here.bus.on_append = news.add
    await here.bus.execute(planned, by=BY)
    stage.sent.append(planned.turn_id)
    hint = news.take()
    assert hint is not None and [step.worker for step in hint.steps] == [there.work.worker]
    assert not stage.models.requests and not here.work.planned.take(planned.turn_id)
    # Whether the records of its shard come there or not.
    elsewhere = Eager(lambda shard, turn_id: False, there.work)
    await asyncio.gather(elsewhere.hear(hint), elsewhere.hear(hint))
    await Eager(lambda shard, turn_id: True, here.work).hear(hint)
    there.start()
    told = await stage.end_of(planned.turn_id)
    assert told.story == ANSWERED
    assert told.events(Turn.ModelCallStarted)[0].worker == there.work.worker
    assert len(stage.models.requests) == 1


async def test_a_worker_that_missed_the_hint_begins_when_the_record_comes(staged: Staged) -> None:
    stage = await staged().begin()
    here, there = stage.workers[0], stage.worker().start()
    planned = await with_first_call(stage.owner.message(), here.work, there.work.worker)
    await here.bus.execute(planned, by=BY)
    stage.sent.append(planned.turn_id)
    assert (await stage.end_of(planned.turn_id)).story == ANSWERED
    assert len(stage.models.requests) == 1


async def test_a_worker_that_hears_of_its_own_claim_before_it_goes_on_asks_once(staged: Staged) -> None:
    stage = await staged().begin()
    work, heard = work_of(stage), list[asyncio.Task[None]]()
    commit = work.bus.on_commit

    def committed(records: Sequence[AnyRecord]) -> None:
        commit(records)
        for record in records:
            if isinstance(record.event, Turn.ModelCallStarted):
                heard.append(asyncio.create_task(step(TurnId(record.stream_id), stage.owner.tenant_id, work)))

    work.bus.on_commit = committed
    told = await execute(stage, stage.owner.message())
    await asyncio.gather(*heard)
    assert (told.story, len(heard)) == (ANSWERED, 1)
    assert len(stage.models.requests) == 1


async def test_a_worker_that_is_at_as_many_calls_as_it_can_make_plans_none(staged: Staged) -> None:
    stage = await staged().begin()
    work, message = work_of(stage), stage.owner.message()
    while not work.model_slots.locked():
        await work.model_slots.acquire()
    assert await with_first_call(message, work, work.worker) == message


async def test_what_is_wrong_with_a_message_is_said_when_it_is_decided(staged: Staged) -> None:
    stage = await staged().begin()
    message = stage.owner.message(by_owner=False, agent_id=uuid4())
    assert await with_first_call(message, work_of(stage), work_of(stage).worker) == message


async def test_a_process_that_dies_before_it_begins_is_replaced(staged: Staged) -> None:
    stage = await staged().begin()
    accepting = stage.workers[0]
    planned = await with_first_call(stage.owner.message(), accepting.work, accepting.work.worker)
    await accepting.kill()
    await accepting.bus.execute(planned, by=BY)
    stage.sent.append(planned.turn_id)
    stage.worker().start()
    told = await stage.end_of(planned.turn_id)
    assert told.story == [*ANSWERED[:3], "ModelCallFailed", *ANSWERED[2:]]
    assert told.charged == ["message"]
