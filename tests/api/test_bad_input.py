"""What strangers send: always answered with the error's one form, never with a 500."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest

from commands.bus import LATEST
from domain.conversation import Conversation
from domain.event_log import HeadMoved
from domain.ids import UserId
from tests.api.client import Client, Person
from tests.api.platform import Platform
from tests.peers.log_rows import happened

CHAT = "/api/v1/chat"
MEMBERS = {"error", "detail", "code", "type", "title", "status", "instance", "request_id"}


@pytest.mark.parametrize(
    ("raw", "status", "code", "pointer"),
    [
        (b"", 400, "malformed_json", None),
        (b"{", 400, "malformed_json", None),
        (b"nonsense", 400, "malformed_json", None),
        (b'{"message": "\xff"}', 400, "malformed_json", None),
        (b"\xef\xbb\xbf{}", 400, "malformed_json", None),
        (b'{"message": NaN}', 400, "malformed_json", None),
        (b'{"message": 1e999}', 400, "malformed_json", None),
        (b'{"message": ' + b"9" * 5000 + b"}", 400, "malformed_json", None),
        (b'{"message": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "malformed_json", None),
        (b'{"message": ' + b"[" * 65 + b"]" * 65 + b"}", 400, "malformed_json", None),
        (b'{"message": "a", "message": "b"}', 400, "validation_failed", "/message"),
        (b'{"message": "a\\u0000b"}', 400, "validation_failed", "/message"),
        (b'{"message": "a", "conversation_id": "\\ud800"}', 400, "validation_failed", "/conversation_id"),
        (b'{"message": 7}', 400, "validation_failed", "/message"),
        (b'{"message": ""}', 400, "validation_failed", "/message"),
        (b'{"message": "   "}', 400, "validation_failed", "/message"),
        (b'{"mesage": "a"}', 400, "validation_failed", "/message"),
        (b"[]", 400, "validation_failed", ""),
        (b"null", 400, "validation_failed", ""),
        (b'{"message": "a", "stream": "yes"}', 400, "validation_failed", "/stream"),
        (json.dumps({"message": "a" * 200_001}).encode(), 400, "validation_failed", "/message"),
        (b'{"message": "' + b"a" * 10_000_000 + b'"}', 413, "payload_too_large", None),
    ],
)
async def test_a_body_that_cannot_be_taken_is_refused(
    ada: Person, raw: bytes, status: int, code: str, pointer: str | None
) -> None:
    answer = await ada.client.send("POST", CHAT, key=ada.agent_key, raw=raw)
    assert (answer.status, answer.json["code"]) == (status, code), answer.raw[:500]
    assert set(answer.json) >= MEMBERS
    if pointer is not None:
        assert pointer in [error["pointer"] for error in answer.json["errors"]], answer.raw


async def test_a_misspelt_field_is_named_with_the_one_that_was_meant(ada: Person) -> None:
    for send, path, body in (
        (ada.ask, CHAT, {"message": "a", "converzation_id": "b"}),
        (ada.ask, "/api/find_conversation", {"converzation_id": "b"}),
    ):
        answer = await send(path, body)
        error = answer.json["errors"][0]
        assert (error["pointer"], error["code"]) == ("/converzation_id", "unknown_field")
        assert "'conversation_id'" in error["message"]
    assert "fix" in answer.json


async def test_a_body_of_another_type_is_refused(ada: Person) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": content_type}
        for path in (CHAT, "/api/find_conversation"):
            answer = await ada.client.send(
                "POST", path, key=ada.agent_key, raw=b'{"message": "a"}', headers=headers
            )
            assert (answer.status, answer.json["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "path",
    [
        "/api/agents/0/",
        "/api/agents/-1/",
        "/api/agents/x/",
        "/api/agents/99999999999999999999999/",
        "/api/agents/9007199254740992/",
        "/api/agents/%00/",
        "/api/requests/req-x/",
        "/api/requests/%00/",
        "/api/requests/req-%7B550e8400-e29b-41d4-a716-446655440000%7D/",
        "/api/get_answer?request_id=x",
        "/api/get_answer?request_id=req-550e8400-e29b-41d4-a716-446655440000",
        "/nowhere",
    ],
)
async def test_a_name_of_nothing_is_not_found(ada: Person, path: str) -> None:
    answer = await ada.send("GET", path)
    assert answer.status in (404, 400), answer.raw
    assert set(answer.json) >= MEMBERS


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "cursor=x",
        "cursor=%00",
        "cursor=AAAA",
        f"cursor={'A' * 600}",
        "scope=all",
    ],
)
async def test_a_bad_query_is_refused(ada: Person, query: str) -> None:
    answer = await ada.send("GET", f"/api/agents/?{query}")
    assert answer.status == 400, answer.raw


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Idempotency-Key", ""),
        ("Idempotency-Key", '"unclosed'),
        ("Idempotency-Key", "a" * 256),
        ("If-Match", "7"),
        ("Authorization", "Basic abc"),
        ("Authorization", "Bearer"),
        ("Authorization", "Bearer osh_user_x_y"),
    ],
)
async def test_a_bad_header_is_refused(ada: Person, name: str, value: str) -> None:
    headers = {"Authorization": f"Bearer {ada.key}", name: value}
    answer = await ada.client.send("PATCH", f"/api/agents/{ada.agent}/", {"name": "B"}, headers=headers)
    assert answer.status in (400, 401), answer.raw


async def test_errors_come_as_problem_json_for_those_who_ask(ada: Person) -> None:
    answer = await ada.send("GET", "/api/agents/77777/", headers={"Accept": "application/problem+json"})
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["type"] == f"{ada.client.base_url}/problems/not-found"
    plain = await ada.send("GET", "/api/agents/77777/")
    assert plain.headers["Content-Type"] == "application/json"
    assert plain.json["error"] == plain.json["title"]


async def test_head_is_answered_as_get_without_the_body(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/"
    head, get = [await ada.send(method, path) for method in ("HEAD", "GET")]
    assert (head.status, head.raw) == (200, b"")
    assert head.headers["ETag"] == get.headers["ETag"]
    assert (await ada.send("HEAD", "/api/agents/77777/")).status == 404


async def test_the_wrong_method_is_told_the_right_one(client: Client) -> None:
    answer = await client.send("DELETE", CHAT)
    assert (answer.status, answer.headers["Allow"], answer.json["code"]) == (
        405,
        "POST",
        "method_not_allowed",
    )


async def test_numbers_beyond_64_bits_are_refused_wherever_they_stand(ada: Person) -> None:
    body: Any = {"configuration": {"seed": 2**64}}
    answer = await ada.send("PATCH", f"/api/agents/{ada.agent}/", body)
    assert (answer.status, answer.json["code"]) == (400, "malformed_json")


async def test_while_the_log_cannot_be_reached_writers_are_told_to_come_back(ada: Person) -> None:
    ada.platform.log.broken = True
    try:
        answer = await ada.ask(CHAT, {"message": "Hi"})
    finally:
        ada.platform.log.broken = False
    assert (answer.status, answer.json["code"]) == (503, "dependency_unavailable")
    assert answer.headers["Retry-After"] == "1"
    assert (await ada.ask(CHAT, {"message": "Hi"})).status == 200


async def test_what_a_newer_server_has_gone_on_with_waits_and_nothing_else_does(ada: Person) -> None:
    begun = (await ada.ask(CHAT, {"message": "Hi"})).json["conversation_id"]
    conversation_id = UUID(begun.removeprefix("conv-"))
    ada.platform.run(_goes_on_elsewhere(ada.platform, ada.user_id, conversation_id))
    answer = await ada.ask(CHAT, {"message": "Hi", "conversation_id": begun})
    assert (answer.status, answer.json["code"]) == (503, "dependency_unavailable")
    assert "newer version" in answer.json["detail"]
    assert (await ada.ask(CHAT, {"message": "Hi"})).status == 200


async def _goes_on_elsewhere(platform: Platform, user_id: UserId, conversation_id: UUID) -> None:
    """A newer server appends an event of a type that this one does not know."""
    while True:
        conversation = await platform.server.bus.read(Conversation, conversation_id, user_id, LATEST)
        try:
            await happened(platform.log, user_id, conversation_id, conversation.version + 1)
        except HeadMoved:
            continue  # the turn's charge came in between
        return


async def test_a_trace_goes_through_and_a_request_id_comes_back(ada: Person) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-Id": "mine-1"}
    answer = await ada.ask(CHAT, {"message": "Hi"}, headers=headers)
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert trace in answer.headers["traceresponse"]
    error = await ada.ask(CHAT, {}, headers=headers)
    assert error.json["request_id"] == "mine-1"
