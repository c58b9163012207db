"""The tables of the key ring and the vault in a database of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import psycopg
import pytest

from adapters.postgres import key_ring, server_secret, vault
from adapters.postgres.key_ring import Pool
from adapters.postgres.pool import SCHEMA, open_pool

CONNECTION_COUNT = 8


@pytest.fixture
async def tables(database_url: str) -> AsyncIterator[Pool]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(f"CREATE SCHEMA {SCHEMA}")
        await connection.execute(f"SET search_path TO {SCHEMA}")
        await connection.execute(key_ring.TABLES)
        await connection.execute(vault.TABLES)
        await connection.execute(server_secret.TABLES)
    async with open_pool(database_url, CONNECTION_COUNT) as pool:
        yield pool
