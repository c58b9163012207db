"""Changes of a batch folded to at most one change for each row, so that a batch costs a handful of statements.

Folding is what makes the rows independent of how the log is cut into batches: it gives what the changes would give
one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from projections.projection import Change, Columns, Count, Delete, Edit, Increment, Insert, Key, Update

Row = dict[str, Any]


class RowExists(Exception):
    """A row was to be inserted that is there already: the event was applied before, or two events collide."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A table as the database knows it; `types` belong to `columns`."""

    table: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[str, ...]

    def type_of(self, column: str) -> str:
        return self.types[self.columns.index(column)]


Shapes = Mapping[str, Shape]
Loaded = Mapping[tuple[str, Key], Row]


@dataclass(slots=True)
class Folded:
    """What a batch does to one row: first deleted, then inserted, or else set, added to, or counted."""

    deleted: bool = False
    inserted: Row | None = None
    sets: Row = field(default_factory=dict)
    adds: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] | None = None


class Fold:
    """The folded changes of one projection. `loaded` has the rows that `Edit` changes need."""

    def __init__(self, shapes: Shapes, loaded: Loaded) -> None:
        self._loaded = loaded
        self.tables: dict[str, dict[Key, Folded]] = {table: {} for table in shapes}
        self._key_of = {table: _key_getter(shape.key) for table, shape in shapes.items()}
        self._keys = {table: shape.key for table, shape in shapes.items()}

    def add(self, changes: Iterable[Change]) -> None:
        """Take the changes of the next record in."""
        for change in changes:
            if type(change) is Insert:
                self._insert(change)
            elif type(change) is Update:
                self._update(change)
            elif type(change) is Increment:
                self._increment(change)
            elif type(change) is Count:
                self._count(change)
            elif type(change) is Delete:
                folded = self._folded(change.table, change.key)
                folded.deleted, folded.inserted = True, None
                folded.sets, folded.adds, folded.counts = {}, {}, None
            elif type(change) is Edit:
                self._edit(change)

    def _insert(self, change: Insert) -> None:
        rows = self.tables[change.table]
        key = self._key_of[change.table](change.row)
        folded = rows.get(key)
        if folded is None:
            rows[key] = Folded(inserted=change.row)
        elif folded.inserted is not None or folded.counts is not None:
            raise RowExists(f"{change.table} {key!r}")
        else:
            folded.inserted, folded.sets, folded.adds = change.row, {}, {}

    def _update(self, change: Update) -> None:
        folded = self._folded(change.table, change.key)
        if folded.inserted is not None:
            folded.inserted.update(change.columns)
        elif not folded.deleted:
            folded.sets.update(change.columns)
            for column in change.columns:
                folded.adds.pop(column, None)

    def _increment(self, change: Increment) -> None:
        folded = self._folded(change.table, change.key)
        if folded.inserted is not None:
            _add(folded.inserted, change.columns)
        elif not folded.deleted:
            for column, amount in change.columns.items():
                if column in folded.sets:
                    folded.sets[column] += amount
                else:
                    folded.adds[column] = folded.adds.get(column, 0) + amount

    def _count(self, change: Count) -> None:
        folded = self._folded(change.table, change.key)
        if folded.inserted is not None:
            _add(folded.inserted, change.columns)
        elif folded.deleted:
            folded.inserted = {
                **dict(zip(self._keys[change.table], change.key, strict=True)),
                **change.columns,
            }
        else:
            folded.counts = folded.counts or {}
            for column, amount in change.columns.items():
                folded.counts[column] = folded.counts.get(column, 0) + amount

    def _edit(self, change: Edit) -> None:
        folded = self._folded(change.table, change.key)
        if folded.inserted is not None:
            folded.inserted.update(change.change(folded.inserted))
            return
        loaded = self._loaded.get((change.table, change.key))
        if folded.deleted or loaded is None:
            return
        current = {**loaded, **folded.sets}
        _add(current, folded.adds)
        folded.sets.update(change.change(current))

    def _folded(self, table: str, key: Key) -> Folded:
        rows = self.tables[table]
        folded = rows.get(key)
        if folded is None:
            folded = rows[key] = Folded()
        return folded


def edited(batches: Iterable[Iterable[Change]]) -> list[tuple[str, Key]]:
    """The rows that must be loaded before these changes are folded."""
    return [(change.table, change.key) for changes in batches for change in changes if type(change) is Edit]


def _add(row: Row, columns: Mapping[str, int]) -> None:
    for column, amount in columns.items():
        before = row.get(column)
        # As in SQL: NULL plus anything is NULL.
        row[column] = None if before is None else before + amount


def _key_getter(key: tuple[str, ...]) -> Callable[[Columns], Key]:
    if len(key) > 1:
        return itemgetter(*key)
    (column,) = key
    return lambda row: (row[column],)
