"""The server's own secret: random, stored once, wrapped by the master key; what API keys and logins are checked with
follows from it, so that the master key can be replaced without touching them."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from psycopg.rows import TupleRow

from adapters.crypto import MASTER_KEY_ID_BYTES, MasterKey, UnknownMasterKey, new_key
from adapters.postgres import key_ring
from adapters.postgres.key_ring import DATA_KEYS, KeyTable, Pool, connected
from adapters.postgres.vault import VAULT_KEYS

TABLES = """
CREATE TABLE IF NOT EXISTS server_secret (
    secret_id  uuid        PRIMARY KEY,
    wrapped    bytea       NOT NULL,          -- by the master key
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""
SERVER_SECRETS = KeyTable("server_secret", "secret_id")
SECRET_ID = UUID(int=1)
WRAPPED = (DATA_KEYS, VAULT_KEYS, SERVER_SECRETS)  # every table of keys that the master key wraps


async def server_secret(pool: Pool, master_key: bytes, other_master_keys: Sequence[bytes] = ()) -> bytes:
    """The secret; made when there is none. Processes that start at once agree on one.

    In a database that was used before there was such a secret, it is the master key of then: keys and logins that were
    made under it stay valid.

    Raises:
        UnknownMasterKey: wrapped by a master key that this process was not given.
    """
    master, aad = MasterKey(master_key, other_master_keys), SERVER_SECRETS.aad(SECRET_ID)
    row = await _row(pool, "SELECT wrapped FROM server_secret WHERE secret_id = %s", SECRET_ID)
    if row is None:
        secret = await _earlier(pool, (master_key, *other_master_keys)) or new_key()
        async with connected(pool) as connection:
            await connection.execute(
                "INSERT INTO server_secret (secret_id, wrapped) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [SECRET_ID, master.wrap(secret, aad)],
            )
        row = await _row(pool, "SELECT wrapped FROM server_secret WHERE secret_id = %s", SECRET_ID)
    assert row is not None
    return master.unwrap(bytes(row[0]), aad)


async def rotate(pool: Pool, master_key: bytes, other_master_keys: Sequence[bytes]) -> dict[str, int]:
    """Wrap everything that one of the others wrapped with `master_key` instead; how many keys, by table.

    Safe beside running processes that have all these keys, and safe to run again after it was cut off.
    """
    return {
        table.name: await key_ring.rewrap(pool, other_master_keys, master_key, table) for table in WRAPPED
    }


async def wrapped_by_others(pool: Pool, master_key: bytes) -> int:
    """How many keys another master key than this one wraps."""
    key_id, count = MasterKey(master_key).id, 0
    for table in WRAPPED:
        async with connected(pool) as connection:
            cursor = await connection.execute(
                table.query(
                    "SELECT count(*) FROM {table} WHERE wrapped IS NOT NULL AND substr(wrapped, 1, %s) <> %s"
                ),
                [len(key_id), key_id],
            )
            row = await cursor.fetchone()
        count += int(row[0]) if row is not None else 0
    return count


async def _earlier(pool: Pool, master_keys: Sequence[bytes]) -> bytes | None:
    """The master key that wrapped the first key of a database in use; None for a new database."""
    row = await _row(
        pool, "SELECT wrapped FROM data_key WHERE wrapped IS NOT NULL ORDER BY created_at LIMIT 1"
    )
    if row is None:
        return None
    for each in master_keys:
        if MasterKey(each).wrapped(bytes(row[0])):
            return each
    raise UnknownMasterKey(f"no master key with id {bytes(row[0])[:MASTER_KEY_ID_BYTES].hex()}")


async def _row(pool: Pool, query: str, *arguments: UUID) -> TupleRow | None:
    async with connected(pool) as connection:
        cursor = await connection.execute(query.encode(), list(arguments))
        return await cursor.fetchone()
