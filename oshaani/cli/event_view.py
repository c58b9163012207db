"""Events as operators see them: everything but what is personal, and that too when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from domain.event_log import StoredEvent
from domain.ids import event_id
from oshaani.cli import show
from schemas.codec import EVENT_TYPES
from schemas.records import Records, Unreadable

if TYPE_CHECKING:
    from oshaani.wiring import Core

DATA_CHARS_MAX = 220  # of an event's data on its line
Shown = dict[str, Any]


async def views(core: Core, rows: Sequence[StoredEvent], personal: bool) -> list[Shown]:
    """What is shown of each event; `personal` opens what is sealed."""
    opened = await _personal_parts(core.records, rows) if personal else [None] * len(rows)
    return [_view(row, part, personal) for row, part in zip(rows, opened, strict=True)]


def print_line(view: Shown) -> None:
    """One event on one line."""
    data = " ".join(
        f"{name}={_short(value)}" for name, value in {**view["data"], **(view["personal"] or {})}.items()
    )
    sealed = "" if view["personal"] or not view["sealed"] else f" ({', '.join(view['sealed'])} sealed)"
    at = view["recorded_at"].strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    place = f"{view['shard']}:{view['position']}"
    show.line(
        f"{at}Z {place:>9}  {view['type']:<26} {view['stream_id']}#{view['stream_version']}  "
        f"{show.plain(data, DATA_CHARS_MAX)}{sealed}"
    )


def print_whole(view: Shown) -> None:
    """One event with everything that is known of it."""
    for name, value in view.items():
        if name not in ("data", "personal"):
            show.line(f"{name:<15} {show.plain(', '.join(value) if isinstance(value, list) else str(value))}")
    for name in ("data", "personal"):
        if view[name] is not None:
            text = orjson.dumps(view[name], str, orjson.OPT_INDENT_2).decode()
            show.line(f"{name}\n{show.tamed(text, keep_indent=True)}")


def _view(row: StoredEvent, personal: Shown | None, asked: bool) -> Shown:
    kind = EVENT_TYPES.get(row.type)
    sealed = list(kind.personal) if kind and row.personal is not None else []
    return {
        "event_id": event_id(row.stream_id, row.stream_version),
        "type": row.type,
        "schema_version": row.schema_version,
        "shard": row.shard,
        "position": row.position,
        "stream_id": row.stream_id,
        "stream_version": row.stream_version,
        "tenant_id": row.tenant_id,
        "recorded_at": row.recorded_at,
        "actor": row.actor,
        "command_id": row.command_id,
        "correlation_id": row.correlation_id,
        "causation_id": row.causation_id,
        "traceparent": row.traceparent,
        "sealed": sealed,
        "data": orjson.loads(row.payload),
        "personal": personal if asked else None,
    }


async def _personal_parts(records: Records, rows: Sequence[StoredEvent]) -> list[Shown | None]:
    """The personal fields of each event; values are None once the key of their subject is destroyed."""
    found: list[Shown | None] = []
    for row, record in zip(rows, await records.open_some(rows, {row.type for row in rows}), strict=True):
        if isinstance(record, Unreadable) or row.personal is None:
            found.append(None)
        else:
            names = EVENT_TYPES[row.type].personal
            found.append({name: msgspec.to_builtins(getattr(record.event, name)) for name in names})
    return found


def _short(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, str).decode()
