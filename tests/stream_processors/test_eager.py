"""A turn that a hint tells of is begun at once; its record finds that done, and makes sure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from commands.bus import LATEST
from domain.agent import Agent
from domain.event_log import LogUnavailable
from domain.ids import shard_of
from schemas.hints import Hint, News
from stream_processors.agent_turns import accepted
from stream_processors.eager import Eager
from tests.commands.write_side import BY
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import Stage, until
from tests.stream_processors.test_agent_turns import ANSWERED

pytestmark = pytest.mark.parametrize("staged", [False], indirect=True, ids=["told of by a hint"])


async def heard(stage: Stage) -> Hint:
    """A message is sent, of which the worker hears by a hint alone."""
    worker, news = stage.workers[0], News()
    worker.delivers = False
    message = stage.owner.message()
    worker.bus.on_append = news.add
    await worker.bus.execute(message, by=BY)
    worker.bus.on_append = None
    stage.sent.append(message.turn_id)
    hint = news.take()
    assert hint is not None
    return hint


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
    hint = await heard(stage)
    await Eager(lambda shard, turn_id: True, stage.workers[0].work).hear(hint)
    assert (await stage.end_of(hint.steps[0].turn_id)).story == ANSWERED


async def test_its_record_finds_that_done(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hint, worker = await heard(stage), stage.workers[0]
    await Eager(lambda shard, turn_id: True, worker.work).hear(hint)
    told = await stage.end_of(hint.steps[0].turn_id)
    with monkeypatch.context() as broken:
        broken.delattr(type(worker.bus), "read")
        await accepted(told.records[0], worker.work)
    assert len(stage.models.requests) == 1


async def test_what_a_hint_names_but_does_not_bring_is_looked_up_at_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, looks = stage.worker(), list[int]()
    eager = Eager(lambda shard, turn_id: True, there.work)
    await eager.hear(await heard(stage))  # after which it knows the agent
    await stage.end_of(stage.sent[-1])
    stage.workers[0].bus.on_append = None
    hint = (await heard(stage))._replace(rows=())
    sync = stage.log.sync

    async def counted(heads: Any, streams: Any) -> Any:
        looks.append(len(streams))
        return await sync(heads, streams)

    with monkeypatch.context() as patched:
        patched.setattr(stage.log, "sync", counted)
        await eager.hear(hint)
        await until(lambda: _asked(stage, 2), "the model to be asked")
    assert looks[0] == 2, "the turn and its conversation"
    assert len(looks) <= 2, "once more for the claim, at most"
    there.start()
    assert (await stage.end_of(hint.steps[0].turn_id)).story == ANSWERED


async def test_what_a_hint_brings_is_not_looked_up_in_the_log(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = stage.worker()
    eager = Eager(lambda shard, turn_id: True, there.work)
    await eager.hear(await heard(stage))  # after which it knows the agent, and how far the log is
    await stage.end_of(stage.sent[-1])
    stage.workers[0].bus.on_append = None
    await there.bus.read(Agent, stage.owner.agent_id, stage.owner.tenant_id, LATEST)
    hint = await heard(stage)
    with monkeypatch.context() as broken:
        for look in ("sync", "read_stream", "read_stream_after", "read_after"):
            broken.setattr(stage.log, look, _away)
        await eager.hear(hint)
        await until(lambda: _asked(stage, 2), "the model to be asked")
    there.start()
    assert (await stage.end_of(hint.steps[0].turn_id)).story == ANSWERED


async def test_what_others_serve_is_left_to_them(stage: Stage) -> None:
    hint, worker = await heard(stage), stage.workers[0]
    ours = shard_of(stage.owner.tenant_id)
    eager = Eager(lambda shard, turn_id: shard != ours, worker.work)
    await eager.hear(hint)
    assert not eager._tasks


async def test_two_who_hear_of_it_begin_it_once(stage: Stage) -> None:
    hint, worker = await heard(stage), stage.workers[0]
    eager = Eager(lambda shard, turn_id: True, worker.work)
    await eager.hear(hint)
    await eager.hear(hint)
    await until(lambda: _ended(eager), "both to have looked")
    assert (await stage.end_of(hint.steps[0].turn_id)).story == ANSWERED
    assert len(stage.models.requests) == 1


async def test_a_hint_about_what_is_not_there_harms_nobody(stage: Stage) -> None:
    hint = await heard(stage)
    (step,) = hint.steps
    eager = Eager(lambda shard, turn_id: True, stage.workers[0].work)
    others = step._replace(tenant_id=step.turn_id), step._replace(turn_id=step.tenant_id)
    await eager.hear(hint._replace(steps=(*others, step)))
    assert (await stage.end_of(step.turn_id)).story == ANSWERED


async def test_a_worker_without_a_slot_waits_for_the_record(stage: Stage) -> None:
    hint, work = await heard(stage), stage.workers[0].work
    while not work.model_slots.locked():
        await work.model_slots.acquire()
    eager = Eager(lambda shard, turn_id: True, work)
    await eager.hear(hint)
    await until(lambda: _ended(eager), "it to have looked")
    assert not work.running and not stage.models.requests
    work.model_slots.release()


async def _away(*arguments: object) -> None:
    raise LogUnavailable("away")


async def _asked(stage: Stage, count: int) -> bool:
    await asyncio.sleep(0)
    return len(stage.models.requests) >= count and not stage.workers[1].work.running


async def _ended(eager: Eager) -> bool:
    await asyncio.sleep(0)
    return not eager._tasks
