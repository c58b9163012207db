"""The page of events: every type that the log may hold, its fields, and which of them are sealed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from oshaani.reference.markdown import code, page, table
from schemas.codec import AGGREGATES, ENVELOPE, EVENT_TYPES, EventType

_INTRODUCTION = """
What the log holds, by the stream it belongs to. How it is written and read: [the log](../explanation/the-log.md).

Fields marked **personal** are stored apart from the rest, sealed under the key of their subject, and read as null once
that key is destroyed; the JSON Schemas describe the rest. Amounts `…_ncr` are nano-credits (10⁻⁹ credits), times are
UTC in RFC 3339, ids are UUIDs. Fields are added with a default, or as a new version with an upcaster; nothing is
renamed, reused or edited.
"""
_COLUMNS = """
## Columns that every event has

| column | |
|---|---|
| `shard`, `position` | where it stands in the log; dense and in commit order within a shard |
| `tenant_id` | whose data it is: the user who owns, and pays for, what it is about |
| `stream_id`, `stream_version` | the aggregate it belongs to, and its number in that stream, from 1 |
| `type`, `schema_version` | the names below, and the version of the fields |
| `subject_id` | under whose key the personal part is sealed; null without one |
| `command_id` | the command that it follows from |
| `correlation_id` | the turn or request that it belongs to |
| `causation_id` | the event that the command followed from, if any |
| `actor` | who asked: `user:…`, `api_key:…`, `agent_key:…`, `worker:…`, `operator:…` |
| `traceparent` | W3C trace context of the request, if it had one |
| `recorded_at` | the database's clock when it was appended |

The event's id is `uuid5(stream_id, stream_version)`.
"""


def events_page() -> str:
    """The whole page."""
    return page("Events", _INTRODUCTION, _COLUMNS, *_streams(), *_values())


def _streams() -> Iterator[str]:
    for aggregate in AGGREGATES:
        yield f"## {aggregate.__name__}\n\n{inspect.getdoc(aggregate) or ''}"
        for kind in EVENT_TYPES.values():
            if kind.aggregate is aggregate:
                yield _event(kind)


def _event(kind: EventType) -> str:
    rows = [
        (code(field.name), code(_type_of(field)), "**personal**" if field.name in kind.personal else "")
        for field in _own_fields(kind)
    ]
    schema = f"../../schemas/events/{kind.name}.v{kind.version}.json"
    version = f"Version {kind.version}, [JSON Schema]({schema})."
    description = inspect.cleandoc(kind.event_class.__dict__.get("__doc__") or "")
    if description.startswith(kind.event_class.__name__ + "("):
        description = ""  # what dataclasses write where there is no docstring
    shown = table(("field", "type", ""), rows) if rows else "No fields."
    return f"### {kind.name}\n\n{f'{description} {version}'.strip()}\n\n{shown}"


def _own_fields(kind: EventType) -> list[Field[Any]]:
    return [field for field in fields(kind.event_class) if field.name not in ENVELOPE]


def _type_of(field: Field[Any]) -> str:
    name = str(field.type)
    return {
        "PersonalText": "str | None",
        "Annotated[dict[str, Any] | None, PERSONAL]": "dict[str, Any] | None",
    }.get(name, name)


def _values() -> Iterator[str]:
    """What the fields' types are made of."""
    yield "## Values"
    for value_class in sorted(_value_classes(), key=lambda each: each.__name__):
        rows = [(code(field.name), code(str(field.type))) for field in fields(value_class)]
        yield f"### {value_class.__name__}\n\n{inspect.getdoc(value_class) or ''}\n\n{table(('field', 'type'), rows)}"


def _value_classes() -> set[type]:
    found: set[type] = set()
    for kind in EVENT_TYPES.values():
        hints = get_type_hints(kind.event_class)
        for field in _own_fields(kind):
            _gather(hints[field.name], found)
    return found


def _gather(hint: Any, found: set[type]) -> None:
    if isinstance(hint, type) and is_dataclass(hint) and hint not in found:
        found.add(hint)
        for inner in get_type_hints(hint).values():
            _gather(inner, found)
    for argument in get_args(hint):
        _gather(argument, found)
