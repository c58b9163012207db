"""What somebody who waits for a turn is told while it runs: its records, and pieces of text on their way.

Pieces of text never enter the log; the record that follows them is the truth. A new attempt starts its text anew.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol
from uuid import UUID

from domain.ids import TurnId
from schemas.records import AnyRecord


class Token(NamedTuple):
    """A piece of the answer being written; `start` characters of this attempt's text came before it."""

    turn_id: UUID
    iteration: int
    attempt: int
    start: int
    text: str


class Follower(Protocol):
    """One who waits for a turn."""

    partial: Token | None
    """The text written so far of the model call under way when following began, as one piece."""

    async def next(self, timeout_s: float) -> AnyRecord | Token | None:
        """What happened next; None when nothing did in that time."""

    async def end(self, timeout_s: float) -> list[AnyRecord] | None:
        """Everything recorded since following began, once the turn has ended; None when it has not in that time."""


class TurnFeed(Protocol):
    """Where turns are followed. Losing what it carries loses nothing that the log does not have."""

    def follow(self, turn_id: TurnId) -> AbstractContextManager[Follower]:
        """Hear of a turn from now on; begin before sending the command, so that nothing is missed."""

    def token(self, turn_id: TurnId, iteration: int, attempt: int, text: str) -> None:
        """Pass on a piece of text; called by the worker that runs the turn."""
