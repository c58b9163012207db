"""One server of each layout for all tests of the HTTP layer, and people who use it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from tests.api.client import Client, Person
from tests.api.platform import Platform, running


@pytest.fixture(scope="session", params=["in one process", "over Kafka"])
def platform(request: pytest.FixtureRequest, postgres_dsn: str) -> Iterator[Platform]:
    """The server, in both layouts: whoever uses it cannot tell them apart."""
    broker = request.getfixturevalue("broker") if request.param == "over Kafka" else None
    name = f"oshaani_api_{uuid4().hex}"
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        url = urlunsplit(urlsplit(postgres_dsn)._replace(path=f"/{name}"))
        with running(url, broker) as platform:
            yield platform
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
async def client(platform: Platform) -> AsyncIterator[Client]:
    """Somebody without a name."""
    async with Client.open(platform.base_url) as client:
        yield client


@pytest.fixture
async def ada(platform: Platform, client: Client) -> Person:
    """A registered person with 200 credits, an API key and a published agent."""
    return await Person.register(platform, client)


@pytest.fixture
async def bob(platform: Platform, client: Client) -> Person:
    """Another one."""
    return await Person.register(platform, client)
