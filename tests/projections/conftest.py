from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.projections.world import World, world_on


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with world_on(database_url) as world:
        yield world
