"""JSON Schemas of the events as the log has them, written to schemas/events.

`python -m schemas.generate` writes them, those of what is published (`schemas.public_forms`), and the document about
that (`schemas.asyncapi`). It refuses a change that consumers, or the log itself, would not survive unless the event
type has a new version. The schema of an old version stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from schemas.codec import EVENT_TYPES, EventType

FOLDER = Path(__file__).parent / "events"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Json = Mapping[str, Any]
Shape = dict[str, tuple[frozenset[str], bool]]  # by path: what may stand there, and whether it must


def schema_of(kind: EventType) -> dict[str, Any]:
    """The JSON Schema of an event type's public payload; `x-personal` names the fields that are not in it."""
    hints = get_type_hints(kind.event_class, include_extras=True)
    declared = {field.name: field for field in fields(kind.event_class)}
    members: list[Any] = [
        (name, hints[name])
        if declared[name].default is MISSING
        else (name, hints[name], declared[name].default)
        for name in kind.public
    ]
    own, definitions = as_schema(kind.name, members)
    about = (kind.event_class.__doc__ or "").partition("\n")[0]
    return {
        "$schema": DIALECT,
        "$id": f"urn:oshaani:event:{kind.name}:{kind.version}",
        **own,
        "title": kind.name,
        **({"description": about} if about and not about.startswith(f"{kind.event_class.__name__}(") else {}),
        **({"$defs": definitions} if definitions else {}),
        "x-version": kind.version,
        "x-personal": list(kind.personal),
    }


def as_schema(name: str, members: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON Schema of an object with these members, (name, type) or (name, type, default), and its definitions."""
    payload = msgspec.defstruct(name, members, kw_only=True)
    (schema,), definitions = msgspec.json.schema_components([payload], ref_template="#/$defs/{name}")
    own = definitions.pop(schema["$ref"].rpartition("/")[2])
    _name_instants([own, *definitions.values()])
    return own, dict(sorted(definitions.items()))


def _name_instants(schemas: Sequence[dict[str, Any]]) -> None:
    """Instants end in `_at`, and are written as RFC 3339 says."""
    for schema in schemas:
        for name, member in schema.get("properties", {}).items():
            for option in (member, *member.get("anyOf", ())):
                if name.endswith("_at") and option.get("type") == "string":
                    option["format"] = "date-time"


def file_of(kind: EventType, folder: Path = FOLDER) -> Path:
    """Where the schema of the type's current version is kept."""
    return folder / f"{kind.name}.v{kind.version}.json"


def incompatibilities(before: Json, after: Json) -> list[str]:
    """Why events, or programs, of `before` would not survive `after`; one sentence for each place."""
    old, new = _shape(before), _shape(after)
    found = [f"{path} was removed" for path in old if path not in new]
    for path, (kinds, required) in new.items():
        if path not in old:
            # What stands in something new is new as a whole.
            parent = path.rpartition("/")[0]
            if required and (parent in old or not parent):
                found.append(f"{path} is new and required")
            continue
        was, was_required = old[path]
        if "anything" not in kinds and not was <= kinds:
            found.append(f"{path} was {_listed(was)} and is {_listed(kinds)}")
        if required and not was_required:
            found.append(f"{path} became required")
    if set(before["x-personal"]) != set(after["x-personal"]):
        found.append(f"personal fields were {before['x-personal']} and are {after['x-personal']}")
    return found


def _listed(kinds: frozenset[str]) -> str:
    return " or ".join(sorted(kinds))


def _shape(schema: Json) -> Shape:
    return dict(_places(schema, schema.get("$defs", {}), "", True))


def _places(
    schema: Json, definitions: Json, path: str, required: bool
) -> Iterator[tuple[str, tuple[frozenset[str], bool]]]:
    """Every place of a schema, the schemas referred to laid open."""
    options = [_resolved(option, definitions) for option in schema.get("anyOf", [schema])]
    yield path, (frozenset(kind for option in options for kind in _kinds(option)), required)
    for option in options:
        for name, member in option.get("properties", {}).items():
            yield from _places(member, definitions, f"{path}/{name}", name in option.get("required", ()))
        for within in ("items", "additionalProperties"):
            if isinstance(option.get(within), Mapping):
                yield from _places(option[within], definitions, f"{path}/*", False)


def _resolved(schema: Json, definitions: Json) -> Json:
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return schema


def _kinds(schema: Json) -> list[str]:
    if "enum" in schema:
        return [f"{value!r}" for value in schema["enum"]]
    if "type" not in schema:
        return ["anything"]
    return [schema["type"] + (f" ({schema['format']})" if "format" in schema else "")]


def written(schema: Json) -> str:
    """A schema as its file has it."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def generate(folder: Path = FOLDER) -> list[str]:
    """Bring the folder up to date; returns what stands against it, and then writes nothing."""
    return bring_up_to_date({file_of(kind, folder): schema_of(kind) for kind in EVENT_TYPES.values()})


def bring_up_to_date(current: Mapping[Path, Json]) -> list[str]:
    """Write each schema to its file; returns what stands against it, and then writes nothing."""
    faults: list[str] = []
    for file, schema in current.items():
        if file.exists():
            broken = incompatibilities(json.loads(file.read_text("utf-8")), schema)
            faults += [f"{schema['title']}: {each}; give it a new version and an upcaster" for each in broken]
    if not faults:
        for file, schema in current.items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(written(schema), "utf-8")
    return faults


if __name__ == "__main__":
    from schemas import asyncapi, public_forms

    if reasons := generate() + public_forms.generate():
        sys.exit("\n".join(reasons))
    asyncapi.FILE.write_text(asyncapi.written(), "utf-8")
