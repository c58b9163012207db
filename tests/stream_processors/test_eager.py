"""A turn that a hint tells of is begun at once; its record finds that done, and makes sure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from domain.ids import shard_of
from schemas.hints import News, Step
from stream_processors.agent_turns import accepted
from stream_processors.eager import Eager
from tests.commands.write_side import BY
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import Stage, until
from tests.stream_processors.test_agent_turns import ANSWERED

pytestmark = pytest.mark.parametrize("staged", [False], indirect=True, ids=["told of by a hint"])


async def heard(stage: Stage) -> list[Step]:
    """A message is sent, of which the worker hears by a hint alone."""
    worker = stage.workers[0]
    worker.delivers = False
    worker.heard.clear()
    message = stage.owner.message()
    await stage.bus.execute(message, by=BY)
    stage.sent.append(message.turn_id)
    news = News()
    news.add(worker.heard)
    hint = news.take()
    assert hint is not None
    return list(hint.steps)


@pytest.fixture
async def stage(staged: Staged) -> AsyncIterator[Stage]:
    """A worker whose records and due rows come in the end only."""
    stage = staged()
    worker = stage.worker().start(host=False, sweeper=False)
    yield await stage.begin()
    worker.start()
    for turn_id in stage.sent:
        await stage.end_of(turn_id)


async def test_a_turn_is_answered_before_its_record_comes(stage: Stage) -> None:
    steps = await heard(stage)
    Eager(lambda shard: True, stage.workers[0].work).hear(steps)
    assert (await stage.end_of(steps[0].turn_id)).story == ANSWERED


async def test_its_record_finds_that_done(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, worker = await heard(stage), stage.workers[0]
    Eager(lambda shard: True, worker.work).hear(steps)
    told = await stage.end_of(steps[0].turn_id)
    with monkeypatch.context() as broken:
        broken.delattr(type(worker.bus), "read")
        await accepted(told.records[0], worker.work)
    assert len(stage.models.requests) == 1


async def test_what_others_serve_is_left_to_them(stage: Stage) -> None:
    steps, worker = await heard(stage), stage.workers[0]
    ours = shard_of(stage.owner.tenant_id)
    eager = Eager(lambda shard: shard != ours, worker.work)
    eager.hear(steps)
    assert not eager._tasks


async def test_two_who_hear_of_it_begin_it_once(stage: Stage) -> None:
    steps, worker = await heard(stage), stage.workers[0]
    eager = Eager(lambda shard: True, worker.work)
    eager.hear(steps)
    eager.hear(steps)
    await until(lambda: _ended(eager), "both to have looked")
    assert (await stage.end_of(steps[0].turn_id)).story == ANSWERED
    assert len(stage.models.requests) == 1


async def test_a_hint_about_what_is_not_there_harms_nobody(stage: Stage) -> None:
    (step,) = await heard(stage)
    eager = Eager(lambda shard: True, stage.workers[0].work)
    eager.hear([step._replace(tenant_id=step.turn_id), step._replace(turn_id=step.tenant_id), step])
    assert (await stage.end_of(step.turn_id)).story == ANSWERED


async def test_a_worker_without_a_slot_waits_for_the_record(stage: Stage) -> None:
    steps, work = await heard(stage), stage.workers[0].work
    while not work.model_slots.locked():
        await work.model_slots.acquire()
    eager = Eager(lambda shard: True, work)
    eager.hear(steps)
    await until(lambda: _ended(eager), "it to have looked")
    assert not work.running and not stage.models.requests
    work.model_slots.release()


async def _ended(eager: Eager) -> bool:
    await asyncio.sleep(0)
    return not eager._tasks
