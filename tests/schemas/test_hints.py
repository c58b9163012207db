"""A hint names what is worth hearing of at once, and always fits."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from adapters.memory.event_log import MemoryEventLog
from adapters.postgres.hints import Sealing
from commands.bus import Bus
from domain.event_log import StoredEvent
from domain.ids import SHARDS, shard_of
from domain.turn import Turn
from schemas.hints import NAMED_MAX, STEPS_MAX, Hint, News, Serving, Step, read, written
from schemas.records import AnyRecord
from schemas.wire import pack
from tests.commands.write_side import BY, memory_records, rules, signed_up
from tests.schemas.rows import rows

NOTIFICATION_BYTES_MAX = 8_000
SEALING = Sealing(bytes(32))
_heads = st.dictionaries(st.integers(0, SHARDS - 1), st.integers(1, 2**62), min_size=1)
_steps = st.builds(
    Step, st.uuids(), st.uuids(), st.integers(1, 10_000), st.text(max_size=60), st.none() | st.uuids()
)
_serving = st.builds(Serving, st.text(max_size=60), st.frozensets(st.integers(0, SHARDS - 1)).map(tuple))
_hints = st.builds(
    Hint,
    _heads,
    st.none() | st.frozensets(st.uuids(), max_size=NAMED_MAX),
    st.lists(_steps, max_size=10).map(tuple),
    st.lists(rows, max_size=3).map(tuple),
    st.none() | _serving,
)


Batch = tuple[Sequence[AnyRecord], Sequence[StoredEvent]]


async def appended(*messages: str) -> list[Batch]:
    """What messages leave behind, each with its rows."""
    told: list[Batch] = []
    bus = Bus(MemoryEventLog(), memory_records(), rules())
    owner = await signed_up(bus)
    bus.on_append = lambda records, rows: told.append((records, rows))
    for message in messages:
        await bus.execute(owner.message(message), by=BY)
    return told


async def committed(*changes: dict[str, object]) -> list[AnyRecord]:
    """What messages leave behind."""
    told: list[AnyRecord] = []
    bus = Bus(MemoryEventLog(), memory_records(), rules())
    owner = await signed_up(bus)
    bus.on_commit = told.extend
    for change in changes:
        await bus.execute(owner.message(**change), by=BY)
    return told


def heard(news: News) -> Hint:
    """What others hear of it."""
    hint = news.take()
    assert hint is not None
    found = read(written(hint))
    assert found is not None
    return found


def news_of(*batches: list[AnyRecord]) -> Hint | None:
    news = News()
    for batch in batches:
        news.add(batch)
    return news.take()


@given(_hints)
def test_what_is_read_is_what_was_written_and_a_hint_too_long_lacks_its_rows(hint: Hint) -> None:
    body = written(hint)
    assert len(SEALING.written(body)) < NOTIFICATION_BYTES_MAX
    assert read(body) in (hint, hint._replace(rows=()))
    if not hint.turns and len(hint.steps) < 20 and len(hint.rows) < 2:
        assert read(body) == hint


async def test_a_message_brings_its_rows_along_as_the_log_has_them() -> None:
    ((records, its_rows),) = await appended("Hello")
    news = News()
    news.add(records, its_rows)
    hint = news.take()
    assert hint is not None
    assert [row.position for row in hint.rows] == [record.position for record in records]
    assert hint.rows == tuple(its_rows)
    assert {row.recorded_at for row in hint.rows} == {record.recorded_at for record in records}
    assert read(written(hint)) == hint


async def test_what_is_too_much_for_a_hint_is_left_to_be_read() -> None:
    few, *others = await appended("Hello", "x" * 6_000, *["How do you do?"] * 30)
    for batches in ([others[0]], others[1:], [few, others[0]]):
        news = News()
        for batch in batches:
            news.add(*batch)
        hint = heard(news)
        assert hint.rows == () and hint.heads and hint.turns
        news.add(*few)
        assert heard(news).rows


async def test_rows_that_fit_only_compressed_are_sent_so() -> None:
    batches = await appended(*["How do you do?"] * 8)
    news = News()
    for batch in batches:
        news.add(*batch)
    hint = heard(news)
    assert hint.rows == tuple(row for _, its_rows in batches for row in its_rows)
    assert (
        sum(len(pack(row)) for row in hint.rows)
        > NOTIFICATION_BYTES_MAX
        > len(SEALING.written(written(hint)))
    )
    assert read(written(hint)[:-1]) is None


def test_nothing_is_read_of_what_others_say() -> None:
    others = (b"", b"nonsense", b"0:0", b"{}", b"\xff", written(Hint({}, None, ()))[:-1])
    assert [read(body) for body in others] == [None] * len(others)


def test_the_longest_hint_fits_into_a_notification() -> None:
    worker = f"agent_turns-10/{uuid4()}"
    steps = tuple(Step(uuid4(), uuid4(), 2**31, worker, uuid4()) for _ in range(STEPS_MAX))
    turns = frozenset(uuid4() for _ in range(NAMED_MAX))
    heads = dict.fromkeys(range(SHARDS), 2**62)
    assert (
        len(SEALING.written(written(Hint(heads, turns, steps, (), Serving(worker, tuple(range(SHARDS)))))))
        < NOTIFICATION_BYTES_MAX
    )


async def test_a_message_tells_of_its_turn_and_that_it_waits_for_a_worker() -> None:
    records = await committed({})
    (accepted,) = [record for record in records if isinstance(record.event, Turn.Accepted)]
    tenant_id = accepted.tenant_id
    assert news_of(records) == Hint(
        {shard_of(tenant_id): records[-1].position},
        frozenset({accepted.stream_id}),
        (Step(accepted.stream_id, tenant_id, 1, conversation_id=accepted.event.conversation_id),),
    )


async def test_a_message_that_waits_for_another_is_nobodys_to_take_up() -> None:
    conversation_id = uuid4()
    named: dict[str, object] = {"conversation_id": conversation_id, "beginning": "named", "name": "thread"}
    records = await committed(named, named)
    hint = news_of(records)
    assert hint is not None and hint.turns is not None
    assert (len(hint.turns), len(hint.steps)) == (2, 1)


async def test_news_are_told_once_and_of_many_turns_none_is_named() -> None:
    records = await committed(*[{} for _ in range(NAMED_MAX + 1)])
    news = News()
    news.add(records)
    hint = news.take()
    assert hint is not None
    assert (hint.turns, len(hint.steps)) == (None, STEPS_MAX)
    assert news.take() is None


def test_an_empty_commit_is_no_news() -> None:
    assert news_of([]) is None
