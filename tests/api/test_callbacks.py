"""Callers' own servers are told when a request has ended."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from stream_processors.notifications import signature
from tests.api.client import Client, Person
from tests.peers.web import Seen, WebPeer, web_peer

PATIENCE_S = 10.0


@pytest.fixture
async def receiver() -> AsyncIterator[WebPeer]:
    """The caller's own server."""
    async with web_peer() as peer:
        yield peer


def answers(receiver: WebPeer, *statuses: int, **headers: str) -> None:
    """Answer with one status after the other; the last one stays."""
    left = list(statuses)

    async def answer(_: web.Request) -> web.Response:
        status = left.pop(0) if len(left) > 1 else left[0]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, headers=named)

    receiver.answers["/done"] = answer


async def request_with(ada: Person, receiver: WebPeer, message: str = "Hello?") -> str:
    body = {"message": message, "callback_url": receiver.url("/done?token=1")}
    accepted = await ada.ask("/api/create_conversation", body)
    assert accepted.status == 202, accepted.raw
    return str(accepted.json["request_id"])


async def callback(ada: Person, request_id: str, *wanted: str) -> Any:
    """The callback of a request once it has one of these statuses."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            path = f"/api/get_answer?request_id={request_id}&wait=1"
            answer = await ada.client.send("GET", path, key=ada.agent_key)
            if answer.json["callback"]["status"] in wanted:
                return answer.json["callback"]
            await asyncio.sleep(0.02)


async def secret_of(ada: Person) -> bytes:
    answer = await ada.client.send("GET", "/api/webhook-secret", key=ada.agent_key)
    return b64decode(answer.data["secret"].removeprefix("whsec_"))


def is_signed(seen: Seen, secret: bytes) -> bool:
    """As Standard Webhooks say, without our own code."""
    headers = seen.headers
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + seen.body
    expected = b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    return headers["webhook-signature"] == f"v1,{expected}"


def test_the_signature_is_the_one_of_the_specification() -> None:
    secret = b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    assert signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


async def test_the_end_is_told_with_the_answer_and_a_signature(ada: Person, receiver: WebPeer) -> None:
    answers(receiver, 204)
    request_id = await request_with(ada, receiver)
    told = await callback(ada, request_id, "delivered")
    assert told == {"status": "delivered", "attempts": 1, "next_attempt_at": None, "reason": None}
    (seen,) = receiver.seen
    assert (seen.method, seen.path, seen.headers["content-type"]) == (
        "POST",
        "/done?token=1",
        "application/json",
    )
    assert is_signed(seen, await secret_of(ada))
    message = json.loads(seen.body)
    polled = await ada.client.send("GET", f"/api/get_answer?request_id={request_id}", key=ada.agent_key)
    assert message["type"] == "request.completed"
    assert message["data"] == {key: value for key, value in polled.json.items() if key != "callback"}
    assert message["data"]["response"] == "You said: Hello?"
    one = await ada.client.send("GET", f"/api/requests/{request_id}", key=ada.agent_key)
    assert one.data["callback"]["status"] == "delivered"
    listed = await ada.client.send("GET", "/api/requests/", key=ada.agent_key)
    assert listed.data[0]["callback"] == {"status": "delivered", "attempts": 1}


async def test_a_failure_is_told_too(ada: Person, receiver: WebPeer) -> None:
    answers(receiver, 200)
    request_id = await request_with(ada, receiver, "[[fail refused]]")
    await callback(ada, request_id, "delivered")
    message = json.loads(receiver.seen[0].body)
    assert message["type"] == "request.failed"
    assert message["data"]["error_message"] == "The scripted model will not."


async def test_a_receiver_that_fails_is_told_again_under_the_same_id(ada: Person, receiver: WebPeer) -> None:
    answers(receiver, 503, 301, 200, retry_after="0", location="/elsewhere")
    told = await callback(ada, await request_with(ada, receiver), "delivered")
    assert told["attempts"] == 3
    assert len({seen.headers["webhook-id"] for seen in receiver.seen}) == 1
    assert len({seen.body for seen in receiver.seen}) == 1
    assert {seen.path for seen in receiver.seen} == {"/done?token=1"}, "redirects are not followed"


async def test_a_receiver_that_is_down_is_told_later(ada: Person, receiver: WebPeer) -> None:
    body = {"message": "Hello?", "callback_url": "http://127.0.0.1:1/done"}
    accepted = await ada.ask("/api/create_conversation", body)
    async with asyncio.timeout(PATIENCE_S):
        told: Any = {"reason": None}
        while told["reason"] is None:
            told = await callback(ada, accepted.json["request_id"], "pending", "waiting")
    assert (told["reason"], told["attempts"]) == ("unreachable", 1)
    assert told["next_attempt_at"] is not None


async def test_a_receiver_that_never_confirms_is_given_up(ada: Person, receiver: WebPeer) -> None:
    answers(receiver, 500, retry_after="0")
    told = await callback(ada, await request_with(ada, receiver), "failed")
    assert (told["attempts"], told["reason"]) == (9, "http_500")
    assert len(receiver.seen) == 9


async def test_a_receiver_that_is_gone_is_not_told_again(ada: Person, receiver: WebPeer) -> None:
    answers(receiver, 410)
    told = await callback(ada, await request_with(ada, receiver), "failed")
    assert (told["attempts"], len(receiver.seen)) == (1, 1)


async def test_private_addresses_are_not_told_anything(ada: Person) -> None:
    body = {"message": "Hello?", "callback_url": "http://10.0.0.1/done"}
    accepted = await ada.ask("/api/create_conversation", body)
    async with asyncio.timeout(PATIENCE_S):
        told: Any = {"reason": None}
        while told["reason"] is None:
            told = await callback(ada, accepted.json["request_id"], "pending", "waiting")
    assert told["reason"] == "unreachable"


async def test_a_url_that_is_none_is_refused_by_name(ada: Person) -> None:
    for url in ("ftp://example.com", "https://user@example.com/", "", 7, "x" * 3_000):
        answer = await ada.ask("/api/create_conversation", {"message": "x", "callback_url": url})
        assert answer.status == 400, url
        assert answer.json["errors"][0]["pointer"] == "/callback_url"
    assert (await ada.ask("/api/v1/chat", {"message": "x", "callback_url": "https://e.org"})).status == 400


async def test_each_key_has_a_secret_of_its_own(ada: Person, bob: Person, client: Client) -> None:
    assert await secret_of(ada) == await secret_of(ada) != await secret_of(bob)
    assert len(await secret_of(ada)) == 32
    made = await ada.send("POST", f"/api/agents/{ada.agent}/api-keys/", {"name": "second"})
    shown = await client.send("GET", "/api/webhook-secret", key=made.data["key"])
    assert made.data["webhook_secret"] == shown.data["secret"]
    assert (await ada.send("GET", "/api/webhook-secret")).status == 403
