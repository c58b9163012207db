"""Public topics in this process's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from domain.ports import PublicMessage


class MemoryPublisher:
    """Implements `domain.ports.Publisher`; keeps everything, in the order in which it was given."""

    def __init__(self) -> None:
        self.messages: list[PublicMessage] = []

    async def send(self, messages: Sequence[PublicMessage]) -> Awaitable[None]:
        self.messages.extend(messages)
        acknowledged = asyncio.get_running_loop().create_future()
        acknowledged.set_result(None)
        return acknowledged
