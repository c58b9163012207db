"""Data keys in PostgreSQL, wrapped by the master key.

A destroyed key leaves a row without a key for ever, so that its subject can never get a new one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from psycopg import AsyncConnection, InterfaceError, OperationalError, sql
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from adapters.crypto import MasterKey, new_key, seal, unseal
from adapters.postgres.pool import deadline
from domain.event_log import LogUnavailable
from domain.ports import KeyNotLoaded, SubjectErased

TABLES = """
CREATE TABLE IF NOT EXISTS data_key (
    subject_id   uuid        PRIMARY KEY,
    wrapped      bytea,                       -- by the master key; NULL once destroyed
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    destroyed_at timestamptz,
    CHECK ((wrapped IS NULL) = (destroyed_at IS NOT NULL))
);
"""

CACHE_COUNT_MAX = 50_000
CACHE_TTL_S = 60.0
DATABASE_TIMEOUT_S = 5.0
REWRAP_BATCH_COUNT = 500
_ENSURE_ATTEMPT_COUNT = 5

Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]
WrappedKeys = list[tuple[UUID, bytes]]


@dataclass(frozen=True, slots=True)
class KeyTable:
    """A table with one wrapped key a row, named by a uuid; binds each wrapped key to its row."""

    name: str
    id_column: str

    def aad(self, row_id: UUID) -> bytes:
        """What a wrapped key is bound to."""
        return self.name.encode() + b"|" + row_id.bytes

    def query(self, text: LiteralString) -> sql.Composed:
        """`text` with {table} and {id} filled in."""
        return sql.SQL(text).format(table=sql.Identifier(self.name), id=sql.Identifier(self.id_column))


DATA_KEYS = KeyTable("data_key", "subject_id")


@asynccontextmanager
async def connected(pool: Pool) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool, cut when the block takes longer than DATABASE_TIMEOUT_S.

    Raises:
        LogUnavailable: the database cannot be reached; the log lives in it too.
    """
    try:
        async with pool.connection(timeout=DATABASE_TIMEOUT_S) as connection:
            with deadline(connection, DATABASE_TIMEOUT_S):
                yield connection
    except (OperationalError, InterfaceError, PoolTimeout, OSError) as failure:
        raise LogUnavailable(str(failure)) from failure


class PostgresKeyRing:
    """Caches keys: a destruction in another process is noticed by `ensure` after at most `cache_ttl_s`."""

    def __init__(
        self,
        pool: Pool,
        master_key: bytes,
        other_master_keys: Sequence[bytes] = (),
        *,
        cache_count_max: int = CACHE_COUNT_MAX,
        cache_ttl_s: float = CACHE_TTL_S,
    ) -> None:
        self._pool = pool
        self._master = MasterKey(master_key, other_master_keys)
        self._cache_count_max = cache_count_max
        self._cache_ttl_s = cache_ttl_s
        # By the number of the subject's id; None: destroyed.
        self._ciphers: OrderedDict[int, AESGCM | None] = OrderedDict()
        self._loaded_at_s: dict[int, float] = {}

    async def ensure(self, subject_ids: Sequence[UUID]) -> None:
        now_s = time.monotonic()
        wanted = {subject_id.int: subject_id for subject_id in subject_ids}
        if len(wanted) > self._cache_count_max:
            raise ValueError(f"{len(wanted)} subjects at once, the ring holds {self._cache_count_max}")
        unknown = [subject_id for number, subject_id in wanted.items() if not self._fresh(number, now_s)]
        if not unknown:
            return
        keys = await ensure_keys(self._pool, DATA_KEYS, unknown, self._master)
        for subject_id, key in keys.items():
            self._remember(subject_id.int, None if key is None else AESGCM(key), now_s)

    def seal(self, subject_id: UUID, plaintext: bytes, aad: bytes) -> bytes:
        cipher = self._loaded(subject_id)
        if cipher is None:
            raise SubjectErased(subject_id)
        return seal(cipher, plaintext, aad)

    def open(self, subject_id: UUID, sealed: bytes, aad: bytes) -> bytes | None:
        cipher = self._loaded(subject_id)
        return None if cipher is None else unseal(cipher, sealed, aad)

    async def destroy(self, subject_id: UUID) -> None:
        async with connected(self._pool) as connection:
            await connection.execute(
                "INSERT INTO data_key (subject_id, destroyed_at) VALUES (%s, clock_timestamp())"
                " ON CONFLICT (subject_id) DO UPDATE SET wrapped = NULL, destroyed_at = clock_timestamp()"
                " WHERE data_key.destroyed_at IS NULL",
                [subject_id],
            )
        self._remember(subject_id.int, None, time.monotonic())

    def forget(self, subject_id: UUID) -> None:
        """Drop the key from this process's memory; the next `ensure` asks the store."""
        self._forget(subject_id.int)

    def _forget(self, number: int) -> None:
        self._ciphers.pop(number, None)
        self._loaded_at_s.pop(number, None)

    def _loaded(self, subject_id: UUID) -> AESGCM | None:
        try:
            return self._ciphers[subject_id.int]
        except KeyError:
            raise KeyNotLoaded(subject_id) from None

    def _fresh(self, number: int, now_s: float) -> bool:
        if number not in self._ciphers:
            return False
        # Also the stale ones: what a caller asks for together must not push itself out.
        self._ciphers.move_to_end(number)
        return self._ciphers[number] is None or now_s - self._loaded_at_s[number] < self._cache_ttl_s

    def _remember(self, number: int, cipher: AESGCM | None, loaded_at_s: float) -> None:
        known = self._ciphers.get(number, cipher)
        # A destruction is final: an answer read before it must not bring the key back.
        self._ciphers[number] = cipher if known is not None else None
        self._ciphers.move_to_end(number)
        self._loaded_at_s[number] = loaded_at_s
        while len(self._ciphers) > self._cache_count_max:
            self._forget(next(iter(self._ciphers)))


async def ensure_keys(
    pool: Pool, table: KeyTable, row_ids: Iterable[UUID], master: MasterKey
) -> dict[UUID, bytes | None]:
    """The key of each row, made where there is none; None where it was destroyed.

    One round trip, and another one only for rows that somebody else is creating at this moment: those are in
    nobody's snapshot yet.
    """
    missing = sorted(row_ids)  # Sorted, so that two callers wait for each other and never in a circle.
    keys: dict[UUID, bytes | None] = {}
    for _ in range(_ENSURE_ATTEMPT_COUNT):
        for row_id, wrapped in await _insert_and_read(pool, table, missing, master):
            keys[row_id] = None if wrapped is None else master.unwrap(bytes(wrapped), table.aad(row_id))
        missing = [row_id for row_id in missing if row_id not in keys]
        if not missing:
            return keys
    raise RuntimeError(f"{len(missing)} rows of {table.name} neither insertable nor readable")


async def _insert_and_read(
    pool: Pool, table: KeyTable, row_ids: list[UUID], master: MasterKey
) -> list[tuple[UUID, bytes | None]]:
    proposed = [master.wrap(new_key(), table.aad(row_id)) for row_id in row_ids]
    async with connected(pool) as connection:
        cursor = await connection.execute(
            table.query("""
            WITH made AS (
                INSERT INTO {table} ({id}, wrapped)
                SELECT * FROM unnest(%s::uuid[], %s::bytea[])
                ON CONFLICT ({id}) DO NOTHING
                RETURNING {id}, wrapped
            )
            SELECT {id}, wrapped FROM made
            UNION ALL
            SELECT {id}, wrapped FROM {table} WHERE {id} = ANY(%s)
            """),
            [row_ids, proposed, row_ids],
        )
        return [(row_id, wrapped) for row_id, wrapped in await cursor.fetchall()]


async def rewrap(pool: Pool, old: Sequence[bytes], new: bytes, table: KeyTable = DATA_KEYS) -> int:
    """Wrap every key that one of the master keys `old` wrapped with `new` instead; how many that were.

    Safe beside running processes that have both keys, and safe to run again after it was cut off.
    """
    master = MasterKey(new, old)
    changed_count = 0
    after = UUID(int=0)
    while rows := await _read_batch(pool, table, after):
        after = rows[-1][0]
        changed_count += await _rewrap_batch(pool, table, rows, master)
    return changed_count


async def _read_batch(pool: Pool, table: KeyTable, after: UUID) -> WrappedKeys:
    async with connected(pool) as connection:
        cursor = await connection.execute(
            table.query("""
            SELECT {id}, wrapped FROM {table}
            WHERE {id} > %s AND wrapped IS NOT NULL
            ORDER BY {id} LIMIT %s
            """),
            [after, REWRAP_BATCH_COUNT],
        )
        return [(row_id, bytes(wrapped)) for row_id, wrapped in await cursor.fetchall()]


async def _rewrap_batch(pool: Pool, table: KeyTable, rows: WrappedKeys, master: MasterKey) -> int:
    old = [(row_id, wrapped) for row_id, wrapped in rows if not master.wrapped(wrapped)]
    new = [
        master.wrap(master.unwrap(wrapped, table.aad(row_id)), table.aad(row_id)) for row_id, wrapped in old
    ]
    async with connected(pool) as connection:
        # Compared with what was read: a key destroyed meanwhile must stay destroyed.
        cursor = await connection.execute(
            table.query("""
            UPDATE {table} SET wrapped = changed.new
            FROM unnest(%s::uuid[], %s::bytea[], %s::bytea[]) AS changed (id, old, new)
            WHERE {table}.{id} = changed.id AND {table}.wrapped = changed.old
            """),
            [[row_id for row_id, _ in old], [wrapped for _, wrapped in old], new],
        )
        return cursor.rowcount
