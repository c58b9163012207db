"""One server of each layout for all tests of the HTTP layer, and people who use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.api.client import Client, Person
from tests.api.platform import Platform, running
from tests.peers.databases import new_database

LAYOUTS = ("in one process", "over Kafka")
HERE = Path(__file__).parent
_running = ExitStack()
_platforms: dict[str, Platform] = {}


@pytest.fixture(params=LAYOUTS)
def platform(request: pytest.FixtureRequest, postgres_dsn: str) -> Platform:
    """The server, in both layouts: whoever uses it cannot tell them apart. It serves all tests of this folder."""
    layout = request.param
    if layout not in _platforms:
        broker = request.getfixturevalue("broker") if layout == "over Kafka" else None
        url = _running.enter_context(new_database(postgres_dsn))
        _platforms[layout] = _running.enter_context(running(url, broker))
    return _platforms[layout]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """The servers' threads end with the folder's last test, so that they disturb none that comes after."""
    if nextitem is None or not nextitem.path.is_relative_to(HERE):
        _platforms.clear()
        _running.pop_all().close()


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
