"""Read models follow from the log alone: built live, in any batches, or anew, they have the same rows."""

from __future__ import annotations

import asyncio

from projections.catalogue import PROJECTIONS
from tests.projections.world import Person, World, all_applied, is_forgotten, life_of, person, running

HANDLED = {name for projection in PROJECTIONS for name in projection.handled}


async def personal_texts(world: World, someone: Person) -> list[int]:
    """How many there are of each kind."""
    queries = (
        "SELECT count(*) FROM message WHERE tenant_id = %s AND content IS NOT NULL",
        "SELECT count(*) FROM tool_call WHERE tenant_id = %s AND args IS NOT NULL",
        "SELECT count(*) FROM tool_call WHERE tenant_id = %s AND result IS NOT NULL AND outcome <> 'unknown'",
        "SELECT count(*) FROM app_user WHERE user_id = %s AND (email IS NOT NULL OR name IS NOT NULL)",
    )
    return [(await world.query(query, someone.user_id))[0][0] for query in queries]


async def test_a_rebuild_gives_the_rows_that_live_gave(world: World) -> None:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        await asyncio.gather(*(life_of(person(world, number)) for number in range(1, 5)))
        forgotten = person(world, 5)
        await life_of(forgotten)
        await all_applied(world, runner)
        known = await personal_texts(world, forgotten)
        assert all(known), known
        await is_forgotten(forgotten)
        await all_applied(world, runner)
        assert await personal_texts(world, forgotten) == [0, 0, 0, 0]
        live = await world.dump(PROJECTIONS)
        types = await world.query("SELECT DISTINCT type FROM event")
        assert HANDLED - {row[0] for row in types} == set(), "the story leaves some events out"
        reports: list[tuple[int, int]] = []
        for projection in PROJECTIONS:
            await runner.rebuild(projection.name, lambda done, total: reports.append((done, total)))
        assert await world.dump(PROJECTIONS) == live
        assert reports[-1][0] == reports[-1][1] == sum((await world.heads()).values())
    assert await world.query("SELECT * FROM parked") == []
