"""What follows on records that were published: their commands, and balances that came late.

Nothing waits for it but that a record is finished, so it is done for many records at once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from domain.event_log import CommandRow, EventLog, LogUnavailable
from domain.ports import PublicMessage, Publisher
from schemas.cloud_events import CloudEvents
from schemas.public_facts import CommandAccepted
from schemas.records import AnyRecord

GATHER_S: Final = 0.05  # how long records wait for each other
LOOKUPS_MAX: Final = 200  # commands asked for at once
COMMANDS_MAX: Final = 20_000  # known at once
PAUSE_S: Final = 0.5

K = TypeVar("K")
V = TypeVar("V")


async def insist(ask: Callable[[], Awaitable[V]]) -> V:
    """Ask the log for as long as it takes."""
    while True:
        try:
            return await ask()
        except LogUnavailable:
            await asyncio.sleep(PAUSE_S)


def keep(known: OrderedDict[K, V], key: K, value: V, count_max: int) -> None:
    """Remember a value as the latest; of more than `count_max` the oldest is forgotten."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > count_max:
        known.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Published:
    """A record whose messages were handed to the broker."""

    record: AnyRecord
    acknowledged: Awaitable[None]
    finished: asyncio.Future[None]


class Aftermath:
    """One for each worker."""

    def __init__(
        self,
        log: EventLog,
        publisher: Publisher,
        events: CloudEvents,
        then: Callable[[AnyRecord], Awaitable[None]],
    ) -> None:
        """`then`: what else is to be done about a record when its messages are acknowledged."""
        self._log, self._publisher, self._events, self._then = log, publisher, events, then
        self._gathered: list[_Published] = []
        self._commands: OrderedDict[int, CommandRow] = OrderedDict()  # by the number of their ids
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, record: AnyRecord, acknowledged: Awaitable[None]) -> asyncio.Future[None]:
        """Ends when all that follows on a record is done, with the error of its messages if they have one."""
        published = _Published(record, acknowledged, asyncio.get_running_loop().create_future())
        if not self._gathered:
            task = asyncio.create_task(self._follow())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._gathered.append(published)
        return published.finished

    async def _follow(self) -> None:
        await asyncio.sleep(GATHER_S)
        together, self._gathered = self._gathered, []
        try:
            await self._finish(together)
        except Exception as failure:
            for each in together:
                _end(each, failure)

    async def _finish(self, together: Sequence[_Published]) -> None:
        acknowledged = await asyncio.gather(*(each.acknowledged for each in together), return_exceptions=True)
        well = list[_Published]()
        for each, failure in zip(together, acknowledged, strict=True):
            if failure is None:
                well.append(each)
            else:
                _end(each, failure)
        commands = await self._last_of([each.record for each in well])
        await (await self._publisher.send([self._accepted(record, row) for record, row in commands]))
        for each in well:
            try:
                await self._then(each.record)
            except Exception as failure:
                _end(each, failure)
            else:
                _end(each)

    async def _last_of(self, records: Sequence[AnyRecord]) -> list[tuple[AnyRecord, CommandRow]]:
        """Those that are the last of a command, with it."""
        unknown = {
            record.command_id.int: (record.shard, record.command_id)
            for record in records
            if record.command_id.int not in self._commands
        }
        asked = list(unknown.values())
        for first in range(0, len(asked), LOOKUPS_MAX):
            await insist(partial(self._look_up, asked[first : first + LOOKUPS_MAX]))
        found = [(record, self._commands.get(record.command_id.int)) for record in records]
        return [(record, row) for record, row in found if row is not None and row.position == record.position]

    async def _look_up(self, ids: Sequence[tuple[int, UUID]]) -> None:
        for command_id, row in (await self._log.commands(ids)).items():
            keep(self._commands, command_id.int, row, COMMANDS_MAX)

    def _accepted(self, record: AnyRecord, command: CommandRow) -> PublicMessage:
        accepted = CommandAccepted(
            command_id=record.command_id,
            type=command.type,
            tenant_id=record.tenant_id,
            actor=command.actor,
            outcome=command.outcome,
            shard=record.shard,
            position=record.position,
            correlation_id=record.correlation_id,
            causation_id=record.causation_id,
        )
        return self._events.of_fact(accepted, record)


def _end(published: _Published, failure: BaseException | None = None) -> None:
    if published.finished.done():
        return  # nobody waits for it any more
    if isinstance(failure, Exception):
        published.finished.set_exception(failure)
    elif failure is not None:
        published.finished.cancel()
    else:
        published.finished.set_result(None)
