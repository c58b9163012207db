"""Turns are taken up as soon as a hint tells of them; their records come a little later, and find that done.

A hint may be lost, late, or wrong about whose turn it is: the records and the due rows make sure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID

from domain.ids import UserId, shard_of
from schemas.hints import Hint
from stream_processors.agent_turns import take_up
from stream_processors.processor import Work

log_of = logging.getLogger(__name__)


class Eager:
    """Hears of steps for `agent_turns`. `serves` says whether this worker handles the records of a shard's stream."""

    def __init__(self, serves: Callable[[int, UUID], bool], work: Work) -> None:
        self._serves, self._work = serves, work
        self._tasks: set[asyncio.Task[None]] = set()

    async def hear(self, hint: Hint) -> None:
        """Take in what the hint brings, and take those steps up that are ours, in the background."""
        work = self._work
        work.history.observe(await work.bus.take_in(hint.heads, hint.rows, begun=True))
        for step in hint.steps:
            is_ours = step.worker == work.worker
            if is_ours or (not step.worker and self._serves(shard_of(UserId(step.tenant_id)), step.turn_id)):
                taking = take_up(step, work)
                task = asyncio.create_task(taking)
                self._tasks.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            log_of.info("a turn waits for its record: %r", failure)
