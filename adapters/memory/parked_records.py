"""Parked streams in this process's memory: the contract of `domain.parked` without a database, gone with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from domain.parked import Asked, NotParked, ParkedStream, Skipped, Stuck, check_ask


class MemoryParkedRecords:
    """Implements `domain.parked.ParkedRecords`."""

    def __init__(self) -> None:
        self._parked: dict[tuple[str, UUID], ParkedStream] = {}
        self._asked: dict[tuple[str, UUID], ParkedStream] = {}  # in the order in which they were asked for
        self._skipped: list[Skipped] = []

    async def park(self, processor: str, stream_id: UUID, tenant_id: UUID | None, stuck: Stuck) -> None:
        key = processor, stream_id
        kept = self._parked.get(key)
        if kept is None:
            self._parked[key] = ParkedStream(processor, stream_id, tenant_id, stuck, datetime.now(UTC))
        elif stuck.position <= kept.stuck.position:
            self._parked[key] = replace(kept, stuck=stuck)

    async def waiting(self, processor: str) -> set[UUID]:
        return {stream_id for name, stream_id in self._parked if name == processor}

    async def waits(self, processor: str, stream_id: UUID) -> bool:
        return (processor, stream_id) in self._parked

    async def streams(self, limit: int = 1_000) -> list[ParkedStream]:
        return sorted(self._parked.values(), key=lambda each: each.parked_at)[:limit]

    async def ask(self, processor: str, stream_id: UUID, asked: Asked) -> ParkedStream:
        check_ask(asked)
        key = processor, stream_id
        if key not in self._parked:
            raise NotParked(f"stream {stream_id} of processor {processor!r}")
        self._parked[key] = replace(self._parked[key], asked=asked)
        self._asked.pop(key, None)
        self._asked[key] = self._parked[key]
        return self._parked[key]

    async def asked(self, processor: str, limit: int = 100) -> list[ParkedStream]:
        keys = [key for key in self._asked if key[0] == processor and key in self._parked]
        return [self._parked[key] for key in keys[:limit]]

    async def carried_out(self, parked: ParkedStream, stuck: Stuck | None) -> None:
        key = parked.processor, parked.stream_id
        kept = self._parked.pop(key, None)
        self._asked.pop(key, None)
        if kept is None:
            return
        asked = parked.asked
        if asked is not None and asked.what == "skip" and parked.stuck.position:
            self._skipped.append(
                Skipped(*key, parked.stuck, asked.by, asked.reason, skipped_at=datetime.now(UTC))
            )
        if stuck is not None:
            self._parked[key] = replace(kept, stuck=stuck, asked=None, parked_at=datetime.now(UTC))

    async def note_skip(self, skipped: Sequence[Skipped]) -> None:
        self._skipped += skipped

    async def skipped(self, limit: int = 1_000) -> list[Skipped]:
        return sorted(self._skipped, key=lambda each: each.skipped_at, reverse=True)[:limit]
