"""Rows of a batch as binary Postgres arrays of composite values, encoded in one go: one parameter for each table.

Formats: src/backend/utils/adt/rowtypes.c, `record_recv`: the number of columns, then of each its type, its length (-1
for NULL) and its bytes; src/backend/utils/adt/arrayfuncs.c, `array_recv`. The columns are those of `new_event`,
`new_command` and `due_change` in event_log.sql; neighbours of a fixed size are packed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from struct import Struct

from domain.event_log import CommandRow, DueChange, StoredEvent

_BOOLEAN, _BYTEA, _BIGINT, _SMALLINT, _INTEGER, _TEXT, _TIMESTAMP, _UUID = 16, 17, 20, 21, 23, 25, 1184, 2950

_array = Struct("!iiIii").pack  # dimensions, has nulls, element type, length, lower bound
_empty = Struct("!iiI").pack
_length = Struct("!i").pack
_value = Struct("!Ii").pack  # a column's type and length; its bytes follow
_uuid = Struct("!Ii16s").pack
_NULL_TEXT, _NULL_BYTEA, _NULL_UUID, _NULL_TIMESTAMP = (
    _value(type_oid, -1) for type_oid in (_TEXT, _BYTEA, _UUID, _TIMESTAMP)
)
_event_begins = Struct("!i Iih Iiq Ii16s Ii16s Iii").pack
_schema_and_payload = Struct("!Iih Ii").pack
_two_uuids = Struct("!Ii16s Ii16s").pack
_command_begins = Struct("!i Iih Ii16s Ii16s").pack
_remembered_position_result = Struct("!Ii? Iiq Ii").pack
_due_begins = Struct("!i Iih").pack
_three_uuids = Struct("!Ii16s Ii16s Ii16s").pack
_timestamp = Struct("!Iiq").pack
_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def events(type_oid: int, rows: Sequence[StoredEvent]) -> bytes:
    """new_event[]"""
    return _rows(type_oid, [_event(row) for row in rows])


def commands(type_oid: int, rows: Sequence[CommandRow]) -> bytes:
    """new_command[]"""
    return _rows(type_oid, [_command(row) for row in rows])


def due_changes(type_oid: int, rows: Sequence[DueChange]) -> bytes:
    """due_change[]"""
    return _rows(type_oid, [_due(row) for row in rows])


def _event(row: StoredEvent) -> bytes:
    tenant, stream = row.tenant_id.int.to_bytes(16, "big"), row.stream_id.int.to_bytes(16, "big")
    command, correlation = row.command_id.int.to_bytes(16, "big"), row.correlation_id.int.to_bytes(16, "big")
    return b"".join(
        (
            _event_begins(
                *(15, _SMALLINT, 2, row.shard, _BIGINT, 8, row.position),
                *(_UUID, 16, tenant, _UUID, 16, stream, _INTEGER, 4, row.stream_version),
            ),
            _often(row.type),
            _schema_and_payload(_SMALLINT, 2, row.schema_version, _BYTEA, len(row.payload)),
            row.payload,
            _NULL_BYTEA if row.personal is None else _value(_BYTEA, len(row.personal)) + row.personal,
            _NULL_UUID
            if row.subject_id is None
            else _uuid(_UUID, 16, row.subject_id.int.to_bytes(16, "big")),
            _two_uuids(_UUID, 16, command, _UUID, 16, correlation),
            _NULL_UUID
            if row.causation_id is None
            else _uuid(_UUID, 16, row.causation_id.int.to_bytes(16, "big")),
            _often(row.actor),
            _NULL_TEXT if row.traceparent is None else _text(row.traceparent),
        )
    )


def _command(row: CommandRow) -> bytes:
    command, tenant = row.command_id.int.to_bytes(16, "big"), row.tenant_id.int.to_bytes(16, "big")
    return b"".join(
        (
            _command_begins(10, _SMALLINT, 2, row.shard, _UUID, 16, command, _UUID, 16, tenant),
            _often(row.type),
            _often(row.actor),
            _value(_BYTEA, len(row.digest)),
            row.digest,
            _often(row.outcome),
            _remembered_position_result(
                *(_BOOLEAN, 1, row.remembered, _BIGINT, 8, row.position, _BYTEA, len(row.result)),
            ),
            row.result,
        )
    )


def _due(row: DueChange) -> bytes:
    stream, tenant = row.stream_id.int.to_bytes(16, "big"), row.tenant_id.int.to_bytes(16, "big")
    return b"".join(
        (
            _due_begins(7, _SMALLINT, 2, row.shard),
            _often(row.kind),
            _three_uuids(_UUID, 16, row.id.int.to_bytes(16, "big"), _UUID, 16, stream, _UUID, 16, tenant),
            _NULL_TIMESTAMP if row.due_at is None else _timestamp(_TIMESTAMP, 8, _microseconds(row.due_at)),
            _often(row.claimed_by),
        )
    )


def _rows(type_oid: int, rows: Sequence[bytes]) -> bytes:
    if not rows:
        return _empty(0, 0, type_oid)
    pieces = [_array(1, 0, type_oid, len(rows), 1)]
    for row in rows:
        pieces += (_length(len(row)), row)
    return b"".join(pieces)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return _value(_TEXT, len(encoded)) + encoded


_often = lru_cache(4_096)(_text)  # names and actors: the same in many rows


def _microseconds(at: datetime) -> int:
    since = at - _POSTGRES_EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
