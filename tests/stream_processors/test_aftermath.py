"""What follows on published records is done for many at once, and what fails of it fails for its own record alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from adapters.memory.publisher import MemoryPublisher
from domain.event_log import CommandRow
from schemas.cloud_events import CloudEvents
from schemas.records import AnyRecord
from stream_processors.aftermath import Aftermath
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import Stage

PATIENCE_S = 10.0


class Asked:
    """A log that counts how often it is asked for commands."""

    def __init__(self, stage: Stage) -> None:
        self._log = stage.log
        self.times = 0

    async def commands(self, ids: Sequence[tuple[int, UUID]]) -> dict[UUID, CommandRow]:
        self.times += 1
        return await self._log.commands(ids)


class Bench:
    """An aftermath of which `fails` says which records fail in the end."""

    def __init__(self, stage: Stage, fails: Sequence[AnyRecord] = ()) -> None:
        self.log, self.publisher, self.fails = Asked(stage), MemoryPublisher(), fails
        log: Any = self.log
        self.aftermath = Aftermath(log, self.publisher, CloudEvents("https://agents.example"), self._then)

    async def _then(self, record: AnyRecord) -> None:
        if any(record is each for each in self.fails):
            raise ValueError("cannot be read")

    async def ends(self, *published: tuple[AnyRecord, asyncio.Future[None]]) -> list[type]:
        """What became of each: NoneType, or the type of the failure."""
        finished = [self.aftermath.of(record, acknowledged) for record, acknowledged in published]
        async with asyncio.timeout(PATIENCE_S):
            return [type(each) for each in await asyncio.gather(*finished, return_exceptions=True)]


async def told(staged: Staged) -> tuple[Stage, list[AnyRecord]]:
    stage = await staged().begin()
    await stage.ask("Hello")
    await stage.idle()
    return stage, list(await stage.happened())


def acknowledged(failure: BaseException | None = None) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)
    return future


async def test_commands_are_published_once_each_and_looked_up_together(staged: Staged) -> None:
    stage, records = await told(staged)
    bench = Bench(stage)
    ended = await bench.ends(*((record, acknowledged()) for record in records))
    assert set(ended) == {type(None)}
    assert bench.log.times == 1
    assert len(bench.publisher.messages) == len({record.command_id for record in records})


async def test_a_record_whose_messages_are_refused_fails_alone(staged: Staged) -> None:
    stage, (one, other, *_) = await told(staged)
    refused = ValueError("too large")
    ended = await Bench(stage).ends((one, acknowledged(refused)), (other, acknowledged()))
    assert ended == [ValueError, type(None)]


async def test_a_record_whose_aftermath_fails_fails_alone(staged: Staged) -> None:
    stage, (one, other, *_) = await told(staged)
    ended = await Bench(stage, fails=[one]).ends((one, acknowledged()), (other, acknowledged()))
    assert ended == [ValueError, type(None)]


async def test_whoever_stops_waiting_keeps_nobody_else_waiting(staged: Staged) -> None:
    stage, (one, other, *_) = await told(staged)
    bench = Bench(stage)
    given_up = bench.aftermath.of(one, acknowledged())
    given_up.cancel()
    assert await bench.ends((other, acknowledged())) == [type(None)]
