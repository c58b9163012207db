"""What subscribers find at the API: the document, and the schemas that messages name."""

from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator

from schemas.asyncapi import document
from schemas.cloud_events import SCHEMAS_PATH
from schemas.public_forms import public_forms
from tests.api.client import Client


async def test_the_asyncapi_document_is_served(client: Client) -> None:
    answer = await client.send("GET", "/asyncapi.json")
    assert answer.status == 200
    assert answer.json == document()


async def test_every_schema_is_served_where_messages_say(client: Client) -> None:
    for name, form in public_forms().items():
        answer = await client.send("GET", f"{SCHEMAS_PATH}/{name}.json")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/schema+json"
        assert answer.json == form.schema()
        Draft202012Validator.check_schema(answer.json)


@pytest.mark.parametrize(
    "name",
    [
        "turn.completed.v1",
        "turn.completed.v99.json",
        "..%2Fopenapi.json",
        "%2e%2e%2fevents%2fTurn.Completed.v1.json",
        ".json",
    ],
)
async def test_nothing_else_is_served(client: Client, name: str) -> None:
    answer = await client.send("GET", f"{SCHEMAS_PATH}/{name}")
    assert answer.status == 404
    assert answer.json["code"] == "not_found"
