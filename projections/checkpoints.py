"""How far each projection is, in the same transaction as its rows; and the streams it could not go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg

from domain.ids import SHARDS
from domain.prices import RATE_CARDS
from projections.fold import Shapes
from projections.projection import Forget, Projection
from schemas.codec import encode_json
from schemas.records import AnyRecord, Unreadable

Connection = psycopg.AsyncConnection[Any]

SCHEMA = "oshaani"
TABLES = """
CREATE TABLE IF NOT EXISTS checkpoint (
    projection text     PRIMARY KEY,
    version    integer  NOT NULL,
    positions  bigint[] NOT NULL                     -- the last position applied, by shard
) WITH (fillfactor = 50);

CREATE TABLE IF NOT EXISTS parked (
    projection text        NOT NULL,
    stream_id  uuid        NOT NULL,
    shard      smallint    NOT NULL,
    position   bigint      NOT NULL,                 -- of the event it could not go on with
    error      text        NOT NULL,
    parked_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (projection, stream_id)
);

-- Published prices, for the auditor.
CREATE TABLE IF NOT EXISTS rate_card (
    rate_card_id   text        NOT NULL,
    meter          text        NOT NULL,
    unit_price_ncr bigint      NOT NULL,
    effective_from timestamptz NOT NULL,
    PRIMARY KEY (rate_card_id, meter)
);
"""
_PRICES = """
    INSERT INTO rate_card SELECT * FROM json_to_recordset(%s::json)
        AS n(rate_card_id text, meter text, unit_price_ncr bigint, effective_from timestamptz)
    ON CONFLICT DO NOTHING
"""
# Rows are found by their keys. Without this, what is known of a new or fast growing table makes plans that read all of
# it; they would be kept for the connection's life.
_BY_KEY = """
    SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
           set_config('enable_mergejoin', 'off', true), set_config('jit', 'off', true)
"""
_LOCK = """
    SELECT c.projection, c.version, c.positions,
           ARRAY(SELECT p.stream_id FROM parked p WHERE p.projection = c.projection)
      FROM checkpoint c WHERE c.projection = ANY (%s) ORDER BY c.projection FOR UPDATE OF c
"""
_SAVE = "UPDATE checkpoint SET positions = %s::bigint[] WHERE projection = ANY (%s)"
_PARK = """
    INSERT INTO parked (projection, stream_id, shard, position, error)
    SELECT * FROM json_to_recordset(%s::json)
        AS n(projection text, stream_id uuid, shard smallint, position bigint, error text)
    ON CONFLICT (projection, stream_id) DO UPDATE SET position = excluded.position, error = excluded.error
"""

ERROR_CHARS_MAX = 2_000


@dataclass(slots=True)
class Parked:
    """A stream that a projection cannot go on with, and the event it stopped at."""

    projection: str
    stream_id: UUID
    shard: int
    position: int
    error: str


@dataclass(slots=True)
class Progress:
    """A projection at work: how far it is, which streams wait."""

    projection: Projection
    shapes: Shapes
    positions: list[int] = field(default_factory=lambda: [0] * SHARDS)
    waiting: set[UUID] = field(default_factory=set)
    forgets: list[Forget] | None = None  # while tables without indexes are filled: what to forget afterwards
    handled: dict[str, Any] = field(init=False)
    nouns: frozenset[str] = field(init=False)  # aggregates whose unknown events concern it

    def __post_init__(self) -> None:
        self.handled = {name: handled.handler for name, handled in self.projection.handled.items()}
        self.nouns = frozenset(name.partition(".")[0] for name in self.projection.handled)

    def concerns(self, record: AnyRecord | Unreadable) -> bool:
        """Whether the record is new to this projection and means something to it."""
        if record.position <= self.positions[record.shard]:
            return False
        if isinstance(record, Unreadable):
            return record.type.partition(".")[0] in self.nouns
        return record.type in self.handled


async def migrate(connection: Connection) -> None:
    """Create what the read side needs beside the projections' own tables; safe to run again."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('oshaani migrate'))")
        for statement in TABLES.split(";\n"):
            if statement.strip():
                await connection.execute(statement.encode())
        prices = [
            {
                "rate_card_id": card.rate_card_id,
                "meter": meter,
                "unit_price_ncr": price_ncr,
                "effective_from": card.effective_from,
            }
            for card in RATE_CARDS
            for meter, price_ncr in card.unit_prices_ncr.items()
        ]
        await connection.execute(_PRICES, (encode_json(prices).decode(),))


async def lock(connection: Connection, names: Sequence[str]) -> dict[str, tuple[int, list[int], set[UUID]]]:
    """Lock checkpoints until the transaction ends: version, positions and parked streams of each that exists."""
    await plan_by_key(connection)
    cursor = await connection.execute(_LOCK, (list(names),))
    return {
        name: (version, positions, set(waiting))
        for name, version, positions, waiting in await cursor.fetchall()
    }


async def plan_by_key(connection: Connection) -> None:
    """Have the statements of this transaction find rows by their keys."""
    await connection.execute(_BY_KEY)


async def save(
    connection: Connection, positions: Mapping[str, Sequence[int]], parked: Sequence[Parked]
) -> None:
    """Write how far the projections are, and what they parked on the way."""
    by_positions: dict[tuple[int, ...], list[str]] = {}
    for name, reached in positions.items():
        by_positions.setdefault(tuple(reached), []).append(name)
    for reached, names in by_positions.items():
        # As text: psycopg would look at each number of a list.
        await connection.execute(_SAVE, (f"{{{','.join(map(str, reached))}}}", names))
    await park(connection, parked)


async def park(connection: Connection, parked: Sequence[Parked]) -> None:
    """Write which streams wait."""
    if parked:
        await connection.execute(_PARK, (encode_json(parked).decode(),))


def parked_at(work: Progress, record: AnyRecord | Unreadable, error: Exception) -> Parked:
    """Note that a projection cannot go on with a record's stream."""
    text = f"{type(error).__name__}: {error}".replace("\x00", "")[:ERROR_CHARS_MAX]
    return Parked(work.projection.name, record.stream_id, record.shard, record.position, text)
