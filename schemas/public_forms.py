"""What of an event others may read, and its JSON Schema, written to schemas/public.

Personal fields are never public. Neither are texts that people wrote, digests of such texts and of keys, and
definitions that may hold addresses of private servers: `WITHHELD`. Amounts become decimal strings: `…_ncr` in the log
is `…_credits` here. A change that consumers would not survive needs a new version of the event.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from re import compile as pattern_of
from typing import Any, get_type_hints

import msgspec
from eventsourcing.domain import AggregateEvent

from domain.money import credits
from schemas.codec import EVENT_TYPES, EventType, encode_json
from schemas.generate import DIALECT, Json, as_schema, bring_up_to_date, schema_of
from schemas.public_facts import FACT_NAMES, Fact

FOLDER = Path(__file__).parent / "public"
NOUNS: Mapping[str, str] = {
    "Agent": "agent",
    "Conversation": "conversation",
    "Turn": "turn",
    "CreditAccount": "credit",
    "User": "identity",
}
"""The public topic of each aggregate's events. An aggregate that is not named here is private."""
WITHHELD: Mapping[str, tuple[str, ...]] = {
    "Agent.Created": ("description", "configuration"),
    "Agent.Changed": ("description",),
    "Agent.ConfigurationChanged": ("patch",),
    "Agent.CustomToolAdded": ("tool",),
    "Agent.CustomToolChanged": ("tool",),
    "Agent.KeyIssued": ("name", "digest"),
    "Conversation.Started": ("name",),
    "CreditAccount.CreditsGranted": ("reason", "payment_ref"),
    "Turn.ContextAssembled": ("prompt_digest",),
    "Turn.ModelCallFailed": ("sentence",),
    "Turn.ToolCallRequested": ("args_digest",),
    "Turn.CancellationRequested": ("reason",),
    "Turn.Failed": ("sentence",),
    "Turn.TimedOut": ("sentence",),
    "Turn.Cancelled": ("sentence",),
    "User.ApiKeyIssued": ("name", "digest"),
}
NAMED_TOOL = ("Agent.CustomToolAdded", "Agent.CustomToolChanged")  # of the definition, the name is public
CREDITS_PATTERN = r"^-?[0-9]+\.[0-9]{2,9}$"
_NCR, _CREDITS = "_ncr", "_credits"
_NESTED = (dict, list, tuple)
_WORD = pattern_of(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class PublicForm:
    """A type of message on a public topic. `name` is its CloudEvents type and names its schema."""

    name: str
    noun: str
    schema: Callable[[], dict[str, Any]]


@cache
def public_name(kind: EventType) -> str:
    """`Turn.ToolCalled` of version 1 is `turn.tool_called.v1`."""
    return f"{_WORD.sub('_', kind.name).lower()}.v{kind.version}"


def is_public(kind: EventType) -> bool:
    """Whether events of the type are published at all."""
    return kind.name.partition(".")[0] in NOUNS


@cache
def published_fields(kind: EventType) -> tuple[str, ...]:
    """The fields of an event that are published as they are, amounts aside."""
    return tuple(field for field in kind.public if field not in WITHHELD.get(kind.name, ()))


def data_of_event(kind: EventType, event: AggregateEvent) -> bytes:
    """The public part of an event, as JSON."""
    values = vars(event)
    facts = {name: values[name] for name in published_fields(kind)}
    if kind.name in NAMED_TOOL:
        facts["name"] = values["tool"]["name"]
    return encode_json(shown(msgspec.to_builtins(facts)) if _has_amounts(kind) else facts)


def data_of_fact(fact: Fact) -> bytes:
    """A fact as JSON."""
    return encode_json(shown(msgspec.to_builtins(fact)))


def shown(value: Any) -> Any:
    """Builtins with each amount in nano-credits as a decimal string of credits, under its public name."""
    if isinstance(value, dict):
        return {
            _credits_name(name): credits(member)
            if name.endswith(_NCR) and isinstance(member, int)
            else shown(member)
            if type(member) in _NESTED
            else member
            for name, member in value.items()
        }
    return [shown(member) for member in value] if isinstance(value, list | tuple) else value


@cache
def public_forms() -> dict[str, PublicForm]:
    """Every type of message on public topics, by name."""
    found = [
        PublicForm(public_name(kind), NOUNS[kind.name.partition(".")[0]], _event_schema(kind))
        for kind in EVENT_TYPES.values()
        if is_public(kind)
    ]
    found += [
        PublicForm(name, name.partition(".")[0], _fact_schema(fact, name))
        for fact, name in FACT_NAMES.items()
    ]
    return {form.name: form for form in sorted(found, key=lambda form: form.name)}


def generate(folder: Path = FOLDER) -> list[str]:
    """Bring the folder up to date; returns what stands against it, and then writes nothing."""
    return bring_up_to_date({folder / f"{name}.json": form.schema() for name, form in public_forms().items()})


@cache
def published_schemas() -> dict[str, bytes]:
    """The schemas as they were published, those of old versions included, by name."""
    return {file.stem: file.read_bytes() for file in sorted(FOLDER.glob("*.json"))}


def _event_schema(kind: EventType) -> Callable[[], dict[str, Any]]:
    return lambda: _public(schema_of(kind), public_name(kind), _members(kind))


def _members(kind: EventType) -> tuple[str, ...]:
    return (*published_fields(kind), *(("name",) if kind.name in NAMED_TOOL else ()))


def _fact_schema(fact: type[Fact], name: str) -> Callable[[], dict[str, Any]]:
    def schema() -> dict[str, Any]:
        hints = get_type_hints(fact, include_extras=True)
        described, definitions = as_schema(name, [(field.name, hints[field.name]) for field in fields(fact)])
        described["description"] = (fact.__doc__ or "").partition("\n")[0]
        whole = {**described, **({"$defs": definitions} if definitions else {})}
        return _public(
            whole | {"x-version": int(name.rpartition(".v")[2])}, name, tuple(described["properties"])
        )

    return schema


def _public(schema: Json, name: str, members: tuple[str, ...]) -> dict[str, Any]:
    """A schema of the public form: of the members given, with amounts in credits."""
    found: dict[str, Any] = json.loads(json.dumps(schema))
    if "name" in members and "name" not in found["properties"]:
        found["properties"]["name"] = {"type": "string"}
        found["required"].append("name")
    found["properties"] = {member: found["properties"][member] for member in members}
    found["required"] = [member for member in found["required"] if member in members]
    found = dict(_shown_schema(found))
    head = {"$schema": DIALECT, "$id": f"urn:oshaani:public:{name}", "title": name}
    tail = {"$defs": _used_definitions(found), "x-version": found.pop("x-version"), "x-personal": []}
    return head | found | head | {key: value for key, value in tail.items() if value or key != "$defs"}


def _shown_schema(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_credits_name(each) if isinstance(each, str) else _shown_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _shown_schema(member) for key, member in schema.items()}
    if isinstance(found.get("description"), str):
        found["description"] = found["description"].replace("nano-credits", "credits")
    if "properties" in schema:
        found["properties"] = {
            _credits_name(name): {"type": "string", "pattern": CREDITS_PATTERN}
            if name.endswith(_NCR)
            else _shown_schema(member)
            for name, member in schema["properties"].items()
        }
    return found


def _used_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """The definitions without those that only withheld fields had; takes them out of the schema."""
    definitions, used = schema.pop("$defs", {}), {}
    waiting: list[Any] = [schema]
    while waiting:
        text = json.dumps(waiting.pop())
        for name, definition in definitions.items():
            if name not in used and f'"#/$defs/{name}"' in text:
                used[name] = definition
                waiting.append(definition)
    return dict(sorted(used.items()))


@cache
def _has_amounts(kind: EventType) -> bool:
    return _CREDITS in json.dumps(_event_schema(kind)())


@lru_cache(1_000)
def _credits_name(name: str) -> str:
    return name.removesuffix(_NCR) + _CREDITS if name.endswith(_NCR) else name
