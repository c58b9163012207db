"""Folded changes to SQL: for each table one delete, one insert, one update for each set of columns, one upsert.

Rows travel as one JSON parameter that `json_to_recordset` types (a single prepared statement whatever their number),
or as one binary COPY where thousands are inserted. Both write the same bytes into a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any

import psycopg
from psycopg.rows import dict_row

from projections.fold import Fold, Folded, Row, Shape, Shapes
from projections.projection import Forget, Key, Projection
from schemas.codec import encode_json, without_nul

Connection = psycopg.AsyncConnection[Any]

COPY_ROWS_MIN = 500  # from here on COPY costs less than its additional round trips
_SHAPES = """
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), array_position(i.indkey::int2[], a.attnum)
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
      JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
     WHERE n.nspname = %s AND c.relname = ANY (%s)
     ORDER BY c.relname, a.attnum
"""


def table_names(projection: Projection) -> list[str]:
    """The tables a projection creates."""
    words = projection.tables.split()
    return [
        words[n + 2]
        for n in range(len(words) - 2)
        if (words[n].upper(), words[n + 1].upper()) == ("CREATE", "TABLE")
    ]


async def shapes_of(connection: Connection, projection: Projection, schema: str) -> Shapes:
    """The projection's tables in a schema; one that is missing is left out."""
    cursor = await connection.execute(_SHAPES, (schema, table_names(projection)))
    columns: dict[str, list[tuple[str, str, int | None]]] = {}
    for table, column, type_name, place in await cursor.fetchall():
        columns.setdefault(table, []).append((column, type_name, place))
    return {table: _shape(table, found) for table, found in columns.items()}


def _shape(table: str, found: Iterable[tuple[str, str, int | None]]) -> Shape:
    found = list(found)
    key = sorted((place, column) for column, _, place in found if place is not None)
    return Shape(
        table,
        tuple(column for column, _, _ in found),
        tuple(type_name for _, type_name, _ in found),
        tuple(column for _, column in key),
    )


async def load(
    connection: Connection, shapes: Shapes, wanted: Iterable[tuple[str, Key]]
) -> dict[tuple[str, Key], Row]:
    """Rows by table and key; what is not there is left out."""
    found: dict[tuple[str, Key], Row] = {}
    by_table: dict[str, list[Key]] = {}
    for table, key in wanted:
        by_table.setdefault(table, []).append(key)
    for table, keys in by_table.items():
        shape = shapes[table]
        query = (
            f"SELECT t.* FROM {table} t JOIN {_recordset(shape, shape.key)} USING ({', '.join(shape.key)})"
        )
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(
                _sql(query), (_json(dict(zip(shape.key, key, strict=True)) for key in keys),)
            )
            for row in await cursor.fetchall():
                found[table, tuple(row[column] for column in shape.key)] = row
    return found


async def write(connection: Connection, shapes: Shapes, fold: Fold) -> int:
    """Write what was folded; how many rows that were."""
    count = 0
    for table, rows in fold.tables.items():
        if rows:
            count += await _write_table(connection, shapes[table], rows)
    return count


async def forget(connection: Connection, change: Forget) -> int:
    """Empty columns of all rows of a tenant, however many there are; how many that was."""
    assignments = ", ".join(f"{column} = NULL" for column in change.columns)
    filled = " OR ".join(f"{column} IS NOT NULL" for column in change.columns)
    query = f"UPDATE {change.table} SET {assignments} WHERE tenant_id = %s AND ({filled}) AND {change.where}"
    await connection.execute("SET LOCAL statement_timeout = 0")
    return (await connection.execute(_sql(query), (change.tenant_id,))).rowcount


async def _write_table(connection: Connection, shape: Shape, rows: Mapping[Key, Folded]) -> int:
    deleted: list[Row] = []
    inserted: list[Row] = []
    counted: list[Row] = []
    updated: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Row]] = {}
    for key, folded in rows.items():
        if folded.deleted:
            deleted.append(dict(zip(shape.key, key, strict=True)))
        if folded.inserted is not None:
            inserted.append(folded.inserted)
        elif folded.counts is not None:
            counted.append({**dict(zip(shape.key, key, strict=True)), **folded.counts})
        elif folded.sets or folded.adds:
            row = {**dict(zip(shape.key, key, strict=True)), **folded.sets, **folded.adds}
            updated.setdefault((tuple(folded.sets), tuple(folded.adds)), []).append(row)
    if deleted:
        query = f"DELETE FROM {shape.table} t USING {_recordset(shape, shape.key)} WHERE {_same_key(shape)}"
        await connection.execute(_sql(query), (_json(deleted),))
    if inserted:
        await _insert(connection, shape, inserted)
    for (sets, adds), changed in updated.items():
        await _update(connection, shape, (sets, adds), changed)
    if counted:
        await _count(connection, shape, counted)
    return len(rows)


async def _insert(connection: Connection, shape: Shape, rows: list[Row]) -> None:
    if len(rows) >= COPY_ROWS_MIN:
        await _copy(connection, shape, rows)
        return
    columns = ", ".join(shape.columns)
    query = f"INSERT INTO {shape.table} ({columns}) SELECT {columns} FROM {_recordset(shape, shape.columns)}"
    await connection.execute(_sql(query), (_json(rows),))


async def _copy(connection: Connection, shape: Shape, rows: list[Row]) -> None:
    # json_recv takes the text of the JSON; psycopg's own dumper would write it with other spaces.
    types = ["text" if type_name == "json" else type_name for type_name in shape.types]
    json_columns = [
        column for column, type_name in zip(shape.columns, shape.types, strict=True) if type_name == "json"
    ]
    columns = shape.columns
    query = f"COPY {shape.table} ({', '.join(columns)}) FROM STDIN (FORMAT binary)"
    async with connection.cursor() as cursor, cursor.copy(_sql(query)) as copy:
        copy.set_types(types)
        values = itemgetter(*columns)
        for row in rows:
            for column in json_columns:
                value = row.get(column)
                if value is not None:
                    row[column] = encode_json(value).decode()
            # A row with all columns is the usual one, and much cheaper to take apart.
            complete = len(row) == len(columns) > 1
            await copy.write_row(values(row) if complete else list(map(row.get, columns)))


async def _update(
    connection: Connection, shape: Shape, columns: tuple[tuple[str, ...], tuple[str, ...]], rows: list[Row]
) -> None:
    sets, adds = columns
    assignments = [f"{column} = n.{column}" for column in sets]
    assignments += [f"{column} = t.{column} + n.{column}" for column in adds]
    source = _recordset(shape, (*shape.key, *sets, *adds))
    query = f"UPDATE {shape.table} t SET {', '.join(assignments)} FROM {source} WHERE {_same_key(shape)}"
    await connection.execute(_sql(query), (_json(rows),))


async def _count(connection: Connection, shape: Shape, rows: list[Row]) -> None:
    counters = [column for column in shape.columns if column not in shape.key]
    columns = ", ".join(shape.columns)
    values = ", ".join(
        f"coalesce(n.{column}, 0)" if column in counters else f"n.{column}" for column in shape.columns
    )
    added = ", ".join(f"{column} = t.{column} + excluded.{column}" for column in counters)
    query = f"""
        INSERT INTO {shape.table} AS t ({columns}) SELECT {values} FROM {_recordset(shape, shape.columns)}
        ON CONFLICT ({", ".join(shape.key)}) DO UPDATE SET {added}
    """
    await connection.execute(_sql(query), (_json(rows),))


@lru_cache(1_000)
def _recordset(shape: Shape, columns: tuple[str, ...]) -> str:
    typed = ", ".join(f"{column} {shape.type_of(column)}" for column in columns)
    return f"json_to_recordset(%s::json) AS n({typed})"


def _same_key(shape: Shape) -> str:
    return " AND ".join(f"t.{column} = n.{column}" for column in shape.key)


def _json(rows: Iterable[Row]) -> str:
    return without_nul(encode_json(list(rows))).decode()


def _sql(query: str) -> bytes:
    """Queries here are put together from the names in our own CREATE TABLE statements."""
    return query.encode()
