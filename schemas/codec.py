"""Events to bytes and back: plain JSON, types checked on reading, personal fields apart from the rest.

The envelope's facts (stream, version, time) are columns of the log and not repeated in the payload.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec
from eventsourcing.domain import AggregateCreated, AggregateEvent

from domain.agent import Agent
from domain.aggregate import PERSONAL, Root
from domain.callback import Callback
from domain.conversation import Conversation
from domain.credit_account import CreditAccount
from domain.turn import Turn
from domain.user import User
from schemas.upcasters import upcast

AGGREGATES: tuple[type[Root], ...] = (User, Agent, Conversation, Turn, CreditAccount, Callback)
ABSTRACT = {"CreditAccount.Moved", "Turn.Ended"}  # shared fields, never recorded themselves
ENVELOPE = ("originator_id", "originator_version", "timestamp", "originator_topic")

encode_json = msgspec.json.Encoder().encode
decode_json = msgspec.json.Decoder(dict[str, Any]).decode
# U+0000 as JSON writes it: an odd number of backslashes before u0000.
_NUL_ESCAPE = b"\\u0000"
_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")
_REPLACED = rb"\1\\ufffd"


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class UnknownEvent(Exception):
    """The log has an event type or version that this program does not know; it must not be skipped."""


# There is one of each: compared, and found in caches, by identity.
@dataclass(frozen=True, slots=True, eq=False)
class EventType:
    """What the codec knows of an event class."""

    name: str
    event_class: type[AggregateEvent]
    aggregate: type[Root]
    version: int
    personal: tuple[str, ...]
    public: tuple[str, ...]
    tail: bytes  # an envelope for the decoder to fill fields that are set afterwards
    erased: bytes  # what stands for personal fields that cannot be opened any more
    decode: Callable[[bytes], AggregateEvent]


def encode(event: AggregateEvent) -> tuple[bytes, bytes | None]:
    """The payload, and the plain bytes of the personal part if the event has one."""
    kind, values = type_of(type(event)), event.__dict__
    payload = encode_json({name: values[name] for name in kind.public})
    if not kind.personal:
        return without_nul(payload) if _NUL_ESCAPE in payload else payload, None
    personal = encode_json({name: values[name] for name in kind.personal})
    return without_nul(payload), without_nul(personal)


def decode(
    name: str,
    version: int,
    payload: bytes,
    personal: bytes | None,
    stream: tuple[UUID, int],
    recorded_at: datetime,
) -> AggregateEvent:
    """The event of a stored row; personal fields are None when their part cannot be opened any more.

    Raises:
        UnknownEvent: a type or version from the future.
    """
    kind = EVENT_TYPES.get(name)
    if kind is None or version > kind.version:
        raise UnknownEvent(f"event type {name!r} version {version}")
    joined = _joined(kind, payload, personal)
    if version < kind.version:
        found = decode_json(joined)
        envelope = {field: found.pop(field) for field in ENVELOPE if field in found}
        joined = encode_json(upcast(name, version, kind.version, found) | envelope)
    event = kind.decode(joined)
    vars(event).update(originator_id=stream[0], originator_version=stream[1], timestamp=recorded_at)
    return event


def _joined(kind: EventType, payload: bytes, personal: bytes | None) -> bytes:
    """One JSON object of both parts and an envelope to be filled in: one pass of the decoder makes the event."""
    head = b"{" if payload == b"{}" else payload[:-1] + b","
    if not kind.personal:
        return head + kind.tail
    return head + (kind.erased if personal is None else personal[1:-1]) + b"," + kind.tail


@cache
def type_of(event_class: type[AggregateEvent]) -> EventType:
    """What the codec knows of a class; the classes of `AGGREGATES` only."""
    return EVENT_TYPES[event_class.TOPIC]  # type: ignore[attr-defined]


def written(id: UUID) -> bytes:
    """An id as people write it; the standard library's way takes five times as long."""
    return encode_json(id)[1:-1]


def without_nul(encoded: bytes) -> bytes:
    """JSON with each U+0000 in its texts replaced by U+FFFD: Postgres text has no such character."""
    return _NUL.sub(_REPLACED, encoded) if _NUL_ESCAPE in encoded else encoded


def storable(text: str) -> str:
    """Text from outside as the log can keep it: U+0000 and halves of surrogate pairs are replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def storable_json(value: Any) -> Any:
    """A JSON value from outside as the log can keep it; see `storable`."""
    return json.loads(without_nul(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")))


def _event_types() -> dict[str, EventType]:
    found: dict[str, EventType] = {}
    for aggregate in AGGREGATES:
        for event_class in vars(aggregate).values():
            if not isinstance(event_class, type) or not issubclass(event_class, AggregateEvent):
                continue
            name = getattr(event_class, "TOPIC", None)
            if event_class.__name__ != "Event" and name not in ABSTRACT:
                assert isinstance(name, str)
                found[name] = _describe(name, event_class, aggregate)
    return found


def _describe(name: str, event_class: type[AggregateEvent], aggregate: type[Root]) -> EventType:
    hints = get_type_hints(event_class, include_extras=True)
    own = [field.name for field in fields(event_class) if field.name not in ENVELOPE]
    personal = tuple(field for field in own if _is_personal(hints[field]))
    public = tuple(field for field in own if field not in personal)
    version = int(getattr(event_class, "class_version", 1))
    envelope: dict[str, Any] = {"originator_id": UUID(int=0), "originator_version": 0, "timestamp": _EPOCH}
    if issubclass(event_class, AggregateCreated):
        envelope["originator_topic"] = aggregate.TOPIC
    return EventType(
        name,
        event_class,
        aggregate,
        version,
        personal,
        public,
        tail=encode_json(envelope)[1:],
        erased=encode_json(dict.fromkeys(personal))[1:-1],
        decode=msgspec.json.Decoder(event_class).decode,
    )


def _is_personal(hint: Any) -> bool:
    return get_origin(hint) is Annotated and PERSONAL in get_args(hint)[1:]


EVENT_TYPES = _event_types()
