"""What is published says nothing that somebody may have to take back, in a form that consumers can rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from eventsourcing.domain import AggregateEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from domain.money import ncr
from schemas.codec import EVENT_TYPES, EventType
from schemas.generate import incompatibilities, written
from schemas.public_facts import FACT_NAMES, Fact
from schemas.public_forms import (
    FOLDER,
    NAMED_TOOL,
    NOUNS,
    WITHHELD,
    data_of_event,
    data_of_fact,
    generate,
    is_public,
    public_forms,
    public_name,
    shown,
)
from tests.schemas.test_codec import EXAMPLES, events_of, instances_of

CANARY = "canary-7d1f"
PRIVATE = {"Callback"}  # addresses of callers' servers
PUBLIC_KINDS = [kind for kind in EVENT_TYPES.values() if is_public(kind)]
# Ids of models, tools and workers, codes of ours, names that owners gave to their agents and tools, and who did it.
TEXTS_OF_OURS = {
    *("name", "agent_type", "custom_tools", "key_id", "prefix", "role", "plan", "outcome", "finish"),
    *("error_class", "error_code", "refusal_code", "provider", "model", "model_ref", "worker", "type"),
    *("tool", "tools_offered", "meter", "book", "rate_card_id", "actor", "started_by", "by", "status"),
}


def checker(name: str) -> Draft202012Validator:
    return Draft202012Validator(public_forms()[name].schema(), format_checker=FormatChecker())


def names(kinds: list[EventType]) -> list[str]:
    return [kind.name for kind in kinds]


@pytest.mark.parametrize("name", sorted(public_forms()))
def test_a_published_schema_is_that_of_the_program(name: str) -> None:
    current = public_forms()[name].schema()
    Draft202012Validator.check_schema(current)
    published = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    assert incompatibilities(published, current) == [], "give the event a new version and an upcaster"
    assert published == current, "run `python -m schemas.generate`"


def test_no_schema_is_lost_or_left_of_a_form_that_is_gone(tmp_path: Any) -> None:
    files = {file.stem for file in FOLDER.iterdir()}
    assert {name.rpartition(".v")[0] for name in files} == {
        name.rpartition(".v")[0] for name in public_forms()
    }
    assert generate(tmp_path / "public") == []
    for file in (tmp_path / "public").iterdir():
        assert file.read_text("utf-8") == (FOLDER / file.name).read_text("utf-8")


def test_a_change_that_consumers_would_not_survive_is_refused(tmp_path: Any) -> None:
    assert generate(tmp_path) == []
    file = tmp_path / "turn.completed.v1.json"
    before = json.loads(file.read_text("utf-8"))
    before["properties"]["colour"] = {"type": "string"}
    file.write_text(written(before), "utf-8")
    assert generate(tmp_path) == [
        "turn.completed.v1: /colour was removed; give it a new version and an upcaster"
    ]
    assert json.loads(file.read_text("utf-8")) == before


def test_every_aggregate_is_public_or_known_to_be_private() -> None:
    assert {kind.name.partition(".")[0] for kind in EVENT_TYPES.values()} <= {*NOUNS, *PRIVATE}
    assert all(field in EVENT_TYPES[name].public for name, fields in WITHHELD.items() for field in fields)


@pytest.mark.parametrize("name", names(PUBLIC_KINDS))
def test_every_event_is_published_in_the_form_of_its_schema(name: str) -> None:
    kind = EVENT_TYPES[name]
    check = checker(public_name(kind))

    @given(event=events_of(kind))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def valid(event: AggregateEvent) -> None:
        if name in NAMED_TOOL:
            vars(event)["tool"]["name"] = "lookup"
        data = json.loads(data_of_event(kind, event))
        check.validate(data)
        assert set(data) == set(check.schema["properties"])

    valid()


@pytest.mark.parametrize("fact", FACT_NAMES, ids=FACT_NAMES.values())
def test_every_fact_is_published_in_the_form_of_its_schema(fact: type[Fact]) -> None:
    check = checker(FACT_NAMES[fact])

    @given(value=instances_of(fact))
    @settings(max_examples=EXAMPLES, deadline=None)
    def valid(value: Fact) -> None:
        check.validate(json.loads(data_of_fact(value)))

    valid()


@pytest.mark.parametrize(
    "name", [kind.name for kind in PUBLIC_KINDS if kind.personal or kind.name in WITHHELD]
)
@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_personal_or_withheld_is_published(name: str, data: st.DataObject) -> None:
    kind = EVENT_TYPES[name]
    event = data.draw(events_of(kind))
    hints = get_type_hints(kind.event_class)
    for field in (*kind.personal, *WITHHELD.get(name, ())):
        is_text = hints[field] is str or (
            get_origin(hints[field]) is not dict and str in get_args(hints[field])
        )
        vars(event)[field] = CANARY if is_text else {CANARY: CANARY, "name": "lookup"}
    assert CANARY not in data_of_event(kind, event).decode()
    assert CANARY in repr(vars(event))


def test_every_free_text_on_a_public_topic_is_one_that_was_considered() -> None:
    found = {text for form in public_forms().values() for text in free_texts(form.schema())}
    assert found <= TEXTS_OF_OURS, "is this something a person wrote? then withhold it"


def free_texts(schema: Any, name: str = "") -> Iterator[str]:
    """Names of fields that any text may stand in."""
    if isinstance(schema, list):
        for each in schema:
            yield from free_texts(each, name)
    elif isinstance(schema, dict):
        if schema.get("type") == "string" and not {"format", "pattern", "enum"} & set(schema):
            yield name
        for key, member in schema.items():
            if key in ("properties", "$defs"):
                for inner, its in member.items():
                    yield from free_texts(its, inner)
            else:
                yield from free_texts(member, name)


def test_objects_without_a_described_form_are_never_published() -> None:
    for form in public_forms().values():
        for place in objects(form.schema()):
            assert "properties" in place or "additionalProperties" in place


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for each in schema:
            yield from objects(each)
    elif isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for member in schema.values():
            yield from objects(member)


@given(st.integers(-(10**20), 10**20))
def test_amounts_are_published_as_exact_decimal_strings(amount_ncr: int) -> None:
    text = shown({"amount_ncr": amount_ncr})["amount_credits"]
    assert isinstance(text, str)
    if abs(amount_ncr) < 10**18:
        assert ncr(text) == amount_ncr
