"""The published schemas are those of the program, and change only in ways that everybody survives."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from schemas.codec import EVENT_TYPES
from schemas.generate import FOLDER, file_of, generate, incompatibilities, schema_of, written

HELD = EVENT_TYPES["CreditAccount.CreditsHeld"]
ASKED = EVENT_TYPES["Turn.ToolCallRequested"]


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
def test_a_published_schema_is_that_of_the_program(name: str) -> None:
    kind = EVENT_TYPES[name]
    published = json.loads(file_of(kind).read_text("utf-8"))
    current = schema_of(kind)
    assert incompatibilities(published, current) == [], "give the event a new version and an upcaster"
    assert published == current, "run `python -m schemas.generate`"


def test_no_schema_is_left_of_an_event_that_is_gone() -> None:
    names = {file.name.rpartition(".v")[0] for file in FOLDER.iterdir()}
    assert names == set(EVENT_TYPES)


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
def test_a_published_schema_is_valid_json_schema(name: str) -> None:
    Draft202012Validator.check_schema(schema_of(EVENT_TYPES[name]))


def test_personal_fields_are_named_and_not_described() -> None:
    schema = schema_of(ASKED)
    assert schema["x-personal"] == ["args"]
    assert "args" not in schema["properties"]


def changed(change: Any) -> list[str]:
    """What stands against a change of CreditsHeld's schema."""
    before = schema_of(HELD)
    after = deepcopy(before)
    change(after)
    return incompatibilities(before, after)


def test_an_optional_field_may_be_added() -> None:
    assert changed(lambda schema: schema["properties"].update(note={"type": "string"})) == []


def test_an_enumeration_may_grow() -> None:
    before = schema_of(ASKED)
    after = deepcopy(before)
    after["$defs"]["Effect"]["enum"].append("reversible")
    assert incompatibilities(before, after) == []
    assert incompatibilities(after, before) != []


def test_a_field_is_never_removed() -> None:
    assert changed(lambda schema: schema["properties"].pop("quantity")) == ["/quantity was removed"]


def test_a_field_never_changes_its_type() -> None:
    found = changed(lambda schema: schema["properties"].update(quantity={"type": "string"}))
    assert found == ["/quantity was integer and is string"]


def test_a_field_never_becomes_null_less_or_null_again() -> None:
    before = schema_of(EVENT_TYPES["Turn.Accepted"])
    after = deepcopy(before)
    after["properties"]["conversation_id"] = {"type": "string", "format": "uuid"}
    assert incompatibilities(before, after) == [
        "/conversation_id was null or string (uuid) and is string (uuid)"
    ]
    assert incompatibilities(after, before) == []


def test_no_field_is_added_that_old_events_lack() -> None:
    def add(schema: dict[str, Any]) -> None:
        schema["properties"]["currency"] = {"type": "string"}
        schema["required"].append("currency")

    assert changed(add) == ["/currency is new and required"]


def test_what_lies_deeper_counts_too() -> None:
    def rename(schema: dict[str, Any]) -> None:
        posting = schema["$defs"]["Posting"]
        posting["properties"]["account"] = posting["properties"].pop("book")
        posting["required"] = ["account", "amount_ncr"]

    assert changed(rename) == ["/postings/*/book was removed", "/postings/*/account is new and required"]


def test_a_field_never_moves_into_or_out_of_the_personal_part() -> None:
    found = changed(lambda schema: schema.update({"x-personal": ["meter"]}))
    assert found == ["personal fields were [] and are ['meter']"]


def test_the_generator_writes_nothing_that_breaks_what_is_published(tmp_path: Path) -> None:
    assert generate(tmp_path) == []
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in FOLDER.iterdir()}
    file = file_of(HELD, tmp_path)
    older = schema_of(HELD)
    older["properties"]["currency"] = {"type": "string"}
    file.write_text(written(older))
    assert generate(tmp_path) == [
        "CreditAccount.CreditsHeld: /currency was removed; give it a new version and an upcaster"
    ]
    assert json.loads(file.read_text()) == older
