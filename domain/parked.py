"""Streams that a processor could not go on with: where they stand, what operators ask for, what was left out.

A record that cannot be handled parks its stream for its processor. Later records of the stream wait in the log, in
order; every other stream goes on. An operator asks to try again, or to leave the record out, and a worker of that
processor does so. A fault of the store is `domain.event_log.LogUnavailable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, Protocol
from uuid import UUID

ERROR_CHARS_MAX: Final = 2_000
REASON_CHARS_MAX: Final = 1_000

What = Literal["retry", "skip"]


@dataclass(frozen=True, slots=True)
class Stuck:
    """The record that a stream stands at. `position` and `stream_version` are 0 when it could not even be told which."""

    shard: int
    position: int
    stream_version: int
    type: str
    error: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What an operator wants to be done about a parked stream. A skip always has a reason."""

    what: What
    by: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ParkedStream:
    """A stream that waits. `tenant_id` is None when the record did not even say whose it is."""

    processor: str
    stream_id: UUID
    tenant_id: UUID | None
    stuck: Stuck
    parked_at: datetime
    asked: Asked | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that was left out for good, by whom and why."""

    processor: str
    stream_id: UUID
    stuck: Stuck
    by: str
    reason: str
    skipped_at: datetime


class NotParked(Exception):
    """The stream does not wait for that processor."""


class ParkedRecords(Protocol):
    """The parked streams of all processors. Every call is bounded in time."""

    async def park(self, processor: str, stream_id: UUID, tenant_id: UUID | None, stuck: Stuck) -> None:
        """Have a stream wait from a record on. One that waits already stays where it stands, if that is earlier."""

    async def waiting(self, processor: str) -> set[UUID]:
        """The streams that wait for a processor."""

    async def waits(self, processor: str, stream_id: UUID) -> bool:
        """Whether a stream waits at this moment."""

    async def streams(self, limit: int = 1_000) -> list[ParkedStream]:
        """The streams that wait, longest first."""

    async def ask(self, processor: str, stream_id: UUID, asked: Asked) -> ParkedStream:
        """Ask a processor's workers to go on with a stream, instead of what was asked before.

        Raises:
            NotParked: it does not wait.
            ValueError: a skip without a reason.
        """

    async def asked(self, processor: str, limit: int = 100) -> list[ParkedStream]:
        """The streams of a processor that an operator wants it to go on with, first asked first."""

    async def carried_out(self, parked: ParkedStream, stuck: Stuck | None) -> None:
        """What was asked was done. The stream goes on, or stands at `stuck`; a record that was skipped is remembered."""

    async def note_skip(self, skipped: Sequence[Skipped]) -> None:
        """Remember records that were left out elsewhere."""

    async def skipped(self, limit: int = 1_000) -> list[Skipped]:
        """The records that were left out, last first."""


def check_ask(asked: Asked) -> None:
    """What every store refuses.

    Raises:
        ValueError: a skip without a reason.
    """
    if asked.what == "skip" and not asked.reason.strip():
        raise ValueError("leaving a record out needs a reason")
