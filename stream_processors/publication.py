"""What it takes to publish a record: the facts around it, and the broker.

Facts about a turn are gathered from its records as they come by, and read from the log after a restart. A state that is
published late may have been overtaken by another worker's, so it is looked at again: the latest always has the last word.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import cast
from uuid import UUID

from domain.credit_account import CreditAccount
from domain.event_log import EventLog, StoredEvent
from domain.ports import Clock, PublicMessage, Publisher
from domain.turn import Turn
from schemas.cloud_events import CloudEvents
from schemas.public_facts import balance_of
from schemas.records import AnyRecord, Record, Records, Unreadable
from stream_processors.aftermath import Aftermath, insist, keep

TURNS_MAX = 20_000  # known at once
STATES_MAX = 50_000
STREAM_EVENTS_MAX = 1_000  # of a turn; it has fewer than a hundred
MOVEMENT_FIRST = 8  # events of an account among which its last movement nearly always is
# Half of what it takes a group to give a silent worker's records to another one.
LATE = timedelta(seconds=5)


@dataclass(slots=True)
class TurnFacts:
    """What a turn's later events do not repeat. Models by call: (provider, model); tools by call: their request."""

    conversation_id: UUID | None
    agent_id: UUID
    version: int = 1  # of the turn, up to which its records are taken in
    models: dict[UUID, tuple[str, str]] = field(default_factory=dict)
    tools: dict[UUID, Turn.ToolCallRequested] = field(default_factory=dict)


class Publication:
    """One for each worker. Its calls are made in the order of the log, for each tenant."""

    def __init__(
        self, publisher: Publisher, events: CloudEvents, log: EventLog, records: Records, clock: Clock
    ) -> None:
        self.publisher, self.events = publisher, events
        self._log, self._records, self._clock = log, records, clock
        self._turns: OrderedDict[UUID, TurnFacts] = OrderedDict()
        self._versions: OrderedDict[UUID, int] = OrderedDict()
        self.aftermath = Aftermath(log, publisher, events, self._have_last_word)

    async def facts_of(self, record: Record[Turn.Event]) -> TurnFacts:
        """What is known of the record's turn, this record included."""
        facts = self._turns.get(record.stream_id)
        if facts is None and isinstance(record.event, Turn.Accepted):
            facts = _begun(record.event)
        elif facts is None or record.stream_version > facts.version + 1:
            facts = await self._read(record)
        else:
            _add(facts, record)
        if isinstance(record.event, Turn.Ended):
            self._turns.pop(record.stream_id, None)
        else:
            keep(self._turns, record.stream_id, facts, TURNS_MAX)
        return facts

    # --- states, of which the latest must have the last word

    def is_published(self, state_id: UUID, version: int) -> bool:
        """Whether this worker has handed out the state at this version, or a later one."""
        return self._versions.get(state_id, 0) >= version

    def note(self, state_id: UUID, version: int) -> None:
        """The state at this version is handed out now."""
        keep(self._versions, state_id, version, STATES_MAX)

    def may_be_overtaken(self, record: AnyRecord) -> bool:
        """Whether another worker may have handled the record, and later ones, in the meantime."""
        return self._clock() - record.recorded_at > LATE

    def balance(self, record: Record[CreditAccount.Moved]) -> list[PublicMessage]:
        """The balance after a movement, unless a later one has been handed out here."""
        if self.is_published(record.stream_id, record.stream_version):
            return []
        self.note(record.stream_id, record.stream_version)
        return [self.events.of_balance(balance_of(record), record)]

    # --- inside

    async def _have_last_word(self, record: AnyRecord) -> None:
        """After a balance was published late: the account's latest one, until nothing newer is found."""
        while isinstance(record.event, CreditAccount.Moved) and self.may_be_overtaken(record):
            if self.is_published(record.stream_id, record.stream_version + 1):
                return  # the last word is that one's affair
            latest = await insist(partial(self._latest_movement, record))
            if latest is None:
                return
            await (await self.publisher.send(self.balance(latest)))
            record = latest

    async def _latest_movement(self, record: AnyRecord) -> Record[CreditAccount.Moved] | None:
        """The last movement of an account after this record, if there is one."""
        last, rows = (
            MOVEMENT_FIRST,
            await self._log.read_stream(record.shard, record.stream_id, MOVEMENT_FIRST),
        )
        while True:
            newer = [row for row in rows if row.stream_version > record.stream_version]
            found = [
                each for each in await self._opened(newer) if isinstance(each.event, CreditAccount.Moved)
            ]
            if found or len(newer) < last:
                return found[-1] if found else None
            last *= 4
            rows = await self._log.read_stream(record.shard, record.stream_id, last)

    async def _read(self, record: AnyRecord) -> TurnFacts:
        rows = await self._log.read_stream_after(record.shard, record.stream_id, 0, STREAM_EVENTS_MAX)
        known = [row for row in rows if row.stream_version <= record.stream_version]
        first, *others = await self._opened(known)
        facts = _begun(first.event)
        for other in others:
            _add(facts, other)
        return facts

    async def _opened(self, rows: Sequence[StoredEvent]) -> list[AnyRecord]:
        """Records without their personal fields."""
        found = await self._records.open_some(rows, personal=())
        for each in found:
            if isinstance(each, Unreadable):
                raise each.error
        return cast(list[AnyRecord], found)


def _begun(accepted: Turn.Accepted) -> TurnFacts:
    return TurnFacts(accepted.conversation_id, accepted.agent_id)


def _add(facts: TurnFacts, record: AnyRecord) -> None:
    event = record.event
    facts.version = max(facts.version, record.stream_version)
    if isinstance(event, Turn.ModelCallStarted):
        facts.models[event.call_id] = event.provider, event.model
    elif isinstance(event, Turn.ToolCallRequested):
        facts.tools[event.tool_call_id] = event
