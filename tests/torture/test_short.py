"""A short torture; `make torture` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.run import Plan, torture

PLAN = Plan(records=5_000, seconds=12.0, kills=3, terms=3, seed=7)


@pytest.mark.timeout(240)
async def test_workers_that_are_killed_and_stopped_lose_double_and_disorder_nothing(
    database_url: str, broker: str, tmp_path: Path
) -> None:
    outcome = await torture(PLAN, database_url, broker, tmp_path)
    assert outcome.is_good, f"{outcome}; the workers' logs are in {tmp_path}"
    assert (outcome.kills, outcome.terms) == (PLAN.kills, PLAN.terms)
