"""Leases between the tasks of one process, gone with it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from domain.leases import Lease, Mark
from domain.ports import Clock

_GIVEN_BACK = datetime.min.replace(tzinfo=UTC)


def utc_now() -> datetime:
    """The clock of this machine."""
    return datetime.now(UTC)


class MemoryLeases:
    """Implements `domain.leases.Leases`."""

    def __init__(self, clock: Clock = utc_now) -> None:
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._marks: dict[tuple[str, int], Mark] = {}

    async def acquire(
        self, name: str, holder: str, ttl_s: float, *, from_earlier_life: bool = False
    ) -> int | None:
        now, known = self._clock(), self._leases.get(name)
        epoch = known.epoch if known else 0
        if known is None or known.holder != holder:
            same_slot = from_earlier_life and known is not None and _slot(known.holder) == _slot(holder)
            if known is not None and known.expires_at > now and not same_slot:
                return None
            epoch += 1
        self._leases[name] = Lease(name, holder, epoch, now + timedelta(seconds=ttl_s))
        return epoch

    async def release(self, name: str, holder: str) -> None:
        known = self._leases.get(name)
        if known is not None and known.holder == holder:
            self._leases[name] = replace(known, holder="", expires_at=_GIVEN_BACK)

    async def held(self) -> list[Lease]:
        now = self._clock()
        return [lease for _, lease in sorted(self._leases.items()) if lease.holder and lease.expires_at > now]

    async def save_marks(self, name: str, epoch: int, marks: Collection[Mark]) -> bool:
        known = self._leases.get(name)
        if known is None or known.epoch != epoch:
            return False
        self._set(marks)
        return True

    async def marks(self) -> list[Mark]:
        return sorted(self._marks.values())

    async def rewind(self, name: str, marks: Collection[Mark]) -> None:
        known = self._leases.get(name)
        self._leases[name] = Lease(name, "", known.epoch + 1 if known else 1, _GIVEN_BACK)
        self._set(marks)

    def _set(self, marks: Collection[Mark]) -> None:
        self._marks.update({(mark.topic, mark.shard): mark for mark in marks})


def _slot(holder: str) -> str:
    return holder.partition("/")[0]
