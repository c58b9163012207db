"""Columns as binary Postgres arrays, encoded in one go: psycopg's own list adaptation costs twice as much.

Format: src/backend/utils/adt/arrayfuncs.c, `array_recv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from struct import Struct
from typing import Any
from uuid import UUID

from psycopg.adapt import Dumper
from psycopg.pq import Format

_HEADER = Struct("!iiIii")  # dimensions, has nulls, element type, length, lower bound
_EMPTY = Struct("!iiI")
_NULL = b"\xff\xff\xff\xff"
_LENGTH = Struct("!i").pack
_BIGINT = Struct("!iq")
_SMALLINT = Struct("!ih").pack
_UUID_LENGTH = _LENGTH(16)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Array:
    """An encoded array; `type_oid` is that of the array type."""

    __slots__ = ("encoded",)
    type_oid = 0

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded


class UuidArray(Array):
    type_oid = 2951


class BigintArray(Array):
    type_oid = 1016


class SmallintArray(Array):
    type_oid = 1005


class TextArray(Array):
    type_oid = 1009


def uuids(values: Sequence[UUID | None]) -> UuidArray:
    """uuid[]"""
    parts = [_NULL if value is None else _UUID_LENGTH + value.bytes for value in values]
    return UuidArray(_array(2950, parts))


def bigints(values: Sequence[int]) -> BigintArray:
    """bigint[]"""
    return BigintArray(_array(20, [_BIGINT.pack(8, value) for value in values]))


def smallints(values: Sequence[int]) -> SmallintArray:
    """smallint[]"""
    return SmallintArray(_array(21, [_SMALLINT(2, value) for value in values]))


def texts(values: Sequence[str | None]) -> TextArray:
    """text[]"""
    return TextArray(_array(25, _sized([value if value is None else value.encode() for value in values])))


def numbers_of(encoded: bytes) -> list[int]:
    """A bigint[] without nulls as Postgres sends it."""
    return [number for _, number in _BIGINT.iter_unpack(encoded[_HEADER.size :])]


def instant_of(microseconds: int) -> datetime:
    """The time so long after the beginning of 1970, exactly."""
    return _EPOCH + timedelta(microseconds=microseconds)


def _sized(values: Sequence[bytes | None]) -> list[bytes]:
    return [_NULL if value is None else _LENGTH(len(value)) + value for value in values]


def _array(element_oid: int, parts: list[bytes]) -> bytes:
    return _header(element_oid, len(parts)) + b"".join(parts)


@lru_cache(4_096)
def _header(element_oid: int, count: int) -> bytes:
    return _HEADER.pack(1, 1, element_oid, count, 1) if count else _EMPTY.pack(0, 0, element_oid)


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Any) -> bytes:
        encoded: bytes = obj.encoded
        return encoded


def register(adapters: Any) -> None:
    """Teach a connection (its `adapters`) to send these arrays."""
    for array_class in Array.__subclasses__():
        dumper = type(f"{array_class.__name__}Dumper", (_ArrayDumper,), {"oid": array_class.type_oid})
        adapters.register_dumper(array_class, dumper)
