"""What the log asks for costs the same in a shard of any size, also on a connection that is older than the shard's events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from adapters.postgres import event_log
from adapters.postgres.event_log import PostgresEventLog
from adapters.postgres.pool import LOG_PLANS, options

EVENTS = 20_000
LOOKED_AT_MAX = 200  # rows, those that were thrown away included
SHARD, HEAD = "'{3}'::smallint[]", f"'{{{EVENTS - 5}}}'::bigint[]"
TYPES = {
    "_SYNC": "smallint[], smallint[], bigint[], smallint[], uuid[], smallint[], uuid[]",
    "_COMMANDS": "smallint[], uuid[]",
    "_READ_AFTER": "smallint[], bigint[], int, int",
    "_READ_STREAM": "smallint, uuid, int",
    "_READ_STREAM_AFTER": "smallint, uuid, int, int",
}
_FILL = """
    INSERT INTO event SELECT 3, p, gen_random_uuid(), gen_random_uuid(), 1, 'X', 1, '', NULL, NULL, gen_random_uuid(),
                             gen_random_uuid(), NULL, 'a', NULL, now() FROM generate_series(1, %(events)s) p;
    INSERT INTO snapshot SELECT 3, stream_id, 1, tenant_id, 'x', '' FROM event;
    INSERT INTO command SELECT 3, command_id, tenant_id, 'X', 'a', '', 'accepted', true, position, '', 1, now() FROM event;
    UPDATE shard SET head = %(events)s WHERE shard = 3
"""


class Filled:
    """A connection with everything prepared before there was anything, and then a shard full of events."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        for name, types in TYPES.items():
            places = iter(f"${n + 1}" for n in range(types.count(",") + 1))
            query = (
                "".join(part + next(places, "") for part in getattr(event_log, name).split("%b")[:-1])
                + getattr(event_log, name).split("%b")[-1]
            )
            connection.execute(f"PREPARE {name.lower()} ({types}) AS {query}".encode())
        self.stream_id = self.command_id = uuid4()
        for name in TYPES:
            self.looked_at(name)
        connection.execute((_FILL.replace("%(events)s", str(EVENTS))).encode())
        row = connection.execute("SELECT stream_id, command_id FROM event WHERE position = 7").fetchone()
        assert row is not None
        self.stream_id, self.command_id = row

    def looked_at(self, name: str) -> int:
        """How many rows the database touches to answer it."""
        arguments = self._arguments(self.stream_id, self.command_id)[name]
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE {name.lower()} ({arguments})"
        row = self.connection.execute(explain.encode()).fetchone()
        assert row is not None
        found = row[0] if isinstance(row[0], list) else json.loads(row[0])
        return sum(_rows(node) for node in _nodes(found[0]["Plan"]))

    def _arguments(self, stream_id: UUID, command_id: UUID) -> dict[str, str]:
        stream, command = f"'{{{stream_id}}}'::uuid[]", f"'{{{command_id}}}'::uuid[]"
        return {
            "_SYNC": f"{SHARD}, {SHARD}, {HEAD}, {SHARD}, {stream}, {SHARD}, {stream}",
            "_COMMANDS": f"{SHARD}, {command}",
            "_READ_AFTER": f"{SHARD}, {HEAD}, 10, 10",
            "_READ_STREAM": f"3::smallint, '{stream_id}', 10",
            "_READ_STREAM_AFTER": f"3::smallint, '{stream_id}', 0, 10",
        }


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def _rows(node: dict[str, Any]) -> int:
    removed = sum(count for name, count in node.items() if name.startswith("Rows Removed"))
    return int((node["Actual Rows"] + removed) * node["Actual Loops"])


@pytest.fixture
async def filled(database_url: str) -> Any:
    await PostgresEventLog(database_url).migrate()
    with psycopg.connect(database_url, autocommit=True, options=options(LOG_PLANS)) as connection:
        yield Filled(connection)


@pytest.mark.parametrize("analyzed", [False, True], ids=["planned while empty", "planned with statistics"])
async def test_no_statement_looks_at_more_of_a_shard_than_it_is_asked_for(
    filled: Filled, analyzed: bool
) -> None:
    if analyzed:
        filled.connection.execute("ANALYZE")
    assert {name: count for name in TYPES if (count := filled.looked_at(name)) > LOOKED_AT_MAX} == {}
