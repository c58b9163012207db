"""Logins, sessions and the uses of keys in PostgreSQL, beside the log: they change, expire and must be forgotten."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from adapters.postgres.pool import deadline
from domain.event_log import LogUnavailable
from domain.ports import Login, Session
from domain.user import canonical_email

TABLES = """
CREATE TABLE IF NOT EXISTS login (
    user_id       uuid        PRIMARY KEY,
    address       bytea       NOT NULL UNIQUE,     -- HMAC of the canonical e-mail address
    password_hash text        NOT NULL,            -- argon2id
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS session (
    digest     bytea       PRIMARY KEY,            -- SHA-256 of the token, which nobody keeps
    user_id    uuid        NOT NULL,
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS session_by_user ON session (user_id);
CREATE INDEX IF NOT EXISTS session_by_expiry ON session (expires_at);
CREATE TABLE IF NOT EXISTS api_key_use (
    key_id       text        PRIMARY KEY,
    last_used_at timestamptz NOT NULL
);
"""

QUERY_S = 4.0
EXPIRED_REMOVED_MAX = 100  # sessions swept with each login

Connection = psycopg.AsyncConnection[Any]
Pool = AsyncConnectionPool[Any]


class _Store:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        try:
            async with asyncio.timeout(QUERY_S), self._pool.connection(timeout=QUERY_S) as connection:
                with deadline(connection, QUERY_S):
                    yield connection
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, OSError) as failure:
            raise LogUnavailable(f"the identity tables cannot be reached: {failure}") from failure


class PostgresLogins(_Store):
    """Implements `domain.ports.Logins`. Addresses are kept as digests under `address_key`."""

    def __init__(self, pool: Pool, address_key: bytes) -> None:
        super().__init__(pool)
        self._address_key = address_key

    async def reserve(self, email: str, login: Login) -> Login:
        async with self._connection() as connection:
            await connection.execute(
                "INSERT INTO login (user_id, address, password_hash) VALUES (%s, %s, %s)"
                " ON CONFLICT (address) DO NOTHING",
                [login.user_id, self._digest(email), login.password_hash],
            )
        # It may have been forgotten in between; then nobody else has it.
        return await self.find(email) or login

    async def find(self, email: str) -> Login | None:
        async with self._connection() as connection:
            cursor = connection.cursor(row_factory=class_row(Login))
            await cursor.execute(
                "SELECT user_id, password_hash FROM login WHERE address = %s", [self._digest(email)]
            )
            return await cursor.fetchone()

    async def change_password(self, user_id: UUID, password_hash: str) -> None:
        async with self._connection() as connection:
            await connection.execute(
                "UPDATE login SET password_hash = %s WHERE user_id = %s", [password_hash, user_id]
            )

    async def forget(self, user_id: UUID) -> None:
        async with self._connection() as connection:
            await connection.execute("DELETE FROM login WHERE user_id = %s", [user_id])

    def _digest(self, email: str) -> bytes:
        return hmac.new(self._address_key, canonical_email(email).encode(), hashlib.sha256).digest()


class PostgresSessions(_Store):
    """Implements `domain.ports.Sessions`."""

    async def begin(self, session: Session) -> None:
        async with self._connection() as connection:
            await connection.execute(
                "DELETE FROM session WHERE digest IN"
                " (SELECT digest FROM session WHERE expires_at < clock_timestamp() LIMIT %s)",
                [EXPIRED_REMOVED_MAX],
            )
            await connection.execute(
                "INSERT INTO session (digest, user_id, expires_at) VALUES (%s, %s, %s)",
                [session.digest, session.user_id, session.expires_at],
            )

    async def find(self, digest: bytes, now: datetime) -> Session | None:
        async with self._connection() as connection:
            cursor = connection.cursor(row_factory=class_row(Session))
            await cursor.execute(
                "SELECT digest, user_id, expires_at FROM session WHERE digest = %s AND expires_at > %s",
                [digest, now],
            )
            return await cursor.fetchone()

    async def end(self, digest: bytes) -> None:
        async with self._connection() as connection:
            await connection.execute("DELETE FROM session WHERE digest = %s", [digest])

    async def end_all(self, user_id: UUID) -> None:
        async with self._connection() as connection:
            await connection.execute("DELETE FROM session WHERE user_id = %s", [user_id])


class PostgresKeyUses(_Store):
    """Implements `domain.ports.KeyUses`."""

    async def note(self, used_at: Mapping[str, datetime]) -> None:
        async with self._connection() as connection:
            await connection.execute(
                "INSERT INTO api_key_use (key_id, last_used_at)"
                " SELECT * FROM unnest(%s::text[], %s::timestamptz[])"
                " ON CONFLICT (key_id) DO UPDATE"
                " SET last_used_at = greatest(api_key_use.last_used_at, excluded.last_used_at)",
                [list(used_at), list(used_at.values())],
            )

    async def last(self, key_ids: Sequence[str]) -> dict[str, datetime]:
        async with self._connection() as connection:
            cursor = await connection.execute(
                "SELECT key_id, last_used_at FROM api_key_use WHERE key_id = ANY(%s)", [list(key_ids)]
            )
            return dict(await cursor.fetchall())
