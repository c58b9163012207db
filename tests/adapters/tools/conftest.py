from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from adapters.egress.client import ANY_PORT, EgressClient
from tests.peers.web import WebPeer, web_peer


@pytest.fixture
async def peer() -> AsyncIterator[WebPeer]:
    async with web_peer() as peer:
        yield peer


@pytest.fixture
async def egress() -> AsyncIterator[EgressClient]:
    client = EgressClient(allow=["127.0.0.0/8"], ports=ANY_PORT)
    yield client
    await client.close()
