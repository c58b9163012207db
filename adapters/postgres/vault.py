"""Secrets in PostgreSQL, encrypted under a key per tenant that the master key wraps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from adapters.crypto import MasterKey, seal, unseal
from adapters.postgres.key_ring import KeyTable, Pool, connected, ensure_keys
from adapters.vault import checked_secret, secret_aad, secret_id_of, secret_ref_of

TABLES = """
CREATE TABLE IF NOT EXISTS vault_key (
    tenant_id  uuid        PRIMARY KEY,
    wrapped    bytea       NOT NULL,          -- by the master key
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS vault_secret (
    secret_id  uuid        PRIMARY KEY,
    tenant_id  uuid        NOT NULL,
    name       text        NOT NULL,
    sealed     bytea       NOT NULL,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (tenant_id, name)
);
"""

CACHE_COUNT_MAX = 10_000
VAULT_KEYS = KeyTable("vault_key", "tenant_id")


class PostgresVault:
    """The same name keeps its `secret_ref` when its secret is replaced."""

    def __init__(self, pool: Pool, master_key: bytes, other_master_keys: Sequence[bytes] = ()) -> None:
        self._pool = pool
        self._master = MasterKey(master_key, other_master_keys)
        self._ciphers: OrderedDict[UUID, AESGCM] = OrderedDict()

    async def put(self, tenant_id: UUID, name: str, secret: str) -> str:
        plaintext = checked_secret(name, secret)
        cipher = await self._cipher(tenant_id)
        new_id = uuid4()
        sealed = seal(cipher, plaintext, secret_aad(tenant_id, new_id))
        async with connected(self._pool) as connection, connection.transaction():
            # Names the row, and locks it until the end of the transaction: what is sealed is bound to its id.
            cursor = await connection.execute(
                "INSERT INTO vault_secret (secret_id, tenant_id, name, sealed) VALUES (%s, %s, %s, %s)"
                " ON CONFLICT (tenant_id, name) DO UPDATE SET written_at = clock_timestamp()"
                " RETURNING secret_id",
                [new_id, tenant_id, name, sealed],
            )
            row = await cursor.fetchone()
            assert row is not None
            secret_id: UUID = row[0]
            if secret_id != new_id:
                await connection.execute(
                    "UPDATE vault_secret SET sealed = %s WHERE secret_id = %s",
                    [seal(cipher, plaintext, secret_aad(tenant_id, secret_id)), secret_id],
                )
        return secret_ref_of(secret_id)

    async def get(self, tenant_id: UUID, secret_ref: str) -> str | None:
        secret_id = secret_id_of(secret_ref)
        if secret_id is None:
            return None
        async with connected(self._pool) as connection:
            cursor = await connection.execute(
                "SELECT sealed FROM vault_secret WHERE tenant_id = %s AND secret_id = %s",
                [tenant_id, secret_id],
            )
            row = await cursor.fetchone()
        if row is None:
            return None
        cipher = await self._cipher(tenant_id)
        return unseal(cipher, bytes(row[0]), secret_aad(tenant_id, secret_id)).decode()

    async def remove(self, tenant_id: UUID, secret_ref: str) -> None:
        secret_id = secret_id_of(secret_ref)
        if secret_id is None:
            return
        async with connected(self._pool) as connection:
            await connection.execute(
                "DELETE FROM vault_secret WHERE tenant_id = %s AND secret_id = %s", [tenant_id, secret_id]
            )

    async def remove_all(self, tenant_id: UUID) -> None:
        self._ciphers.pop(tenant_id, None)
        async with connected(self._pool) as connection, connection.transaction():
            await connection.execute("DELETE FROM vault_secret WHERE tenant_id = %s", [tenant_id])
            await connection.execute("DELETE FROM vault_key WHERE tenant_id = %s", [tenant_id])

    async def _cipher(self, tenant_id: UUID) -> AESGCM:
        cipher = self._ciphers.get(tenant_id)
        if cipher is None:
            key = (await ensure_keys(self._pool, VAULT_KEYS, [tenant_id], self._master))[tenant_id]
            assert key is not None  # The column does not allow it.
            cipher = self._ciphers[tenant_id] = AESGCM(key)
        self._ciphers.move_to_end(tenant_id)
        while len(self._ciphers) > CACHE_COUNT_MAX:
            self._ciphers.popitem(last=False)
        return cipher
