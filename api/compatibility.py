"""What a client that was written against an earlier OpenAPI document would miss in a later one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

Json = Mapping[str, Any]


def breaks(before: Json, after: Json, today: date) -> list[str]:
    """Every incompatible change, one sentence each; empty when old clients go on working.

    An operation may be gone when its announced sunset (`x-sunset`) has passed.
    """
    return [*_paths(before, after, today)]


def _paths(before: Json, after: Json, today: date) -> Iterator[str]:
    for path, item in before["paths"].items():
        for method, operation in item.items():
            where = f"{method.upper()} {path}"
            later = after["paths"].get(path, {}).get(method)
            if later is None:
                if operation.get("x-sunset", "9") > today.isoformat():
                    yield f"{where} is gone"
                continue
            yield from _operation(where, (before, operation), (after, later))


def _operation(where: str, before: tuple[Json, Json], after: tuple[Json, Json]) -> Iterator[str]:
    (old_document, old), (new_document, new) = before, after
    if old["operationId"] != new["operationId"]:
        yield f"{where} has another operationId: {new['operationId']!r}"
    for alternative in old.get("security", ()):
        if alternative not in new.get("security", ()) and new.get("security"):
            yield f"{where} does not take {', '.join(alternative)} any more"
    yield from _parameters(where, before, after)
    old_body, new_body = (_schema(document, part.get("requestBody")) for document, part in (before, after))
    if new_body is not None:
        if old_body is None:
            if new["requestBody"].get("required"):
                yield f"{where} needs a body now"
        else:
            yield from _narrowed(f"{where} request", (old_document, old_body), (new_document, new_body))
    yield from _answers(where, before, after)


def _answers(where: str, before: tuple[Json, Json], after: tuple[Json, Json]) -> Iterator[str]:
    (old_document, old), (new_document, new) = before, after
    for status, response in old["responses"].items():
        if not status.startswith("2"):
            continue
        if status not in new["responses"]:
            yield f"{where} does not answer {status} any more"
            continue
        old_answer = _schema(old_document, response)
        new_answer = _schema(new_document, new["responses"][status])
        if old_answer is not None:
            place = f"{where} {status}"
            yield from _lost(place, (old_document, old_answer), (new_document, new_answer or {}))


def _parameters(where: str, before: tuple[Json, Json], after: tuple[Json, Json]) -> Iterator[str]:
    known, later = (_named(document, operation) for document, operation in (before, after))
    for key in known:
        if key not in later:
            yield f"{where} does not know the {key[0]} parameter {key[1]!r} any more"
    for key, parameter in later.items():
        if parameter.get("required") and not known.get(key, {}).get("required"):
            yield f"{where} needs the {key[0]} parameter {key[1]!r} now"


def _named(document: Json, operation: Json) -> dict[tuple[str, str], Json]:
    resolved = (_resolved(document, each) for each in operation.get("parameters", ()))
    return {(each["in"], each["name"]): each for each in resolved}


def _narrowed(where: str, before: tuple[Json, Json], after: tuple[Json, Json]) -> Iterator[str]:
    """A request may send what it could send before."""
    (old_document, old), (new_document, new) = before, after
    yield from _other_type(where, old, new)
    for name in set(new.get("required", ())) - set(old.get("required", ())):
        yield f"{where} needs {name!r} now"
    closed = new.get("additionalProperties") is False
    for name, schema in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            if closed:
                yield f"{where} does not take {name!r} any more"
            continue
        pair = _resolved(old_document, schema), _resolved(new_document, new["properties"][name])
        yield from _narrowed(f"{where} {name}", (old_document, pair[0]), (new_document, pair[1]))


def _lost(where: str, before: tuple[Json, Json], after: tuple[Json, Json]) -> Iterator[str]:
    """An answer has what it had before."""
    (old_document, old), (new_document, new) = before, after
    yield from _other_type(where, old, new)
    for name, schema in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            yield f"{where} has no {name!r} any more"
            continue
        pair = _resolved(old_document, schema), _resolved(new_document, new["properties"][name])
        yield from _lost(f"{where} {name}", (old_document, pair[0]), (new_document, pair[1]))
    for name in set(old.get("required", ())) - set(new.get("required", ())):
        if name in new.get("properties", {}):
            yield f"{where} may leave {name!r} out now"
    if "items" in old and "items" in new:
        pair = _resolved(old_document, old["items"]), _resolved(new_document, new["items"])
        yield from _lost(f"{where}[]", (old_document, pair[0]), (new_document, pair[1]))


def _other_type(where: str, old: Json, new: Json) -> Iterator[str]:
    if "type" in old and "type" in new and old["type"] != new["type"]:
        yield f"{where} is {new['type']} and was {old['type']}"


def _schema(document: Json, part: Json | None) -> Json | None:
    if part is None:
        return None
    content = _resolved(document, part).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    return None if schema is None else _resolved(document, schema)


def _resolved(document: Json, node: Json) -> Json:
    while "$ref" in node:
        found: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node
