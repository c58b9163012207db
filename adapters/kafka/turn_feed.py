"""Turns followed across processes: pieces of text on their way from the worker that runs a turn to whoever serves its user.

They travel on a short-lived topic, keyed by turn, past the log; records come to followers from the log itself. What is
lost on the way is in the record that follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from adapters.memory.turn_feed import MemoryFollower, MemoryTurnFeed
from domain.ids import TurnId
from schemas.records import AnyRecord
from schemas.turn_feed import Token

log_of = logging.getLogger(__name__)

WAITING_MAX = 10_000  # pieces kept while the broker is slow or away; beyond it they are dropped
SEND_S = 5.0


class _Call(NamedTuple):
    """A model call under way: the text of one attempt."""

    turn_id: UUID
    iteration: int
    attempt: int


_encode = msgspec.msgpack.Encoder(uuid_format="bytes").encode
_decode = msgspec.msgpack.Decoder(Token).decode


class KafkaTurnFeed:
    """Implements `TurnFeed`. A worker runs `send`; a process that has followers has `take` called with the topic's values."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._local = MemoryTurnFeed()
        self._waiting: dict[_Call, list[str]] = {}
        self._waiting_count = 0
        self._written: dict[
            UUID, tuple[_Call, int]
        ] = {}  # by turn: characters handed over of its call under way
        self._news = asyncio.Event()

    # --- whoever follows

    def follow(self, turn_id: TurnId) -> MemoryFollower:
        """As in `TurnFeed`."""
        return self._local.follow(turn_id)

    def is_followed(self, turn_id: UUID) -> bool:
        """Whether somebody in this process waits for the turn."""
        return self._local.is_followed(turn_id)

    def publish(self, records: Sequence[AnyRecord]) -> None:
        """Tell followers of what is in the log."""
        self._local.publish(records)

    async def take(self, values: Sequence[bytes]) -> None:
        """Pass on what workers have sent."""
        for value in values:
            try:
                self._local.pass_on(_decode(value))
            except msgspec.DecodeError as unknown:
                log_of.debug("not a piece of text: %s", unknown)

    # --- the worker that runs the turn

    def token(self, turn_id: TurnId, iteration: int, attempt: int, text: str) -> None:
        """As in `TurnFeed`; pieces that wait together travel as one."""
        if self._waiting_count >= WAITING_MAX:
            return
        self._waiting.setdefault(_Call(turn_id, iteration, attempt), []).append(text)
        self._waiting_count += 1
        self._news.set()

    async def send(self, producer: AIOKafkaProducer) -> None:
        """Send what this worker's model calls write, until cancelled; survives any outage of the broker."""
        while True:
            await self._news.wait()
            self._news.clear()
            waiting, self._waiting, self._waiting_count = self._waiting, {}, 0
            for call, pieces in waiting.items():
                frame = self._frame(call, "".join(pieces))
                try:
                    async with asyncio.timeout(SEND_S):
                        await producer.send(self._topic, _encode(frame), key=call.turn_id.bytes)
                except (KafkaError, TimeoutError) as failure:
                    log_of.info("pieces of text are lost: %r", failure)

    def _frame(self, call: _Call, text: str) -> Token:
        before, start = self._written.get(call.turn_id, (call, 0))
        start = start if before == call else 0
        self._written[call.turn_id] = call, start + len(text)
        if len(self._written) > WAITING_MAX:
            del self._written[next(iter(self._written))]
        return Token(*call, start, text)
