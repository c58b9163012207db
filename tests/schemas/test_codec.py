"""Every event comes back from its bytes as it went in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum
from functools import reduce
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from uuid import UUID, uuid4

import msgspec
import pytest
from eventsourcing.domain import AggregateCreated, AggregateEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.crypto import NotAuthentic
from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from domain.conversation import Conversation
from domain.event_log import StoredEvent
from domain.user import User
from schemas import codec, upcasters
from schemas.codec import EVENT_TYPES, EventType, UnknownEvent, decode, encode, without_nul
from schemas.records import ObjectMissing, Records, Unreadable
from schemas.upcasters import UPCASTERS, upcasts
from tests.peers.log_rows import stored

AT = datetime(2031, 2, 3, 4, 5, 6, 789, UTC)
STREAM = UUID("7a4b4f7e-9a3f-4f5e-8a55-0a6f5d1c2b3a")
EXAMPLES = 15

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\0\\"u0'), max_size=30)
whole = st.integers(-(2**53), 2**53)
anything = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    int: whole,
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    UUID: st.uuids(),
    datetime: st.datetimes(timezones=st.just(UTC)),
    NoneType: st.none(),
    Any: anything,
}


def instances_of(hint: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - one line for each kind of type
    """Values of a type, from its hint alone."""
    if hint in PLAIN:
        return PLAIN[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return instances_of(arguments[0])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, UnionType):
        return reduce(lambda one, other: one | other, map(instances_of, arguments))
    if origin is tuple:
        return st.lists(instances_of(arguments[0]), max_size=3).map(tuple)
    if origin in (list, Sequence):
        return st.lists(instances_of(arguments[0]), max_size=3)
    if origin in (dict, Mapping):
        return st.dictionaries(instances_of(arguments[0]), instances_of(arguments[1]), max_size=3)
    if hasattr(hint, "__supertype__"):
        return instances_of(hint.__supertype__)
    if issubclass(hint, Enum):
        return st.sampled_from(hint)
    return st.builds(hint, **{name: instances_of(each) for name, each in get_type_hints(hint).items()})


def events_of(kind: EventType) -> st.SearchStrategy[AggregateEvent]:
    hints = get_type_hints(kind.event_class, include_extras=True)
    own = {name: instances_of(hints[name]) for name in (*kind.public, *kind.personal)}
    envelope: dict[str, Any] = {
        "originator_id": st.just(STREAM),
        "originator_version": st.just(7),
        "timestamp": st.just(AT),
    }
    if issubclass(kind.event_class, AggregateCreated):
        envelope["originator_topic"] = st.just(kind.aggregate.TOPIC)  # type: ignore[attr-defined]
    return st.builds(kind.event_class, **own, **envelope)


def as_stored(value: Any) -> Any:
    """A value as the log keeps it: the one character that its database cannot is replaced."""
    return msgspec.json.decode(msgspec.json.encode(replaced(msgspec.to_builtins(value))))


def replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, dict):
        return {replaced(key): replaced(each) for key, each in value.items()}
    return [replaced(each) for each in value] if isinstance(value, list | tuple) else value


def facts(event: AggregateEvent) -> dict[str, Any]:
    kind = codec.type_of(type(event))
    return {name: as_stored(vars(event)[name]) for name in (*kind.public, *kind.personal)}


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
def test_an_event_comes_back_as_it_went_in(name: str) -> None:
    kind = EVENT_TYPES[name]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(events_of(kind))
    def check(event: AggregateEvent) -> None:
        payload, personal = encode(event)
        assert b"\\u0000" not in payload.replace(rb"\\", b"")
        assert b"\\u0000" not in (personal or b"").replace(rb"\\", b"")
        assert set(json.loads(payload)) == set(kind.public)
        assert (personal is None) == (not kind.personal)
        back = decode(name, kind.version, payload, personal, (STREAM, 7), AT)
        assert type(back) is type(event)
        assert facts(back) == facts(event)
        assert (back.originator_id, back.originator_version, back.timestamp) == (STREAM, 7, AT)
        erased = decode(name, kind.version, payload, None, (STREAM, 7), AT)
        assert [getattr(erased, field) for field in kind.personal] == [None] * len(kind.personal)
        assert [getattr(erased, f) for f in kind.public] == [getattr(back, f) for f in kind.public]

    check()


def test_every_event_of_the_aggregates_is_known() -> None:
    for aggregate in codec.AGGREGATES:
        declared = {
            f"{aggregate.__name__}.{name}"
            for name, each in vars(aggregate).items()
            if isinstance(each, type) and issubclass(each, AggregateEvent) and name != "Event"
        }
        known = {kind.name for kind in EVENT_TYPES.values() if kind.aggregate is aggregate}
        assert known == declared - codec.ABSTRACT


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\0", "\ufffd"),
        ("\0\0", "\ufffd\ufffd"),
        ("a\0b", "a\ufffdb"),
        ("\\\0", "\\\ufffd"),
        ("\\\\\0", "\\\\\ufffd"),
        ("\\u0000", "\\u0000"),
        ("\\\\u0000", "\\\\u0000"),
        ("\\u0000\0", "\\u0000\ufffd"),
        ("\0\\u0000\\\0", "\ufffd\\u0000\\\ufffd"),
        ("u0000", "u0000"),
    ],
)
def test_u0000_is_replaced_and_nothing_else(text: str, kept: str) -> None:
    assert json.loads(without_nul(codec.encode_json({"text": text, text: 1}))) == {"text": kept, kept: 1}


def test_a_type_from_the_future_is_unknown() -> None:
    with pytest.raises(UnknownEvent):
        decode("Turn.Celebrated", 1, b"{}", None, (STREAM, 1), AT)


def test_a_version_from_the_future_is_unknown() -> None:
    with pytest.raises(UnknownEvent):
        decode("User.LoggedIn", EVENT_TYPES["User.LoggedIn"].version + 1, b"{}", None, (STREAM, 1), AT)


def test_fields_from_the_future_are_ignored() -> None:
    event = decode("User.Promoted", 1, b'{"role": "operator", "since": "ever"}', None, (STREAM, 1), AT)
    assert event == User.Promoted(originator_id=STREAM, originator_version=1, timestamp=AT, role="operator")


@pytest.mark.parametrize("payload", [b'{"role": 7}', b"{}", b"[]", b"not JSON"])
def test_what_has_another_type_than_the_event_says_is_refused(payload: bytes) -> None:
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        decode("User.Promoted", 1, payload, None, (STREAM, 1), AT)


def test_an_old_version_is_read_as_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upcasters, "UPCASTERS", dict(UPCASTERS))
    kind = EVENT_TYPES["User.Promoted"]
    newest = replace(kind, version=3)
    monkeypatch.setitem(EVENT_TYPES, "User.Promoted", newest)

    @upcasts("User.Promoted", 1)
    def one_word(fields: dict[str, Any]) -> dict[str, Any]:
        return {"role_name": fields["title"].lower()}

    @upcasts("User.Promoted", 2)
    def renamed(fields: dict[str, Any]) -> dict[str, Any]:
        return {"role": fields["role_name"]}

    for version, payload in ((1, b'{"title": "OPERATOR"}'), (2, b'{"role_name": "operator"}')):
        event = decode("User.Promoted", version, payload, None, (STREAM, 1), AT)
        assert event.role == "operator"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="two upcasters"):
        upcasts("User.Promoted", 2)(renamed)


def test_no_version_lacks_its_upcasters() -> None:
    for kind in EVENT_TYPES.values():
        assert all((kind.name, version) in UPCASTERS for version in range(1, kind.version))


# --- rows


def message(content: str | None) -> AggregateEvent:
    return Conversation.MessageSent(
        originator_id=STREAM,
        originator_version=2,
        timestamp=AT,
        message_id=uuid4(),  # type: ignore[arg-type]
        turn_id=uuid4(),  # type: ignore[arg-type]
        content=content,
        attachments=(),
        sent_at=AT,
    )


async def stored_in(records: Records, event: AggregateEvent) -> StoredEvent:
    """The event's row, its parts where the row says."""
    subject = uuid4()
    await records.ensure_keys([subject])
    sealed = records.seal(event, subject)
    await records.store(sealed.objects)
    row = stored(subject, 1, STREAM, 2, sealed.payload)
    return row._replace(
        type=sealed.type, schema_version=sealed.schema_version, personal=sealed.personal, subject_id=subject
    )


async def test_personal_text_is_bound_to_its_place_in_the_log() -> None:
    records = Records(MemoryKeyRing(), MemoryObjectStore())
    row = await stored_in(records, message("secret"))
    assert b"secret" not in row.payload + (row.personal or b"")
    (record,) = await records.open([row])
    assert record.event.content == "secret"
    with pytest.raises(NotAuthentic):
        await records.open([row._replace(stream_version=3)])


async def test_a_part_whose_object_is_lost_is_named() -> None:
    objects = MemoryObjectStore()
    records = Records(MemoryKeyRing(), objects)
    row = await stored_in(records, message("x" * 300_000))
    objects._contents.clear()
    with pytest.raises(ObjectMissing):
        await records.open([row])


async def test_rows_that_cannot_be_read_do_not_hide_the_others() -> None:
    records = Records(MemoryKeyRing(), MemoryObjectStore())
    row = await stored_in(records, message("hello"))
    future = row._replace(type="Conversation.Applauded", position=2)
    found = await records.open_some([row, future], personal=())
    assert (found[0].event.content, type(found[1])) == (None, Unreadable)  # type: ignore[union-attr]
    (whole_record,) = await records.open_some([row], personal=["Conversation.MessageSent"])
    assert whole_record.event.content == "hello"  # type: ignore[union-attr]
