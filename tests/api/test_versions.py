"""The contract has a date, and what will go away is announced with every answer."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from api.openapi import document_of
from api.versions import CURRENT, DEPRECATED, VERSIONS, Notice
from tests.api.client import Client
from tests.api.platform import Platform

NOTICE = Notice(
    datetime(2023, 6, 30, 23, 59, 59, tzinfo=UTC),
    datetime(2024, 6, 30, 23, 59, 59, tzinfo=UTC),
    "https://example.com/deprecation",
)


@pytest.mark.parametrize("asked", [None, VERSIONS[0], "2999-12-31"])
async def test_answers_name_the_version_they_have(client: Client, asked: str | None) -> None:
    headers = {"Oshaani-Version": asked} if asked else {}
    for path in ("/healthz", "/api/agents/", "/nowhere"):
        answer = await client.send("GET", path, headers=headers)
        assert answer.headers["Oshaani-Version"] == CURRENT


@pytest.mark.parametrize("asked", ["2020-01-01", "latest", "2026-13-01", "20261101", "", "v1"])
async def test_a_version_that_never_was_is_refused_by_name(client: Client, asked: str) -> None:
    answer = await client.send("GET", "/healthz", headers={"Oshaani-Version": asked})
    assert (answer.status, answer.json["code"]) == (400, "validation_failed")
    assert answer.json["errors"][0]["pointer"] == "Oshaani-Version"


async def test_what_will_go_away_is_announced(
    platform: Platform, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await client.send("GET", "/healthz")
    assert not {"Deprecation", "Sunset"} & before.headers.keys()
    monkeypatch.setitem(DEPRECATED, "get_health", NOTICE)
    after = await client.send("GET", "/healthz")
    # The example of RFC 9745 §4.
    assert after.headers["Deprecation"] == "@1688169599"
    assert after.headers["Sunset"] == "Sun, 30 Jun 2024 23:59:59 GMT"
    assert after.headers["Link"] == '<https://example.com/deprecation>; rel="deprecation"'
    monkeypatch.setattr(platform.app, "openapi_schema", None)
    operation = document_of(platform.app, "")["paths"]["/healthz"]["get"]
    assert (operation["deprecated"], operation["x-sunset"]) == (True, "2024-06-30")
