"""Which ranges of shards a relay serves: leases, shared evenly among the relays that are alive.

Each relay sits on a seat, a lease too, so that all of them know how many they are; a seat's rank says how many ranges
its relay should hold. Who has too many gives some back, who has too few takes what is free or has expired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from domain.ids import SHARDS
from domain.leases import Lease, Leases

SEAT: Final = "relay-seat"
RANGE: Final = "relay"


def lease_of(number: int) -> str:
    """The lease of a range."""
    return f"{RANGE}/{number}"


def range_of(shard: int, ranges: int) -> int:
    """The range that a shard belongs to; shards that share a partition share a range wherever that is possible."""
    return shard % ranges


def shards_of(number: int, ranges: int) -> range:
    """The shards of a range."""
    return range(number, SHARDS, ranges)


class Ranges:
    """The ranges of one relay. `holder` is `slot/incarnation`: it inherits at once what its slot's last life held.

    `epochs` says what is held, and stays true as far as `renew` came when it fails.
    """

    def __init__(self, leases: Leases, holder: str, count: int, ttl_s: float) -> None:
        self._leases, self._holder, self._count, self._ttl_s = leases, holder, count, ttl_s
        slot, self._named_by_slot, _ = holder.partition("/")
        self._slot = slot + "/"
        self._seat: int | None = None
        self._share = 0
        self.epochs: dict[int, int] = {}

    @property
    def wants_more(self) -> bool:
        """Whether it has fewer ranges than its share."""
        return len(self.epochs) < self._share

    @property
    def surplus(self) -> list[int]:
        """What it has beyond its share."""
        return sorted(self.epochs)[self._share :]

    async def renew(self) -> None:
        """Prolong what is held, and take what is free as far as the share goes.

        Raises:
            LogUnavailable: the leases cannot be reached.
        """
        for number, epoch in list(self.epochs.items()):
            found = await self._acquire(lease_of(number))
            if found is None:
                self.epochs.pop(number, None)
            elif found != epoch:
                self.epochs[number] = found
        await self._sit(await self._leases.held())
        held = await self._leases.held()
        self._share = self._share_of(held)
        others = _numbers(held, RANGE, lambda lease: not self._is_of_my_slot(lease))
        for number in range(self._count):
            if self.wants_more and number not in self.epochs and number not in others:
                epoch_won = await self._acquire(lease_of(number))
                if epoch_won is not None:
                    self.epochs[number] = epoch_won

    def forget(self, number: int, epoch: int) -> None:
        """A save under this epoch was refused: the range is another's, or was rewound."""
        if self.epochs.get(number) == epoch:
            del self.epochs[number]

    async def release(self, number: int) -> None:
        """Give a range back."""
        self.epochs.pop(number, None)
        await self._leases.release(lease_of(number), self._holder)

    async def leave(self) -> None:
        """Give everything back, so that nobody need wait until it expires."""
        for number in list(self.epochs):
            await self.release(number)
        if self._seat is not None:
            await self._leases.release(f"{SEAT}/{self._seat}", self._holder)
            self._seat = None

    async def _acquire(self, name: str) -> int | None:
        return await self._leases.acquire(
            name, self._holder, self._ttl_s, from_earlier_life=bool(self._named_by_slot)
        )

    async def _sit(self, held: list[Lease]) -> None:
        """Keep the seat, inherit one, or find one; who finds none serves nothing until one is free."""
        inherited = _numbers(held, SEAT, self._is_of_my_slot)
        for seat in dict.fromkeys(
            (*([] if self._seat is None else [self._seat]), *inherited, *range(self._count))
        ):
            if await self._acquire(f"{SEAT}/{seat}") is not None:
                self._seat = seat
                return
        self._seat = None

    def _share_of(self, held: list[Lease]) -> int:
        seats = _numbers(held, SEAT)
        if self._seat not in seats:
            return 0
        return (self._count + len(seats) - 1 - seats.index(self._seat)) // len(seats)

    def _is_of_my_slot(self, lease: Lease) -> bool:
        return lease.holder == self._holder or (
            bool(self._named_by_slot) and lease.holder.startswith(self._slot)
        )


def _numbers(held: list[Lease], kind: str, which: Callable[[Lease], bool] = lambda lease: True) -> list[int]:
    prefix = kind + "/"
    return sorted(
        int(lease.name.removeprefix(prefix))
        for lease in held
        if lease.name.startswith(prefix) and which(lease)
    )
