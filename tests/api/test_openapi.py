"""The published contract of the API."""

from __future__ import annotations

import copy
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api.compatibility import breaks
from api.samples import SAMPLES
from tests.api.client import Client
from tests.api.platform import Platform

SNAPSHOT = Path(__file__).parents[2] / "schemas" / "openapi.json"
REGENERATE = "OSHAANI_WRITE_SNAPSHOTS=1 .venv/bin/python -m pytest tests/api/test_openapi.py"
Document = dict[str, Any]
TODAY = date(2026, 6, 1)


@pytest.fixture
def document(platform: Platform) -> Document:
    """The document without what differs from server to server."""
    found: Document = copy.deepcopy(platform.app.openapi())
    found["servers"] = [{"url": "/"}]
    found["info"]["version"] = "0"
    return found


def operations(document: Document) -> list[tuple[str, str, Document]]:
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def test_the_live_document_is_the_published_one(document: Document) -> None:
    if os.environ.get("OSHAANI_WRITE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    published = json.loads(SNAPSHOT.read_text())
    broken = breaks(published, document, TODAY)
    assert not broken, "old clients would break:\n" + "\n".join(broken)
    assert document == published, f"if the change is meant, write schemas/openapi.json anew: {REGENERATE}"


def test_every_operation_says_who_may_call_it_and_what_may_go_wrong(document: Document) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    public = {"register", "logIn", "getHealth", "getReadiness", "getMetrics", "getOpenapi", "getDocs"}
    public |= {"getAsyncapi", "getEventSchema"}
    for method, path, operation in operations(document):
        assert operation["description"], path
        assert bool(operation["security"]) == (operation["operationId"] not in public), path
        statuses = set(operation["responses"])
        assert {"500", "503"} <= statuses
        if operation["security"]:
            assert {"401", "403"} <= statuses
        if "{" in path:
            assert "404" in statuses
        if method != "get":
            assert {"400", "413", "415"} <= statuses


def test_every_reference_leads_somewhere(document: Document) -> None:
    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                found: Any = document
                for part in node["$ref"].removeprefix("#/").split("/"):
                    found = found[part]
            for each in node.values():
                visit(each)
        elif isinstance(node, list):
            for each in node:
                visit(each)

    visit(document)


def test_the_samples_of_the_requirements_fit_their_schemas(document: Document) -> None:
    by_name = {operation["operationId"]: operation for _, _, operation in operations(document)}
    for name in SAMPLES:
        first, *rest = name.split("_")
        operation = by_name[first + "".join(word.capitalize() for word in rest)]
        contents = []
        if SAMPLES[name].request is not None:
            contents.append(operation["requestBody"]["content"]["application/json"])
        if SAMPLES[name].response is not None:
            contents.append(operation["responses"][str(SAMPLES[name].status)]["content"]["application/json"])
        assert contents
        for content in contents:
            schema = {**content["schema"], "components": document["components"]}
            for example in content["examples"].values():
                Draft202012Validator(schema).validate(example["value"])


async def test_the_document_and_its_page_are_served_and_load_nothing_from_elsewhere(client: Client) -> None:
    document = await client.send("GET", "/openapi.json")
    assert document.json["openapi"].startswith("3.1")
    page = await client.send("GET", "/docs")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert b"<script" not in page.raw
    assert b"/api/agents/{agent_id}/chat/" in page.raw


async def test_operators_see_health_and_metrics(client: Client) -> None:
    assert (await client.send("GET", "/healthz")).json == {"status": "ok"}
    ready = await client.send("GET", "/readyz")
    assert (ready.status, ready.json["checks"][0]) == (200, {"name": "database", "ok": True, "detail": ""})
    metrics = await client.send("GET", "/metrics")
    assert b'oshaani_http_requests_total{method="GET",route="/healthz",status="200"}' in metrics.raw
    through_a_proxy = await client.send("GET", "/metrics", headers={"X-Forwarded-For": "203.0.113.9"})
    assert through_a_proxy.status == 403


async def test_a_server_that_cannot_serve_says_so(platform: Platform, client: Client) -> None:
    platform.log.broken = True
    try:
        assert (await client.send("GET", "/readyz")).status == 503
    finally:
        platform.log.broken = False


# --- the gate itself ----------------------------------------------------------------------------------------------

CHAT = "/api/v1/chat"


@pytest.mark.parametrize(
    ("path", "change", "sentence"),
    [
        ((CHAT,), None, "POST /api/v1/chat is gone"),
        ((CHAT, "post", "operationId"), "talk", "another operationId"),
        ((CHAT, "post", "responses", "202"), None, "does not answer 202"),
    ],
)
def test_a_lost_operation_is_a_break(
    document: Document, path: tuple[str, ...], change: Any, sentence: str
) -> None:
    after = copy.deepcopy(document)
    place = after["paths"]
    for part in path[:-1]:
        place = place[part]
    if change is None:
        del place[path[-1]]
    else:
        place[path[-1]] = change
    assert [found for found in breaks(document, after, TODAY) if sentence in found]


def test_an_operation_may_go_when_its_announced_end_has_passed(document: Document) -> None:
    before, after = copy.deepcopy(document), copy.deepcopy(document)
    del after["paths"][CHAT]
    for sunset, gone in (("2026-05-31", []), ("2026-06-02", [f"POST {CHAT} is gone"])):
        before["paths"][CHAT]["post"]["x-sunset"] = sunset
        assert breaks(before, after, TODAY) == gone


def test_a_field_less_in_an_answer_or_more_needed_in_a_request_is_a_break(document: Document) -> None:
    after = copy.deepcopy(document)
    del after["components"]["schemas"]["ChatAnswer"]["properties"]["iterations"]
    after["components"]["schemas"]["ChatBody"]["required"].append("conversation_id")
    found = "\n".join(breaks(document, after, TODAY))
    assert "has no 'iterations' any more" in found
    assert "needs 'conversation_id' now" in found


def test_more_of_everything_breaks_nobody(document: Document) -> None:
    after = copy.deepcopy(document)
    after["paths"]["/api/new"] = after["paths"][CHAT]
    after["components"]["schemas"]["ChatAnswer"]["properties"]["cost"] = {"type": "string"}
    after["components"]["schemas"]["ChatBody"]["properties"]["tone"] = {"type": "string"}
    assert breaks(document, after, TODAY) == []
