"""Who may do what only one process should do at a time, and how far it has come with it.

A lease cannot keep a holder that was paused from going on; its epoch can: what a holder saves under its epoch is refused
once somebody else has held the lease. Only the store's clock counts. A fault is `domain.event_log.LogUnavailable`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Lease:
    """What `holder` may do until `expires_at`, by the store's clock."""

    name: str
    holder: str
    epoch: int
    expires_at: datetime


class Mark(NamedTuple):
    """How far a shard of the log has come on a topic.

    `next_offset` is one after the last record that the broker has acknowledged on the shard's partition; the topic was
    begun with the event after position `began`.
    """

    topic: str
    shard: int
    position: int
    next_offset: int
    began: int = 0


class Leases(Protocol):
    """The leases of one database. Every call is bounded in time."""

    async def acquire(
        self, name: str, holder: str, ttl_s: float, *, from_earlier_life: bool = False
    ) -> int | None:
        """Take or prolong a lease: its epoch, or None while another holds it.

        The epoch is the same for as long as nobody else held the lease, and grows with every new holder. `holder` names
        one life of a process. With `from_earlier_life`, written `slot/incarnation`, it takes over at once what an earlier
        life of its slot holds; only for slots that cannot live twice.
        """

    async def release(self, name: str, holder: str) -> None:
        """Give a lease back before it expires; nothing happens when it is another's by now."""

    async def held(self) -> list[Lease]:
        """The leases that have not expired, by name."""

    # --- what holders leave behind

    async def save_marks(self, name: str, epoch: int, marks: Collection[Mark]) -> bool:
        """Keep marks under a lease, all of them or none: False when the lease has got another epoch."""

    async def marks(self) -> list[Mark]:
        """All marks there are, by topic and shard."""

    async def rewind(self, name: str, marks: Collection[Mark]) -> None:
        """Set marks whoever holds the lease, and take it away: its holder begins anew from them."""
