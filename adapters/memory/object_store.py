"""Objects in this process's memory, gone with it."""

from __future__ import annotations

from adapters.object_stores import checked_key


class MemoryObjectStore:
    """Keeps every object until it is deleted."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    async def put(self, key: str, content: bytes) -> None:
        self._contents[checked_key(key)] = bytes(content)

    async def get(self, key: str) -> bytes | None:
        return self._contents.get(checked_key(key))

    async def delete(self, key: str) -> None:
        self._contents.pop(checked_key(key), None)
