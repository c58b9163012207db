"""Read models follow from the log alone: built live, in any batches, or anew, they have the same rows."""

from __future__ import annotations

import asyncio

from projections.catalogue import PROJECTIONS
from tests.projections.world import World, all_applied, life_of, person, running

HANDLED = {name for projection in PROJECTIONS for name in projection.handled}


async def test_a_rebuild_gives_the_rows_that_live_gave(world: World) -> None:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        await asyncio.gather(*(life_of(person(world, number)) for number in range(1, 5)))
        await all_applied(world, runner)
        live = await world.dump(PROJECTIONS)
        types = await world.query("SELECT DISTINCT type FROM event")
        assert HANDLED - {row[0] for row in types} == set(), "the story leaves some events out"
        reports: list[tuple[int, int]] = []
        for projection in PROJECTIONS:
            await runner.rebuild(projection.name, lambda done, total: reports.append((done, total)))
        assert await world.dump(PROJECTIONS) == live
        assert reports[-1][0] == reports[-1][1] == sum((await world.heads()).values())
    assert await world.query("SELECT * FROM parked") == []
