"""The one way to change anything: `await bus.execute(command)`.

Commands that wait are decided together, on aggregates kept in memory, and written with one append. The append proves
that nobody has changed what the decisions were based on; when another process was faster, nothing is written and they are
decided again. A command id is served once, for ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NoReturn, Protocol, TypeVar
from uuid import UUID, uuid4

from commands.command import (
    HANDLERS,
    Command,
    IdempotencyKeyReused,
    NotLoaded,
    Outcome,
    RefusedBefore,
    Result,
    Rules,
    WriteSide,
    noun_of,
)
from domain.aggregate import Root
from domain.crash_points import crash_point
from domain.errors import AlreadyExists, NotFound, Refusal
from domain.event_log import (
    STREAM_EVENTS_MAX,
    Batch,
    CommandRow,
    CommandSeen,
    EventLog,
    HeadMoved,
    LogUnavailable,
    Snapshot,
    StoredEvent,
    Streams,
    Synced,
)
from domain.ids import CommandId, UserId, shard_of
from domain.ports import Clock
from domain.turn import Turn
from schemas import snapshots
from schemas.codec import EVENT_TYPES, decode_json, encode_json
from schemas.records import UNREADABLE, AnyRecord, Record, Records, record_of

log_of = logging.getLogger(__name__)

GROUP_MAX = 128  # commands in one transaction
WAITING_MAX = 10_000  # commands in the queue; beyond it callers are told to come back
ROUNDS_MAX = 8  # of loading what handlers ask for
TRIES_MAX = 6  # of one group, against other writers and lost answers
FREE_TRIES = 2  # before the shards are locked
CACHED_MAX = 10_000  # aggregates in memory
UNAVAILABLE_PAUSE_S = 0.2
INSIST_S = 2.0  # after which a log that does not answer is not asked again before its callers are told
LATEST = 2**31  # as a version to read: whatever the log has now, not what is in memory
ACCEPTED = "accepted"

AggregateT = TypeVar("AggregateT", bound=Root)
Place = tuple[int, int]  # of a stream: its shard and the number of its id
Known = tuple[UUID | None, Root | None]  # whose an aggregate is, and the aggregate
NOTHING: Known = None, None  # what does not exist
LookUp = tuple[int, UUID, asyncio.Future[dict[UUID, Known]]]  # a stream that somebody waits for


class Overloaded(Exception):
    """More commands wait than the bus can serve soon."""


class Committed(Protocol):
    """Is told of every event this process has written, in commit order, before the command's caller is."""

    def __call__(self, records: Sequence[AnyRecord]) -> None: ...


class Appended(Protocol):
    """Is also told of the rows behind the events, as the log has them: for whoever passes them on."""

    def __call__(self, records: Sequence[AnyRecord], rows: Sequence[StoredEvent]) -> None: ...


@dataclass(slots=True)
class Waiting:
    """A command in the queue and who waits for it."""

    command: Command
    command_id: CommandId
    digest: bytes
    actor: str
    correlation_id: UUID
    causation_id: UUID | None
    traceparent: str | None
    shard: int
    # The append under way, and the first one whose answer was lost, can only stand beyond these positions.
    beyond: int | None = None
    lost_beyond: int | None = None
    outcome: Outcome | Exception | None = None
    _callers: list[asyncio.Future[None]] = field(default_factory=list)

    async def served(self) -> Outcome:
        """Wait for its outcome. A caller that goes away does not take the command with it."""
        if self.outcome is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._callers.append(future)
            await future
        if not isinstance(self.outcome, Outcome):
            assert self.outcome is not None, "callers are told of an outcome"
            raise self.outcome
        return self.outcome

    def serve(self, outcome: Outcome | Exception) -> None:
        """Tell the callers what became of it."""
        self.outcome = outcome
        for caller in self._callers:
            if not caller.done():
                caller.set_result(None)


@dataclass(slots=True)
class Decided:
    """What a command came to, before it is written. `based_on`: the streams that were looked at, by number."""

    waiting: Waiting
    write: WriteSide
    based_on: dict[int, UUID]
    result: Result
    refusal: Refusal | None


class Bus:
    """Serves commands. One for each process; it owns the write side's connection and cache."""

    def __init__(
        self,
        log: EventLog,
        records: Records,
        rules: Rules,
        clock: Clock = lambda: datetime.now(UTC),
        on_commit: Committed = lambda records: None,
    ) -> None:
        self._log, self._records, self.rules, self._clock = log, records, rules, clock
        self.on_commit = on_commit
        self.on_append: Appended | None = None
        self.on_loaded: Committed = lambda records: (
            None
        )  # is told of all events of a stream that was read as a whole
        self._queue: deque[Waiting] = deque()
        self._by_id: dict[int, Waiting] = {}
        self._serving: asyncio.Task[None] | None = None
        self._saving: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()
        self._lookups: list[LookUp] = []
        self._looking: asyncio.Task[None] | None = None
        self._heads: dict[int, int] = {}  # everything up to here is known
        self._ours: dict[int, int] = {}  # where our last events stand, which may be further on
        self._stale: set[int] = set()  # shards that others have appended to since their heads were read
        self._cache: OrderedDict[Place, Known] = OrderedDict()

    async def execute(
        self,
        command: Command,
        *,
        by: str,
        command_id: UUID | None = None,
        digest: bytes | None = None,
        correlation_id: UUID | None = None,
        caused_by: AnyRecord | None = None,
        traceparent: str | None = None,
        patience_s: float = 0.0,
    ) -> Outcome:
        """Decide a command and write what follows from it; returns when that is durable.

        `command_id` makes a resent command harmless: it is served once and answered with what it gave then.
        `patience_s`: how long it may wait for a command of somebody else that it can be written together with.

        Raises:
            Refusal: a rule says no; also recorded.
            LogUnavailable: the log cannot be reached; asking again with the same id is safe.
            Overloaded: too many commands wait.
        """
        id = CommandId(command_id or uuid4())
        digest = digest or sha256(encode_json(command)).digest()
        already = self._by_id.get(id.int)
        if already is not None:
            return await self._join(already, digest)
        if len(self._queue) >= WAITING_MAX:
            raise Overloaded
        waiting = Waiting(
            command,
            id,
            digest,
            by,
            correlation_id or (caused_by.correlation_id if caused_by else id),
            caused_by.event_id if caused_by else None,
            traceparent or (caused_by.traceparent if caused_by else None),
            shard_of(command.tenant_id),
        )
        self._by_id[id.int] = waiting
        self._queue.append(waiting)
        if patience_s > 0:
            asyncio.get_running_loop().call_later(patience_s, self._begin)
        else:
            self._begin()
        return await waiting.served()

    async def read(
        self, aggregate_class: type[AggregateT], id: UUID, tenant_id: UserId, version: int = 1
    ) -> AggregateT:
        """The aggregate as this process knows it: never older than its own writes, nor than `version`.

        Raises:
            NotFound: no such thing of this tenant.
            LogUnavailable: it must be loaded and the log cannot be reached.
        """
        shard = shard_of(tenant_id)
        owner, found = self._cache.get((shard, id.int), NOTHING)
        if found is None or found.version < version:
            owner, found = await self._looked_up(shard, id)
        if owner is None or owner.int != tenant_id.int or not isinstance(found, aggregate_class):
            raise NotFound(noun_of(aggregate_class))
        return found

    async def have(self, tenant_id: UserId, ids: Iterable[UUID]) -> None:
        """Look those of the streams up together that are not in memory, for `read` to find them there.

        Raises:
            LogUnavailable: the log cannot be reached.
        """
        shard = shard_of(tenant_id)
        for asked in [self._ask(shard, id) for id in ids if (shard, id.int) not in self._cache]:
            await asked

    def hint(self, heads: Mapping[int, int]) -> None:
        """Others may have appended to these shards: catch up before deciding, rather than after a refused append."""
        for shard, head in heads.items():
            if head > self._heads.get(shard, head):
                self._stale.add(shard)

    async def take_in(
        self, heads: Mapping[int, int], rows: Sequence[StoredEvent], *, begun: bool = False
    ) -> Sequence[AnyRecord]:
        """Others have appended these, each shard's in order: what follows on what is known need not be looked up.

        `begun`: take aggregates in that begin with them, too. `heads`: where the shards end now, as for `hint`, which is
        what is left to do where something is missing. Returns the records that were taken in.
        """
        taken: Sequence[AnyRecord] = ()
        try:
            async with self._reading:
                opened = await self._opened(self._following(rows), begun=begun)
                # Nothing is awaited from here on: whoever decides knows all of it, or nothing.
                following = self._following(rows)
                shards = {row.shard for row in following}
                taken = [record for record in opened if record.shard in shards]
                self._follow(taken)
                for row in following:
                    self._heads[row.shard] = row.position
        except Exception as failure:
            # It is looked up when it matters, and says then what is wrong.
            log_of.info("what others appended was not taken in: %r", failure)
        self.hint(heads)
        return taken

    async def drain(self) -> None:
        """Wait until nothing is being served, nor waits for company."""
        self._begin()
        if self._serving is not None:
            await asyncio.shield(self._serving)

    @property
    def waiting(self) -> int:
        """Commands that wait to be decided."""
        return len(self._queue)

    # --- the queue

    def _begin(self) -> None:
        if self._queue and (self._serving is None or self._serving.done()):
            self._serving = asyncio.create_task(self._serve_queue())

    async def _join(self, already: Waiting, digest: bytes) -> Outcome:
        if already.digest != digest:
            raise IdempotencyKeyReused("This key was used before for another request.")
        outcome = await already.served()
        return Outcome(outcome.result, outcome.shard, outcome.position, seen=True)

    async def _serve_queue(self) -> None:
        while self._queue:
            group = [self._queue.popleft() for _ in range(min(GROUP_MAX, len(self._queue)))]
            try:
                await self._serve(group)
            except Exception as bug:
                log_of.exception("a group of %d commands failed", len(group))
                _fail(group, bug)
            for waiting in group:
                self._by_id.pop(waiting.command_id.int, None)

    async def _serve(self, group: Sequence[Waiting]) -> None:
        until = time.monotonic() + INSIST_S
        for attempt in range(TRIES_MAX):
            group = _unserved(group)
            if not group:
                return None
            try:
                # When others keep being faster, decide while they wait.
                if attempt < FREE_TRIES:
                    await self._decide_and_append(group)
                else:
                    await self._decide_under_lock(group)
            except HeadMoved:
                self._stale.update(waiting.shard for waiting in group)
                if attempt > FREE_TRIES:
                    self._forget_shards(group)  # nobody was faster: what is in memory must be wrong
            except CommandSeen:
                await self._answer_seen(group)
            except LogUnavailable as failure:
                self._lose(group)
                late = attempt == TRIES_MAX - 1 or time.monotonic() > until
                if late or not await self._look_up_lost(group):
                    return _fail(group, failure)
            except Exception as failure:
                # Whatever it broke off, memory may be half up to date.
                self._forget_shards(group)
                return await self._serve_one_by_one(group, failure)
        return _fail(group, LogUnavailable("other writers kept being faster"))

    async def _serve_one_by_one(self, group: Sequence[Waiting], failure: Exception) -> None:
        """Find the command that spoils its group: only that one fails."""
        if len(group) == 1:
            return _fail(group, failure)
        log_of.warning("a group of %d commands is served one by one: %r", len(group), failure)
        for waiting in group:
            await self._serve([waiting])
        return None

    async def _decide_and_append(self, group: Sequence[Waiting]) -> None:
        decided = await self._decide(group, self._log.sync)
        batch, events = await self._written(decided)
        crash_point("command.before_append")
        at = await self._log.append(batch)
        crash_point("command.after_append")
        self._commit(decided, batch, events, at)

    async def _decide_under_lock(self, group: Sequence[Waiting]) -> None:
        shards = sorted({waiting.shard for waiting in group})
        async with self._log.locked(shards) as locked:
            self._stale.update(shards)
            decided = await self._decide(group, locked.sync, careful=True)
            batch, events = await self._written(decided)
            at = await locked.append(batch)
        self._commit(decided, batch, events, at)

    async def _answer_seen(self, group: Sequence[Waiting]) -> None:
        rows = await self._log.commands([(waiting.shard, waiting.command_id) for waiting in group])
        for waiting in group:
            row = rows.get(waiting.command_id)
            if row is not None and row.remembered:
                _answer(waiting, row)

    def _lose(self, group: Sequence[Waiting]) -> None:
        """It is not known whether they were written."""
        for waiting in group:
            if waiting.lost_beyond is None:
                waiting.lost_beyond = waiting.beyond
        self._forget_shards(group)

    async def _look_up_lost(self, group: Sequence[Waiting]) -> bool:
        """After a lost answer: serve what had been written after all. False while the log cannot be reached."""
        await asyncio.sleep(UNAVAILABLE_PAUSE_S)
        try:
            await self._answer_seen(group)
        except LogUnavailable:
            return False
        return True

    # --- deciding

    async def _decide(
        self,
        group: Sequence[Waiting],
        sync: Callable[[dict[int, int], Streams], Any],
        careful: bool = False,
    ) -> list[Decided]:
        """Decide the group on what is in memory and loaded; `careful` also looks whether new streams are new."""
        wanted = {
            (waiting.shard, id)
            for waiting in group
            for id in waiting.command.reads()
            if (waiting.shard, id.int) not in self._cache or waiting.shard not in self._heads
        }
        wanted |= {
            (waiting.shard, waiting.command_id)
            for waiting in group
            if waiting.shard not in self._heads or waiting.shard in self._stale
        }
        for _ in range(ROUNDS_MAX):
            if wanted:
                await self._load(wanted, sync)
            now = self._clock()
            overlay: dict[Place, Known] = {}
            decided: list[Decided] = []
            wanted = set()
            for waiting in group:
                try:
                    decided.append(self._decide_one(waiting, overlay, now))
                except NotLoaded as missing:
                    wanted.add((waiting.shard, missing.stream_id))
                except Exception as bug:
                    log_of.exception("the handler of %s failed", type(waiting.command).__name__)
                    waiting.serve(bug)
            if careful:
                wanted |= {
                    (one.waiting.shard, root.id)
                    for one in decided
                    for root in _begun(one.write)
                    if (one.waiting.shard, root.id.int) not in self._cache
                }
            if not wanted:
                return decided
            group = [waiting for waiting in group if waiting.outcome is None]
        raise RuntimeError(f"handlers still ask for streams after {ROUNDS_MAX} rounds: {wanted}")

    def _decide_one(self, waiting: Waiting, overlay: dict[Place, Known], now: datetime) -> Decided:
        command, shard = waiting.command, waiting.shard
        tenant_id = command.tenant_id
        based_on: dict[int, UUID] = {}

        def known(id: UUID) -> Root | None:
            based_on[id.int] = id
            place = shard, id.int
            owner, root = overlay.get(place) or self._cache.get(place) or _not_loaded(id)
            return root if owner is not None and owner.int == tenant_id.int else None

        write = WriteSide(known, self.rules, now, waiting.command_id, waiting.actor, shard, tenant_id)
        try:
            result = HANDLERS[type(command)](command, write) or {}
            for root in _begun(write):
                place = shard, root.id.int
                if place in overlay or self._cache.get(place, NOTHING)[1] is not None:
                    raise AlreadyExists(noun_of(type(root)))
        except Refusal as refusal:
            return Decided(waiting, write, based_on, {}, refusal)
        for number, root in write.touched.items():
            based_on[number] = root.id
            overlay[shard, number] = tenant_id, root
        return Decided(waiting, write, based_on, result, None)

    async def _looked_up(self, shard: int, id: UUID) -> Known:
        """A stream as the log has it now or later."""
        return (await self._ask(shard, id))[id]

    def _ask(self, shard: int, id: UUID) -> asyncio.Future[dict[UUID, Known]]:
        """Have a stream looked up; those that are asked for while the log is looked at wait together."""
        future: asyncio.Future[dict[UUID, Known]] = asyncio.get_running_loop().create_future()
        self._lookups.append((shard, id, future))
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_up_all())
        return future

    async def _look_up_all(self) -> None:
        while self._lookups:
            lookups, self._lookups = self._lookups[:GROUP_MAX], self._lookups[GROUP_MAX:]
            await self._look_up(lookups)

    async def _look_up(self, lookups: Sequence[LookUp]) -> None:
        try:
            loaded = await self._load({(shard, id) for shard, id, _ in lookups}, self._log.sync)
        except Exception as failure:
            if isinstance(failure, UNREADABLE) and len(lookups) > 1:
                for each in lookups:  # what one cannot be told, the others can
                    await self._look_up([each])
                return
            for _, _, future in lookups:
                if not future.done():
                    future.set_exception(failure)
                    future.exception()
        else:
            for _, _, future in lookups:
                if not future.done():
                    future.set_result(loaded)

    async def _load(
        self, wanted: set[tuple[int, UUID]], sync: Callable[[dict[int, int], Streams], Any]
    ) -> dict[UUID, Known]:
        """Streams by id, as the log has them now; with them the cache goes on to where their shards are."""
        async with self._reading:
            known = {shard: self._heads[shard] for shard, _ in wanted if shard in self._heads}
            synced: Synced = await sync(known, sorted(wanted))
            loaded = {id: await self._loaded(shard, id, synced) for shard, id in wanted}
            newer = await self._opened(synced.newer)
            # Nothing is awaited from here on: whoever decides knows all of it, or nothing.
            # Where this process has committed meanwhile, the view is of the past.
            current = {shard for shard in synced.heads if self._heads.get(shard) == known.get(shard)}
            for shard in current:
                head = synced.heads[shard]
                arrived = sum(1 for row in synced.newer if row.shard == shard)
                if shard in known and head - known[shard] != arrived:
                    self._forget(shard)
                self._heads[shard] = head
            self._follow([record for record in newer if record.shard in current])
            for shard, id in wanted:
                (owner, root), cached = loaded[id], self._cache.get((shard, id.int), NOTHING)[1]
                is_older = cached is not None and (root is None or root.version < cached.version)
                if shard in current and not is_older:
                    self._remember((shard, id.int), owner, root)
            self._stale -= {shard for shard in current if synced.heads[shard] >= self._ours.get(shard, 0)}
        return loaded

    def _following(self, rows: Sequence[StoredEvent]) -> list[StoredEvent]:
        """Those that come next in shards whose heads are known."""
        found: list[StoredEvent] = []
        heads: dict[int, int] = {}
        for row in rows:
            head = heads.get(row.shard, self._heads.get(row.shard))
            if head is not None and row.position == head + 1:
                heads[row.shard] = row.position
                found.append(row)
        return found

    async def _opened(self, newer: Sequence[StoredEvent], *, begun: bool = False) -> list[AnyRecord]:
        """The records among them of cached aggregates, and with `begun` of those that begin here.

        Aggregates of which one cannot be read are put out of the cache: only whoever asks for them is told.
        """
        known = {
            (row.shard, row.stream_id.int)
            for row in newer
            if (begun and row.stream_version == 1) or (row.shard, row.stream_id.int) in self._cache
        }
        rows = [row for row in newer if (row.shard, row.stream_id.int) in known]
        found, closed = list[AnyRecord](), set[Place]()
        for record in await self._records.open_some(rows, EVENT_TYPES):
            if isinstance(record, Record):
                found.append(record)
            else:
                log_of.warning("an event that others appended cannot be read: %r", record.error)
                closed.add((record.shard, record.stream_id.int))
        for place in closed:
            self._cache.pop(place, None)
        return [record for record in found if (record.shard, record.stream_id.int) not in closed]

    def _follow(self, newer: Sequence[AnyRecord]) -> None:
        """Bring cached aggregates up to date with what other processes wrote, and take in those that begin."""
        for record in newer:
            place = record.shard, record.stream_id.int
            root = self._cache.get(place, NOTHING)[1]
            if root is not None and root.version >= record.stream_version:
                continue  # written by this process, and taken in when it was committed
            if root is None and record.stream_version > 1 and place not in self._cache:
                continue  # put out of the cache meanwhile
            root = root.fork() if root is not None else None
            self._remember(place, record.tenant_id, record.event.mutate(root))

    async def _loaded(self, shard: int, id: UUID, synced: Synced) -> tuple[UUID | None, Root | None]:
        """Whose an aggregate is, and the aggregate, as of the instant of `synced`."""
        snapshot, rows = synced.snapshots.get(id), synced.streams[id]
        root = snapshots.restored(snapshot, self._clock()) if snapshot else None
        owner: UUID | None = snapshot.tenant_id if snapshot else None
        if snapshot is not None and root is None:
            rows = []  # they follow a state that this program cannot read: begin at the beginning
        complete = len(rows) < STREAM_EVENTS_MAX and (snapshot is None or root is not None)
        while True:
            records = await self._records.open(rows)
            for record in records:
                owner, root = record.tenant_id, record.event.mutate(root)
            if complete:
                if records and records[0].stream_version == 1:
                    self.on_loaded(records)
                return owner, root
            version = root.version if root is not None else 0
            page = await self._log.read_stream_after(shard, id, version, STREAM_EVENTS_MAX)
            rows = [row for row in page if row.position <= synced.heads[shard]]
            complete = len(rows) < STREAM_EVENTS_MAX

    def _keep(self, snapshot: Snapshot) -> None:
        task = asyncio.create_task(self._save_snapshot(snapshot))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)

    async def _save_snapshot(self, snapshot: Snapshot) -> None:
        try:
            await self._log.save_snapshot(snapshot)
        except LogUnavailable as failure:
            log_of.info("a snapshot was not saved: %s", failure)

    # --- writing

    async def _written(self, decided: Sequence[Decided]) -> tuple[Batch, list[Any]]:
        """The batch of a group, and the events behind its rows."""
        heads = {one.waiting.shard: self._heads[one.waiting.shard] for one in decided}
        batch = Batch(heads.copy())
        events: list[Any] = []
        objects: list[tuple[str, bytes]] = []
        based_on: dict[int, UUID] = {}
        await self._records.ensure_keys([one.waiting.command.tenant_id for one in decided])
        for one in sorted(decided, key=lambda one: one.waiting.shard):
            waiting, position = one.waiting, 0
            shard, tenant_id = waiting.shard, waiting.command.tenant_id
            waiting.beyond = batch.heads[shard]
            based_on |= one.based_on
            if one.refusal is None:
                for event in one.write.new_events():
                    position = heads[shard] = heads[shard] + 1
                    sealed = self._records.seal(event, tenant_id)
                    row = StoredEvent(
                        shard,
                        position,
                        tenant_id,
                        event.originator_id,
                        event.originator_version,
                        sealed.type,
                        sealed.schema_version,
                        sealed.payload,
                        sealed.personal,
                        tenant_id if sealed.personal is not None else None,
                        waiting.command_id,
                        waiting.correlation_id,
                        waiting.causation_id,
                        waiting.actor,
                        waiting.traceparent,
                        None,
                    )
                    batch.events.append(row)
                    events.append(event)
                    objects += sealed.objects
                batch.due += one.write.due_changes.values()
            batch.commands.append(_row(one, position))
        batch.based_on = list(based_on.values())
        if objects:
            await self._records.store(objects)
        return batch, events

    def _commit(self, decided: Sequence[Decided], batch: Batch, events: Sequence[Any], at: datetime) -> None:
        for one in decided:
            if one.refusal is None:
                self._keep_decided(one)
        records = [record_of(event, row, at) for event, row in zip(events, batch.events, strict=True)]
        self._advance(records)
        if records:
            self._tell(records, batch.events, at)
        positions = {row.command_id.int: row.position for row in batch.commands}
        for one in decided:
            waiting = one.waiting
            position = positions[waiting.command_id.int]
            waiting.serve(one.refusal or Outcome(one.result, waiting.shard, position, seen=False))

    def _advance(self, written: Sequence[AnyRecord]) -> None:
        """Note where what was written stands: right behind what is known, or further on where others were faster."""
        for record in written:
            shard, position = record.shard, record.position
            self._ours[shard] = position
            # What was read beyond it meanwhile is read again: what was decided here has just replaced it in memory.
            if self._heads.get(shard, position) >= position - 1:
                self._heads[shard] = position
            else:
                self._stale.add(shard)

    def _keep_decided(self, one: Decided) -> None:
        shard, tenant_id = one.waiting.shard, one.waiting.command.tenant_id
        for number, root in one.write.touched.items():
            if snapshots.is_due(root, len(root.pending_events)):
                self._keep(snapshots.taken(root, shard, tenant_id))
            root.pending_events.clear()
            if type(root) is Turn and root.outcome is not None:
                self._cache.pop((shard, number), None)  # an ended turn is rarely asked for again
            else:
                self._remember((shard, number), tenant_id, root)

    def _tell(self, records: Sequence[AnyRecord], rows: Sequence[StoredEvent], at: datetime) -> None:
        try:
            if self.on_append is not None:
                self.on_append(records, [row._replace(recorded_at=at) for row in rows])
            self.on_commit(records)
        except Exception:
            # What is committed is committed, and served: those who missed it read it from the log.
            log_of.exception("a listener failed on %d records", len(records))

    # --- the cache

    def _remember(self, place: Place, owner: UUID | None, root: Root | None) -> None:
        self._cache[place] = owner, root
        self._cache.move_to_end(place)
        if len(self._cache) > CACHED_MAX:
            self._cache.popitem(last=False)

    def _forget(self, shard: int) -> None:
        self._heads.pop(shard, None)
        for place in [place for place in self._cache if place[0] == shard]:
            del self._cache[place]

    def _forget_shards(self, group: Sequence[Waiting]) -> None:
        for shard in {waiting.shard for waiting in group}:
            self._forget(shard)


def _not_loaded(id: UUID) -> NoReturn:
    raise NotLoaded(id)


def _begun(write: WriteSide) -> list[Root]:
    """The aggregates that a handler began."""
    return [root for root in write.touched.values() if root.version == len(root.pending_events) > 0]


def _unserved(group: Sequence[Waiting]) -> list[Waiting]:
    """Those that are to be tried again: of them, no append is under way."""
    found = [waiting for waiting in group if waiting.outcome is None]
    for waiting in found:
        waiting.beyond = None
    return found


def _fail(group: Sequence[Waiting], failure: Exception) -> None:
    for waiting in group:
        if waiting.outcome is None:
            waiting.serve(failure)


def _answer(waiting: Waiting, row: CommandRow) -> None:
    """Serve a command with the outcome it was given before."""
    if waiting.outcome is not None:
        return
    if row.digest != waiting.digest:
        waiting.serve(IdempotencyKeyReused("This key was used before for another request."))
    elif row.outcome == ACCEPTED:
        # What stands there was not written before: it is this very command, whose answer was lost.
        ours = waiting.lost_beyond is not None and row.position > waiting.lost_beyond
        waiting.serve(Outcome(decode_json(row.result), row.shard, row.position, seen=not ours))
    else:
        refusal = decode_json(row.result)
        waiting.serve(RefusedBefore(row.outcome, refusal["sentence"], refusal["facts"]))


def _row(one: Decided, position: int) -> CommandRow:
    waiting, refusal = one.waiting, one.refusal
    result = encode_json({"sentence": str(refusal), "facts": refusal.facts} if refusal else one.result)
    return CommandRow(
        waiting.shard,
        waiting.command_id,
        waiting.command.tenant_id,
        type(waiting.command).__name__,
        waiting.actor,
        waiting.digest,
        refusal.code if refusal else ACCEPTED,
        refusal.remembered if refusal else True,
        position,
        result,
    )
