"""What every store of parked streams keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from adapters.memory.parked_records import MemoryParkedRecords
from adapters.postgres.event_log import run_script
from adapters.postgres.parked_records import TABLES, PostgresParkedRecords
from adapters.postgres.pool import open_pool
from domain.parked import ERROR_CHARS_MAX, Asked, NotParked, ParkedRecords, Skipped, Stuck
from tests.peers.databases import new_database

RETRY = Asked("retry", "ada")
SKIP = Asked("skip", "ada", "a duplicate of what was sent by hand")


@pytest.fixture(scope="module")
def shared_url(postgres_dsn: str) -> Iterator[str]:
    with new_database(postgres_dsn) as dsn:
        yield dsn


@pytest.fixture(params=["memory", "postgres"])
async def parked(request: pytest.FixtureRequest) -> AsyncIterator[ParkedRecords]:
    if request.param == "memory":
        yield MemoryParkedRecords()
        return
    dsn = request.getfixturevalue("shared_url")
    await run_script(dsn, TABLES)
    async with open_pool(dsn, 2) as pool:
        yield PostgresParkedRecords(pool)


@pytest.fixture
def processor() -> str:
    """A name that no other test uses: the database is shared."""
    return f"processor_{uuid4().hex}"


def stuck(position: int, error: str = "ValueError('no')") -> Stuck:
    return Stuck(7, position, position // 2, "Turn.Accepted", error)


async def test_a_parked_stream_waits_for_its_processor_only(parked: ParkedRecords, processor: str) -> None:
    stream, tenant = uuid4(), uuid4()
    await parked.park(processor, stream, tenant, stuck(12))
    assert await parked.waiting(processor) == {stream}
    assert await parked.waits(processor, stream)
    assert not await parked.waits(f"{processor} 2", stream)
    assert await parked.waiting(f"{processor} 2") == set()
    (found,) = [each for each in await parked.streams() if each.processor == processor]
    assert (found.stream_id, found.tenant_id, found.stuck, found.asked) == (stream, tenant, stuck(12), None)
    assert abs((found.parked_at - datetime.now(UTC)).total_seconds()) < 60


async def test_a_stream_stands_at_the_earliest_record_it_was_parked_for(
    parked: ParkedRecords, processor: str
) -> None:
    stream = uuid4()
    for position, error in ((12, "a"), (20, "b"), (5, "c")):
        await parked.park(processor, stream, None, stuck(position, error))
    (found,) = [each for each in await parked.streams() if each.processor == processor]
    assert (found.stuck, found.tenant_id) == (stuck(5, "c"), None)


async def test_streams_are_listed_longest_first_and_no_more_than_asked_for(
    parked: ParkedRecords, processor: str
) -> None:
    streams = [uuid4() for _ in range(3)]
    for stream in streams:
        await parked.park(processor, stream, None, stuck(1))
    listed = [each.stream_id for each in await parked.streams() if each.processor == processor]
    assert listed == streams
    assert len(await parked.streams(2)) == 2


async def test_what_is_asked_for_is_found_by_the_processor_in_the_order_of_asking(
    parked: ParkedRecords, processor: str
) -> None:
    first, second, third = (uuid4() for _ in range(3))
    for stream in (first, second, third):
        await parked.park(processor, stream, None, stuck(3))
    assert await parked.asked(processor) == []
    answered = await parked.ask(processor, third, SKIP)
    assert (answered.stream_id, answered.asked, answered.stuck) == (third, SKIP, stuck(3))
    await parked.ask(processor, first, RETRY)
    found = await parked.asked(processor)
    assert [(each.stream_id, each.asked) for each in found] == [(third, SKIP), (first, RETRY)]
    assert len(await parked.asked(processor, 1)) == 1
    # Asked for anew, it is another thing and comes last.
    await parked.ask(processor, third, RETRY)
    found = await parked.asked(processor)
    assert [(each.stream_id, each.asked) for each in found] == [(first, RETRY), (third, RETRY)]


async def test_nothing_can_be_asked_of_a_stream_that_does_not_wait(
    parked: ParkedRecords, processor: str
) -> None:
    with pytest.raises(NotParked, match="processor"):
        await parked.ask(processor, uuid4(), RETRY)


async def test_a_skip_needs_a_reason(parked: ParkedRecords, processor: str) -> None:
    stream = uuid4()
    await parked.park(processor, stream, None, stuck(3))
    with pytest.raises(ValueError, match="reason"):
        await parked.ask(processor, stream, Asked("skip", "ada", "  "))


async def test_a_stream_that_goes_on_does_not_wait_any_more(parked: ParkedRecords, processor: str) -> None:
    stream = uuid4()
    await parked.park(processor, stream, None, stuck(3))
    await parked.carried_out(await parked.ask(processor, stream, RETRY), None)
    assert not await parked.waits(processor, stream)
    assert await parked.asked(processor) == []
    assert await of(parked, processor) == []


async def test_a_stream_that_gets_stuck_again_waits_there_and_nothing_is_asked_of_it(
    parked: ParkedRecords, processor: str
) -> None:
    stream = uuid4()
    await parked.park(processor, stream, None, stuck(3))
    await parked.carried_out(await parked.ask(processor, stream, RETRY), stuck(9, "later"))
    (found,) = [each for each in await parked.streams() if each.processor == processor]
    assert (found.stuck, found.asked) == (stuck(9, "later"), None)
    assert await parked.asked(processor) == []


async def test_what_was_left_out_is_remembered_with_the_reason(parked: ParkedRecords, processor: str) -> None:
    stream = uuid4()
    await parked.park(processor, stream, None, stuck(3))
    await parked.carried_out(await parked.ask(processor, stream, SKIP), stuck(9))
    await parked.carried_out(await parked.ask(processor, stream, SKIP), None)
    found = await of(parked, processor)
    assert [each.stuck for each in found] == [stuck(9), stuck(3)]
    assert {(each.stream_id, each.by, each.reason) for each in found} == {(stream, "ada", SKIP.reason)}


async def test_no_record_is_remembered_as_left_out_when_none_was_known(
    parked: ParkedRecords, processor: str
) -> None:
    stream = uuid4()
    await parked.park(processor, stream, None, stuck(0))
    await parked.carried_out(await parked.ask(processor, stream, SKIP), None)
    assert await of(parked, processor) == []


async def test_what_another_has_carried_out_changes_nothing(parked: ParkedRecords, processor: str) -> None:
    stream = uuid4()
    await parked.park(processor, stream, None, stuck(3))
    asked = await parked.ask(processor, stream, SKIP)
    await parked.carried_out(asked, None)
    await parked.carried_out(asked, stuck(4))
    assert not await parked.waits(processor, stream)
    assert len(await of(parked, processor)) == 1


async def test_skips_of_others_are_remembered_too(parked: ParkedRecords, processor: str) -> None:
    skipped = Skipped(processor, uuid4(), stuck(4), "ada", "why not", datetime.now(UTC))
    await parked.note_skip([skipped])
    (found,) = await of(parked, processor)
    assert (found.stream_id, found.stuck, found.by, found.reason) == (
        skipped.stream_id,
        skipped.stuck,
        "ada",
        "why not",
    )


async def test_any_error_can_be_kept(parked: ParkedRecords, processor: str) -> None:
    await parked.park(processor, uuid4(), UUID(int=1), stuck(3, "\0" + "x" * 3 * ERROR_CHARS_MAX))
    assert len(await parked.waiting(processor)) == 1


async def of(parked: ParkedRecords, processor: str) -> list[Skipped]:
    return [each for each in await parked.skipped() if each.processor == processor]
