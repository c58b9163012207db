"""A stage for each test, with short waits, and a check of what must be true in the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta

import pytest

from tests.stream_processors.stage import CountedTool, ScriptedModels, Stage

Staged = Callable[..., Stage]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proportions, a tenth to a fiftieth of the time."""
    monkeypatch.setattr("domain.turn.BACKOFF_FIRST_S", 0.02)
    monkeypatch.setattr("commands.turn.GRACE", timedelta(seconds=0.2))
    monkeypatch.setattr("commands.turn.PICKUP", timedelta(seconds=0.15))
    monkeypatch.setattr("oshaani.processor_host.SAVE_S", 0.02)
    monkeypatch.setattr("oshaani.processor_host.POLL_S", 0.02)
    monkeypatch.setattr("stream_processors.runner.BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr("stream_processors.runner.ASK_S", 0.02)
    for name, seconds in {
        "BEAT_S": 0.05,
        "DEAD_AFTER_S": 0.4,
        "LOOK_EVERY_S": 0.05,
        "TAKEN_FOR_S": 0.3,
        "PAUSE_S": 0.005,
    }.items():
        monkeypatch.setattr(f"stream_processors.sweeper.{name}", seconds)


@pytest.fixture(params=[False, True], ids=["claimed when heard of", "claimed with the message"])
async def staged(request: pytest.FixtureRequest) -> AsyncIterator[Staged]:
    """Makes the stage; what must be true of it is checked in the end.

    A turn is taken up by the worker that hears of it, or by the process that accepts it.
    """
    stages: list[Stage] = []

    def make(*what: ScriptedModels | CountedTool) -> Stage:
        models = next((each for each in what if isinstance(each, ScriptedModels)), ScriptedModels())
        stage = Stage(models, *(each for each in what if isinstance(each, CountedTool)))
        stage.at_once = request.param
        stages.append(stage)
        return stage

    yield make
    for stage in stages:
        try:
            await stage.check()
        finally:
            for worker in stage.workers:
                await worker.kill()
