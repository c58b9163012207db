"""Who takes up the turns of a shard is known as long as that worker says so."""

from __future__ import annotations

import asyncio

import pytest

from schemas.hints import Serving
from stream_processors import workers as module
from stream_processors.workers import Workers


def told(*said: tuple[str, tuple[int, ...]]) -> Workers:
    workers = Workers()
    for worker, shards in said:
        workers.hear(Serving(worker, shards))
    return workers


def test_the_latest_who_says_so_serves_a_shard() -> None:
    workers = told(("one", (1, 2, 3)), ("two", (3, 4)))
    assert [workers.of(shard) for shard in range(6)] == [None, "one", "one", "two", "two", None]


def test_what_a_worker_does_not_name_any_more_it_does_not_serve() -> None:
    workers = told(("one", (1, 2)), ("two", (3,)), ("one", (2,)), ("two", ()))
    assert [workers.of(shard) for shard in range(4)] == [None, None, "one", None]


async def test_a_worker_that_has_become_silent_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARD_S", 0.05)
    workers = told(("one", (1,)))
    async with asyncio.timeout(5.0):
        while workers.of(1) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
