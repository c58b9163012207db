"""Stored rows and what they mean: sealing events for the log, opening them for whoever reads it.

Personal fields are sealed under their subject's key; parts over 256 kB lie in the object store under their digest and
the row keeps the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Generic, TypeVar
from uuid import UUID

from eventsourcing.domain import AggregateEvent

from domain.event_log import StoredEvent
from domain.ids import event_id
from domain.ports import KeyNotLoaded, KeyRing, ObjectStore
from schemas import codec

PART_BYTES_MAX = 256 * 1024  # what a row holds itself
_REFERENCE = b'{"$object":"'
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

E = TypeVar("E", covariant=True)


class Damaged(ValueError):
    """The personal part of a row is not what was sealed."""


class ObjectMissing(Exception):
    """A row refers to an object that the store does not have: the store is not the log's, or was damaged."""


# Not frozen, because that triples what making one costs, and one is made for every event; nobody changes them.
@dataclass(slots=True, eq=False)
class Record(Generic[E]):
    """One event with everything known about it; what processors and projections are given."""

    event: E
    type: str
    shard: int
    position: int
    stream_id: UUID
    stream_version: int
    tenant_id: UUID
    command_id: UUID
    correlation_id: UUID
    causation_id: UUID | None
    actor: str
    traceparent: str | None
    recorded_at: datetime

    @property
    def event_id(self) -> UUID:
        return event_id(self.stream_id, self.stream_version)


AnyRecord = Record[Any]


# A ValueError: the JSON is not that of such an event, or `Damaged`.
UNREADABLE = (codec.UnknownEvent, ObjectMissing, ValueError)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that this program cannot open; it must not be skipped."""

    type: str
    shard: int
    position: int
    stream_id: UUID
    error: Exception


@dataclass(slots=True, eq=False)
class Sealed:
    """An event as the log keeps it, and the parts that must reach the object store before it."""

    type: str
    schema_version: int
    payload: bytes
    personal: bytes | None
    objects: tuple[tuple[str, bytes], ...]


class Records:
    """Seals and opens rows with the keys and the store it was given."""

    def __init__(self, keys: KeyRing, objects: ObjectStore) -> None:
        self._keys, self._objects = keys, objects

    async def ensure_keys(self, subject_ids: Sequence[UUID]) -> None:
        """Have the subjects' keys at hand, so that `seal` and `open` need not wait."""
        await self._keys.ensure(subject_ids)

    def seal(self, event: AggregateEvent, subject_id: UUID) -> Sealed:
        """The bytes of an event, its personal part sealed under the key of `subject_id`."""
        kind = codec.type_of(type(event))
        payload, plain = codec.encode(event)
        objects: tuple[tuple[str, bytes], ...] = ()
        if len(payload) > PART_BYTES_MAX:
            payload, objects = _moved_out(payload, objects)
        personal = None
        if plain is not None:
            personal = self._keys.seal(subject_id, plain, _aad(event.originator_id, event.originator_version))
            if len(personal) > PART_BYTES_MAX:
                personal, objects = _moved_out(personal, objects)
        return Sealed(kind.name, kind.version, payload, personal, objects)

    async def store(self, objects: Sequence[tuple[str, bytes]]) -> None:
        """Put parts where rows refer to them; before the rows are appended, so that no reference dangles."""
        for key, content in objects:
            await self._objects.put(key, content)

    async def open(self, rows: Sequence[StoredEvent]) -> list[AnyRecord]:
        """The records of rows, in their order.

        Raises:
            schemas.codec.UnknownEvent: a type or version from the future.
            ObjectMissing: a large part is not in the object store.
        """
        subjects = {row.subject_id for row in rows if row.subject_id is not None}
        if subjects:
            await self._keys.ensure(tuple(subjects))
        return [await self._open(row, self._keys.open) for row in rows]

    async def open_some(
        self, rows: Sequence[StoredEvent], personal: Collection[str]
    ) -> list[AnyRecord | Unreadable]:
        """The records of rows, in their order; only those of types in `personal` have their personal fields.

        A row becomes `Unreadable` when its type or version is from the future, a large part of it is not in the
        object store, or its bytes are not what was written.
        """
        subjects = {row.subject_id for row in rows if row.subject_id is not None and row.type in personal}
        if subjects:
            await self._keys.ensure(tuple(subjects))
        found: list[AnyRecord | Unreadable] = []
        for row in rows:
            sealed = row.personal if row.type in personal else None
            try:
                if sealed is not None or row.payload.startswith(_REFERENCE):
                    found.append(await self._open(row._replace(personal=sealed), self._unsealed))
                else:
                    # The short way: a rebuild opens millions.
                    found.append(record_of(_decoded(row, row.payload, None), row))
            except UNREADABLE as unknown:
                found.append(Unreadable(row.type, row.shard, row.position, row.stream_id, unknown))
        return found

    async def _open(
        self, row: StoredEvent, unsealed: Callable[[UUID, bytes, bytes], bytes | None]
    ) -> AnyRecord:
        payload, personal = row.payload, row.personal
        if payload.startswith(_REFERENCE):
            payload = await self._fetch(payload)
        if personal is not None and row.subject_id is not None:
            if personal.startswith(_REFERENCE):
                personal = await self._fetch(personal)
            personal = unsealed(row.subject_id, personal, _aad(row.stream_id, row.stream_version))
        return record_of(_decoded(row, payload, personal), row)

    def _unsealed(self, subject_id: UUID, sealed: bytes, aad: bytes) -> bytes | None:
        try:
            return self._keys.open(subject_id, sealed, aad)
        except KeyNotLoaded:
            raise
        except Exception as failure:
            # Opening needs nothing but the key and these bytes, so it is the bytes.
            raise Damaged(str(failure)) from failure

    async def _fetch(self, reference: bytes) -> bytes:
        key = reference[len(_REFERENCE) : -2].decode()
        content = await self._objects.get(key)
        if content is None:
            raise ObjectMissing(key)
        return content


def record_of(event: AggregateEvent, row: StoredEvent, recorded_at: datetime | None = None) -> AnyRecord:
    """A row's record, when its event is already at hand; `recorded_at` when the row does not know it yet."""
    return Record(
        event,
        row.type,
        row.shard,
        row.position,
        row.stream_id,
        row.stream_version,
        row.tenant_id,
        row.command_id,
        row.correlation_id,
        row.causation_id,
        row.actor,
        row.traceparent,
        recorded_at or row.recorded_at or _NEVER,
    )


def _decoded(row: StoredEvent, payload: bytes, personal: bytes | None) -> AggregateEvent:
    stream = (row.stream_id, row.stream_version)
    return codec.decode(row.type, row.schema_version, payload, personal, stream, row.recorded_at or _NEVER)


def _moved_out(
    part: bytes, objects: tuple[tuple[str, bytes], ...]
) -> tuple[bytes, tuple[tuple[str, bytes], ...]]:
    key = f"events/{sha256(part).hexdigest()}"
    return _REFERENCE + key.encode() + b'"}', (*objects, (key, part))


def _aad(stream_id: UUID, stream_version: int) -> bytes:
    return b"event|%b|%d" % (stream_id.bytes, stream_version)
