"""The document about the public topics is valid, complete, and the one that is committed."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from schemas.asyncapi import FILE, document, written
from schemas.public_forms import public_forms
from schemas.topics import AGENT_STATE, CREDIT_BALANCE, PUBLIC

# See its $comment for where it is from.
OFFICIAL = json.loads((Path(__file__).parent / "asyncapi-3.0.0.schema.json").read_text("utf-8"))
TOPICS = {topic.name: topic for topic in (*PUBLIC.values(), AGENT_STATE, CREDIT_BALANCE)}
Document = dict[str, Any]


def faults(document: Document) -> list[str]:
    return [error.message for error in Draft7Validator(OFFICIAL).iter_errors(document)]


def test_the_committed_document_is_that_of_the_program() -> None:
    assert FILE.read_text("utf-8") == written(), "run `python -m schemas.generate`"


def test_the_document_is_valid_asyncapi_3() -> None:
    assert faults(document()) == []


@pytest.mark.parametrize(
    "place", ["channels/turn.events/messages", "operations/publish.turn.events/action", "info/title"]
)
def test_the_official_schema_would_find_a_mistake(place: str) -> None:
    broken = deepcopy(document())
    *path, last = place.split("/")
    within = broken
    for part in path:
        within = within[part]
    within[last] = 7
    assert faults(broken) != []


def test_every_public_topic_is_described_as_it_is_made() -> None:
    channels = {channel["address"]: channel for channel in document()["channels"].values()}
    assert set(channels) == set(TOPICS)
    for name, topic in TOPICS.items():
        binding = channels[name]["bindings"]["kafka"]
        assert binding["partitions"] == topic.partitions
        for key, value in binding["topicConfiguration"].items():
            assert topic.settings[key] == (",".join(value) if isinstance(value, list) else str(value))


def test_every_message_is_on_exactly_one_topic() -> None:
    named = [name for channel in document()["channels"].values() for name in channel["messages"]]
    assert sorted(named) == sorted(public_forms())


def test_every_reference_leads_somewhere() -> None:
    whole = document()
    found = 0

    def visit(node: Any) -> None:
        nonlocal found
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                place: Any = whole
                for part in node["$ref"].removeprefix("#/").split("/"):
                    place = place[part]
                found += 1
            for each in node.values():
                visit(each)
        elif isinstance(node, list):
            for each in node:
                visit(each)

    visit(whole)
    assert found > 100


def test_payloads_are_schemas_of_both_dialects_that_consumers_use() -> None:
    for schema in document()["components"]["schemas"].values():
        Draft7Validator.check_schema(schema)
        Draft202012Validator.check_schema(schema)
