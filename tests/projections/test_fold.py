"""Folding changes to the same row gives what the changes give one after another, however they are cut into batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.postgres.pool import open_pool
from domain.ids import SHARDS
from projections.applying import apply
from projections.catalogue import PROJECTIONS
from projections.checkpoints import SCHEMA, Progress
from projections.fold import Fold, RowExists, Shape, edited
from projections.projection import Change, Count, Delete, Edit, Increment, Insert, Update
from projections.tables import shapes_of, table_names
from tests.projections.world import all_applied, life_of, person, running, world_on

SHAPES = {
    "row": Shape("row", ("id", "a", "b"), ("bigint", "bigint", "bigint"), ("id",)),
    "tally": Shape("tally", ("id", "a", "b"), ("bigint", "bigint", "bigint"), ("id",)),
}
Rows = dict[tuple[str, Any], dict[str, Any]]
keys = st.integers(0, 2).map(lambda id: (id,))
numbers = st.integers(-3, 3)
some_columns = st.dictionaries(st.sampled_from(["a", "b"]), numbers, min_size=1)
changes = st.one_of(
    st.builds(lambda key, a, b: Insert("row", {"id": key[0], "a": a, "b": b}), keys, numbers, numbers),
    st.builds(lambda key, columns: Update("row", key, columns), keys, some_columns),
    st.builds(lambda key, columns: Increment("row", key, columns), keys, some_columns),
    st.builds(lambda key, n: Edit("row", key, lambda row: {"a": row["a"] * n + row["b"]}), keys, numbers),
    st.builds(lambda key: Delete("row", key), keys),
    st.builds(lambda key, columns: Count("tally", key, columns), keys, some_columns),
)


def apply_one(rows: Rows, change: Change) -> None:
    """What SQL would do for one change."""
    if isinstance(change, Insert):
        key = (change.table, (change.row["id"],))
        if key not in rows:  # the story inserts no row twice
            rows[key] = dict(change.row)
        return
    key = (change.table, change.key)
    if isinstance(change, Count):
        row = rows.setdefault(key, {"id": change.key[0], "a": 0, "b": 0})
        row.update({column: row[column] + amount for column, amount in change.columns.items()})
    elif key in rows:
        row = rows[key]
        if isinstance(change, Update):
            row.update(change.columns)
        elif isinstance(change, Increment):
            row.update({column: row[column] + amount for column, amount in change.columns.items()})
        elif isinstance(change, Edit):
            row.update(change.change(row))
        else:
            del rows[key]


def apply_folded(rows: Rows, batch: Sequence[Change]) -> None:
    """What `tables.write` does with a batch."""
    fold = Fold(SHAPES, {key: dict(rows[key]) for key in edited([batch]) if key in rows})
    fold.add(fresh(batch))
    for table, folds in fold.tables.items():
        for key, folded in folds.items():
            place = (table, key)
            if folded.deleted:
                rows.pop(place, None)
            if folded.inserted is not None:
                assert place not in rows
                rows[place] = folded.inserted
            elif folded.counts is not None:
                row = rows.setdefault(place, {"id": key[0], "a": 0, "b": 0})
                row.update({column: row[column] + n for column, n in folded.counts.items()})
            elif place in rows:
                rows[place].update(folded.sets)
                rows[place].update({column: rows[place][column] + n for column, n in folded.adds.items()})


def fresh(batch: Iterable[Change]) -> list[Change]:
    """Folding may keep and change the rows it is given."""
    return [Insert(each.table, dict(each.row)) if isinstance(each, Insert) else each for each in batch]


def possible(story: Sequence[Change]) -> list[Change]:
    """The story without rows that are inserted where there is one."""
    there: set[Any] = set()
    kept: list[Change] = []
    for change in story:
        if isinstance(change, Insert):
            if change.row["id"] in there:
                continue
            there.add(change.row["id"])
        elif isinstance(change, Delete):
            there.discard(change.key[0])
        kept.append(change)
    return kept


@given(st.lists(changes, max_size=30), st.lists(st.integers(0, 30), max_size=5))
def test_any_cut_of_a_story_gives_the_rows_of_the_story(story: list[Change], cuts: list[int]) -> None:
    story = possible(story)
    one_by_one: Rows = {}
    for change in fresh(story):
        apply_one(one_by_one, change)
    folded: Rows = {}
    edges = [0, *sorted(cuts), len(story)]
    for first, last in pairwise(edges):
        apply_folded(folded, story[first:last])
    assert folded == one_by_one


def test_a_row_that_is_inserted_twice_in_a_batch_is_refused() -> None:
    fold = Fold(SHAPES, {})
    fold.add([Insert("row", {"id": 1, "a": 0, "b": 0})])
    try:
        fold.add([Insert("row", {"id": 1, "a": 0, "b": 0})])
    except RowExists:
        return
    raise AssertionError("the second row was taken")


def test_any_batches_of_the_log_give_the_same_rows(database_url: str) -> None:
    """With real events, real tables, and both ways in which rows reach them."""

    async def prepare() -> tuple[list[Any], dict[str, list[str]]]:
        async with world_on(database_url) as world:
            runner = world.runner()
            async with running(runner):
                await asyncio.gather(*(life_of(person(world, number)) for number in (1, 2)))
                await all_applied(world, runner)
            rows = await world.log.read_after(dict.fromkeys(range(SHARDS), 0), 100_000)
            types = {name for projection in PROJECTIONS for name in projection.handled}
            return await world.records.open_some(rows, types), await world.dump(PROJECTIONS)

    records, expected = asyncio.run(prepare())

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(1, len(records)), max_size=40))
    def any_batches(cuts: list[int]) -> None:
        asyncio.run(replayed(cuts))

    async def replayed(cuts: list[int]) -> None:
        async with open_pool(database_url, 1) as pool, pool.connection() as connection:
            for projection in PROJECTIONS:
                for table in table_names(projection):
                    await connection.execute(f"TRUNCATE {table}".encode())
                work = Progress(projection, await shapes_of(connection, projection, SCHEMA))
                edges = [0, *sorted(set(cuts)), len(records)]
                for first, last in pairwise(edges):
                    async with connection.transaction():
                        _, parked = await apply(connection, work, records[first:last])
                        assert not parked
            found = {}
            for table in expected:
                cursor = await connection.execute(f"SELECT t::text FROM {table} t ORDER BY t::text".encode())
                found[table] = [row[0] for row in await cursor.fetchall()]
            assert found == expected

    any_batches()
