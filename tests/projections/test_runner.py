"""The runner applies every event once and in order, whatever happens around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest

from adapters.postgres.pool import deadline, open_pool
from commands.user import PromoteUser
from domain.ids import shard_of
from domain.user import User
from projections import runner as runners
from projections.catalogue import PROJECTIONS
from projections.parking import Parking
from projections.projection import Insert, Projection, Update
from projections.reconciliation import reconcile
from projections.runner import NoMetrics, Runner
from projections.users import users
from schemas.records import AnyRecord, Record
from tests.peers.proxy import Fault, proxy_before
from tests.projections.world import WAIT_S, Person, World, all_applied, life_of, person, running

WITHIN_S = 0.5


def broken(breaks: Callable[[str], bool]) -> Projection:
    """People, as long as the handler does not break on their names."""
    people = Projection("people", 1, "CREATE TABLE people (id uuid PRIMARY KEY, name text, role text);")

    @people.on(User.Registered)
    def registered(record: Record[User.Registered]) -> Insert:
        name = record.event.name or ""
        if breaks(name):
            raise ValueError(f"cannot take {name!r}")
        return Insert("people", {"id": record.stream_id, "name": name, "role": "user"})

    @people.on(User.Promoted)
    def promoted(record: Record[User.Promoted]) -> Update:
        return Update("people", (record.stream_id,), {"role": record.event.role})

    return people


def promotion(someone: Person, role: str = "operator") -> PromoteUser:
    return PromoteUser(tenant_id=someone.user_id, role=role)


def in_two_shards(world: World) -> tuple[Person, Person]:
    one, other = person(world, 1), person(world, 2)
    while shard_of(one.user_id) == shard_of(other.user_id):
        other = person(world, 2)
    return one, other


async def rebuilt_equals_live(world: World, runner: Runner) -> bool:
    live = await world.dump(PROJECTIONS)
    for projection in PROJECTIONS:
        await runner.rebuild(projection.name)
    return await world.dump(PROJECTIONS) == live


async def test_what_was_committed_is_shown_at_once_to_whoever_waits(world: World) -> None:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        someone = person(world, 1)
        await someone.signs_up()
        began = time.monotonic()
        outcome = await someone.does(promotion(someone))
        assert await runner.caught_up(outcome.shard, outcome.position)
        assert time.monotonic() - began < WITHIN_S
        assert not await runner.caught_up(outcome.shard, outcome.position + 1, timeout_s=0.05)


async def test_two_runners_on_one_database_apply_everything_once(world: World) -> None:
    one, other = world.runner(), world.runner()

    def both(records: Sequence[AnyRecord]) -> None:
        one.offer(records)
        other.offer(records)

    world.bus.on_commit = both
    async with running(one), running(other):
        await asyncio.gather(*(life_of(person(world, number)) for number in range(1, 4)))
        await all_applied(world, one)
        await all_applied(world, other)
        assert await rebuilt_equals_live(world, one)
        assert await reconcile(world.db(one)) == []


async def test_what_was_never_offered_is_read_from_the_log(world: World) -> None:
    runner = world.runner()
    async with running(runner):
        await life_of(person(world, 1))
        await all_applied(world, runner)
        assert await world.query("SELECT name FROM app_user") == [("Ada 1 \u2713",)]
        assert set(runner.lag().values()) == {0}


async def test_who_catches_up_says_how_far_it_is_behind(world: World) -> None:
    async with running(first := world.runner()):
        await all_applied(world, first)
    await life_of(person(world, 1))
    ahead = sum((await world.log.heads()).values())

    seen: list[int] = []

    class Behind(NoMetrics):
        def lag(self, projection: str, event_count: int) -> None:
            seen.append(event_count)

    async with running(second := world.runner(metrics=Behind())):
        await all_applied(world, second)
    assert seen[0] == ahead > 0


async def test_a_hole_in_what_was_offered_is_filled_from_the_log(world: World) -> None:
    runner = world.runner()
    calls = 0

    def every_third_is_lost(records: Sequence[AnyRecord]) -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            runner.offer(records)
            runner.offer(records)  # and the others come twice

    world.bus.on_commit = every_third_is_lost
    async with running(runner):
        await life_of(person(world, 1))
        await all_applied(world, runner)
        assert await rebuilt_equals_live(world, runner)


async def test_a_gap_in_the_log_stops_its_shard_and_no_other(world: World) -> None:
    torn, whole = in_two_shards(world)
    runner = world.runner()
    async with running(runner):
        await torn.signs_up()
        await all_applied(world, runner)
    await torn.makes_agent()
    first = (await world.query("SELECT position FROM event WHERE type = 'Agent.Created'"))[0][0]
    missing = "SELECT * FROM event WHERE position = %s AND shard = %s"
    await world.query(
        f"CREATE TABLE hidden AS {missing.replace('%s', '{}')}".format(first, shard_of(torn.user_id))
    )
    await world.query(
        "DELETE FROM event e USING hidden h WHERE (e.shard, e.position) = (h.shard, h.position)"
    )
    runner = world.runner()
    async with running(runner):
        await whole.signs_up()
        head = (await world.heads())[shard_of(whole.user_id)]
        assert await runner.caught_up(shard_of(whole.user_id), head, WAIT_S)
        assert not await runner.caught_up(shard_of(torn.user_id), first, timeout_s=0.3)
        assert await world.query("SELECT * FROM agent") == []
        await world.query("INSERT INTO event SELECT * FROM hidden")
        await all_applied(world, runner)
        assert await world.query("SELECT number FROM agent") == [(1,)]


async def test_more_than_fits_in_memory_is_read_from_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "OFFERED_MAX", 20)
    runner = world.runner()
    world.bus.on_commit = runner.offer
    await life_of(person(world, 1))
    async with running(runner):
        await all_applied(world, runner)
        assert await rebuilt_equals_live(world, runner)


async def test_cut_connections_and_lost_answers_lose_and_double_nothing(world: World) -> None:
    async with proxy_before(world.dsn) as proxy, open_pool(proxy.dsn, 4) as pool:
        runner = Runner(pool, deadline, world.log, world.records)
        world.bus.on_commit = runner.offer
        async with running(runner):
            for number in range(1, 6):
                proxy.fault = (Fault.CUT_ANSWER, Fault.CUT_REQUEST)[number % 2]
                await life_of(person(world, number))
            proxy.fault = Fault.NONE
            await all_applied(world, runner)
            assert await rebuilt_equals_live(world, world.runner())
            assert await reconcile(world.db(runner)) == []


async def test_a_stream_that_cannot_be_applied_waits_and_nobody_else_does(world: World) -> None:
    is_broken = True
    people = broken(lambda name: is_broken and name.startswith("Ada 1"))
    runner = world.runner(projections=[people])
    world.bus.on_commit = runner.offer
    parking = Parking(world.pool, deadline, world.log, world.records, (people,))
    one, two = person(world, 1), person(world, 2)
    async with running(runner):
        for someone in (one, two):
            await someone.signs_up()
            await someone.does(promotion(someone))
        await all_applied(world, runner)
        assert await world.query("SELECT name, role FROM people") == [("Ada 2 \u2713", "operator")]
        (parked,) = await parking.streams()
        assert (parked.stream_id, parked.error) == (one.user_id, "ValueError: cannot take 'Ada 1 \u2713'")
        assert not await parking.retry("people", one.user_id)
        is_broken = False
        assert await parking.retry("people", one.user_id)
        assert await parking.streams() == []
        rows = await world.query("SELECT name, role FROM people ORDER BY name")
        assert rows == [("Ada 1 \u2713", "operator"), ("Ada 2 \u2713", "operator")]
        await one.does(promotion(one, "user"))
        await all_applied(world, runner)
        assert (await world.query("SELECT role FROM people ORDER BY name"))[0] == ("user",)


async def test_a_skipped_event_is_left_out(world: World) -> None:
    people = broken(lambda name: True)
    runner = world.runner(projections=[people])
    parking = Parking(world.pool, deadline, world.log, world.records, (people,))
    async with running(runner):
        someone = person(world, 1)
        await someone.signs_up()
        await all_applied(world, runner)
        await runner.rebuild("people")
        assert [parked.stream_id for parked in await parking.streams()] == [someone.user_id]
        assert await parking.skip("people", someone.user_id)
        assert await parking.streams() == []


async def test_a_row_that_the_database_refuses_parks_only_its_stream(world: World) -> None:
    people = Projection(
        "people",
        1,
        "CREATE TABLE people (name text PRIMARY KEY, id uuid);",
        "CREATE UNIQUE INDEX people_of ON people (name);",
    )

    @people.on(User.Registered)
    def registered(record: Record[User.Registered]) -> Insert:
        return Insert("people", {"name": (record.event.name or "")[:5], "id": record.stream_id})

    runner = world.runner(projections=[people])
    parking = Parking(world.pool, deadline, world.log, world.records, (people,))
    everybody = [person(world, number) for number in (1, 12, 2, 3)]
    for someone in everybody:
        await someone.signs_up()
    async with running(runner):
        await all_applied(world, runner)
        built = (await world.dump([people]), [parked.stream_id for parked in await parking.streams()])
        assert len(built[0]["people"]) == 3
        assert len(built[1]) == 1
        await person(world, 13).signs_up()
        await person(world, 4).signs_up()
        await all_applied(world, runner)
        assert len(await parking.streams()) == 2
        assert len((await world.dump([people]))["people"]) == 4


async def test_an_event_from_the_future_parks_its_stream(world: World) -> None:
    runner = world.runner()
    someone, other = in_two_shards(world)
    async with running(runner):
        await someone.signs_up()
        await world.query(
            """
            WITH head AS (UPDATE shard SET head = head + 1 WHERE shard = %s RETURNING shard, head)
            INSERT INTO event
            SELECT h.shard, h.head, tenant_id, stream_id,
                   1 + (SELECT max(stream_version) FROM event v WHERE v.stream_id = e.stream_id), 'User.Teleported', 1,
                   payload, NULL, NULL, command_id, correlation_id, causation_id, actor, traceparent, recorded_at
              FROM event e JOIN head h USING (shard) WHERE type = 'User.Registered' LIMIT 1
            """,
            shard_of(someone.user_id),
        )
        await other.signs_up()
        await all_applied(world, runner)
        waiting = await world.query("SELECT projection, stream_id FROM parked ORDER BY 1")
        handling = ("api_keys", "conversations", "tool_calls", "users")
        assert waiting == [(name, someone.user_id) for name in handling]
        assert len(await world.query("SELECT * FROM app_user")) == 2
        await runner.rebuild("users")
        assert await world.query("SELECT projection, stream_id FROM parked ORDER BY 1") == waiting


async def test_damaged_bytes_park_their_stream(world: World) -> None:
    runner = world.runner()
    someone, other = in_two_shards(world)
    await someone.signs_up()
    await other.signs_up()
    spoil = (
        "UPDATE event SET personal = set_byte(personal, 20, 7) WHERE stream_id = %s AND stream_version = 1"
    )
    await world.query(spoil, someone.user_id)
    async with running(runner):
        await all_applied(world, runner)
        assert await world.query("SELECT user_id FROM app_user") == [(other.user_id,)]
        assert await world.query("SELECT projection FROM parked WHERE stream_id = %s", someone.user_id)


async def test_a_newer_version_is_built_when_the_runner_starts(world: World) -> None:
    async with running(world.runner()):
        await person(world, 1).signs_up()
        await person(world, 2).signs_up()
    newer = Projection(
        "users", users.version + 1, "CREATE TABLE app_user (user_id uuid PRIMARY KEY, shout text);"
    )

    @newer.on(User.Registered)
    def registered(record: Record[User.Registered]) -> Insert:
        return Insert("app_user", {"user_id": record.stream_id, "shout": (record.event.name or "").upper()})

    runner = world.runner(projections=[newer])
    async with running(runner):
        await all_applied(world, runner)
        rows = await world.query("SELECT shout FROM app_user ORDER BY 1")
        assert rows == [("ADA 1 \u2713",), ("ADA 2 \u2713",)]


async def test_a_rebuild_beside_live_work_loses_nothing(world: World) -> None:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        lives = asyncio.gather(*(life_of(person(world, number)) for number in range(1, 5)))
        while not lives.done():
            await runner.rebuild("requests")
            await runner.rebuild("credit_ledger")
        await lives
        await all_applied(world, runner)
        assert await rebuilt_equals_live(world, runner)
        assert await reconcile(world.db(runner)) == []
