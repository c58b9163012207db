"""What only the OpenAI wire has: addresses, headers, cards, and the ways in which upstreams differ."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
import pytest

from adapters.chat_models.limits import retry_after_s
from adapters.chat_models.openai_wire import OpenAIWire
from domain.ports import (
    Message,
    ModelCard,
    ModelErrorClass,
    ModelFault,
    ModelReply,
    ModelRequest,
    ToolRequest,
    ToolSpec,
)
from tests.peers import ANSWER
from tests.peers.fake_openai import FakeOpenAI

WAIT_S = 10.0
KEY = "my-own-key-0123456789-0123456789"
REQUEST = ModelRequest("some-model", "Be terse.", (Message("user", "Is it so?"),), timeout_s=WAIT_S)


async def answer_with(
    body: bytes, *, streamed: bool = False, status: int = 200, prompt: str = "Is it so?"
) -> ModelReply:
    """Ask an upstream that answers everything with `body`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        kind = b"text/event-stream" if streamed else b"application/json"
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (status, kind, len(body))
            + body
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    model = OpenAIWire(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", KEY)
    try:
        request = replace(REQUEST, messages=(Message("user", prompt),))
        return await model.complete(request, (lambda _: None) if streamed else None)
    finally:
        await model.close()
        server.close()


def events(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)


def delta(**content: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content}]}


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_the_address_may_end_with_v1_or_not(suffix: str):
    async with FakeOpenAI() as peer:
        model = OpenAIWire(peer.base_url + suffix)
        assert (await model.complete(REQUEST)).text == ANSWER
        assert peer.total == 1
        await model.close()


def test_an_address_that_is_none_is_refused_without_showing_a_password():
    with pytest.raises(ValueError, match="not an http") as refused:
        OpenAIWire("ftp://user:hunter2@example.com/v1")
    assert "hunter2" not in str(refused.value)


async def test_the_key_and_the_idempotency_key_are_sent_as_headers():
    async with FakeOpenAI() as peer:
        model = OpenAIWire(peer.base_url, KEY)
        await model.complete(replace(REQUEST, idempotency_key="turn 7 call 1"))
        headers, _ = peer.received[-1]
        assert headers["authorization"] == f"Bearer {KEY}"
        assert headers["idempotency-key"] == "turn 7 call 1"
        assert peer.by_key == {"turn 7 call 1": 1}
        await model.close()


async def test_a_request_has_the_form_of_the_api():
    spec = ToolSpec("clock", "Tell the time.", {"type": "object", "properties": {}})
    asked = ToolRequest("call_9", "clock", {"zone": "UTC"})
    messages = (
        Message("user", "What time is it?"),
        Message("assistant", "", tool_requests=(asked,)),
        Message("tool", "noon", tool_call_id="call_9"),
    )
    async with FakeOpenAI() as peer:
        model = OpenAIWire(peer.base_url)
        request = replace(REQUEST, messages=messages, tools=(spec,), max_output_tokens=9, temperature=0.5)
        await model.complete(request, lambda _: None)
        assert peer.requests == [
            {
                "model": "some-model",
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": 9,
                "temperature": 0.5,
                "messages": [
                    {"role": "system", "content": "Be terse."},
                    {"role": "user", "content": "What time is it?"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "call_9",
                                "type": "function",
                                "function": {"name": "clock", "arguments": '{"zone":"UTC"}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "call_9", "content": "noon"},
                ],
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "clock",
                            "description": "Tell the time.",
                            "parameters": {"type": "object", "properties": {}},
                        },
                    }
                ],
            }
        ]
        await model.close()


async def test_models_that_cannot_chat_have_no_card():
    async with FakeOpenAI() as peer:
        model = OpenAIWire(peer.base_url)
        assert list(await model.cards()) == [
            ModelCard(
                name="openai:fake-model",
                provider="openai",
                display_name="fake-model",
                tools=True,
                vision=False,
                context_tokens=8192,
                price_class="local",
            )
        ]
        await model.close()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25),
        ({"Date": "Sun, 06 Nov 1994 08:49:37 GMT", "Retry-After": "Sun, 06 Nov 1994 08:49:57 GMT"}, 20.0),
        ({"Date": "Sun, 06 Nov 1994 08:49:37 GMT", "Retry-After": "Sun, 06 Nov 1994 08:49:07 GMT"}, 0.0),
        ({"Retry-After": "999999999"}, 3_600.0),
        ({"Retry-After": "soon"}, None),
        ({"retry-after-ms": "nan"}, None),
        ({}, None),
    ],
)
def test_when_to_come_back_is_read_in_every_form(headers: dict[str, str], seconds: float | None):
    assert retry_after_s(headers) == seconds


async def test_a_streamed_tool_request_without_indexes_is_put_together():
    call_a = {"id": "a", "function": {"name": "first", "arguments": '{"n":'}}
    call_b = {"id": "b", "function": {"name": "second", "arguments": "{}"}}
    rest_a = {"function": {"arguments": " 1}"}}
    reply = await answer_with(
        events(
            delta(tool_calls=[call_a]),
            delta(tool_calls=[rest_a]),
            delta(tool_calls=[call_b]),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        ),
        streamed=True,
    )
    assert reply.tool_requests == (ToolRequest("a", "first", {"n": 1}), ToolRequest("b", "second", {}))
    assert reply.finish_reason == "tool_calls"


async def test_tool_requests_without_ids_get_ids_that_are_the_same_on_every_attempt():
    calls = [{"function": {"name": "clock", "arguments": "{}"}}] * 2
    body = orjson.dumps({"choices": [{"message": {"content": None, "tool_calls": calls}}]})
    first, second = await answer_with(body), await answer_with(body)
    assert len({asked.id for asked in first.tool_requests}) == 2
    assert first.tool_requests == second.tool_requests


async def test_a_refusal_is_text_that_was_filtered():
    reply = await answer_with(
        orjson.dumps({"choices": [{"message": {"content": None, "refusal": "I will not."}}]})
    )
    assert (reply.text, reply.finish_reason) == ("I will not.", "content_filter")


async def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "so."}]
    assert (
        await answer_with(orjson.dumps({"choices": [{"message": {"content": parts}}]}))
    ).text == "It is so."


async def test_comments_and_blank_lines_in_a_stream_are_skipped():
    body = b": keep-alive\r\n\r\nevent: message\r\n" + events(delta(content="It is so."))
    reply = await answer_with(body + b"data:[DONE]\r\n\r\n", streamed=True)
    assert reply.text == "It is so."


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        ({"code": "rate_limit_exceeded", "message": "slow down"}, ModelErrorClass.RATE_LIMITED),
        ({"code": 429, "message": "slow down"}, ModelErrorClass.RATE_LIMITED),
        ({"code": "insufficient_quota", "message": "no money left"}, ModelErrorClass.REFUSED),
        ({"type": "server_error", "message": "oops"}, ModelErrorClass.OVERLOADED),
        ({"code": "context_length_exceeded", "message": "too much"}, ModelErrorClass.CONTEXT_TOO_LONG),
        ("it broke", ModelErrorClass.OVERLOADED),
    ],
)
async def test_an_error_inside_a_good_answer_is_an_error(error: object, error_class: ModelErrorClass):
    for streamed in (False, True):
        body = events(delta(content="It"), {"error": error}) if streamed else orjson.dumps({"error": error})
        with pytest.raises(ModelFault) as raised:
            await answer_with(body, streamed=streamed)
        assert raised.value.error_class is error_class


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": "many"}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"function": {}}]}}]}',
        b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b"[" * 100_000,
    ],
)
async def test_what_is_not_a_completion_is_garbage(body: bytes):
    with pytest.raises(ModelFault) as raised:
        await answer_with(body)
    assert raised.value.error_class is ModelErrorClass.GARBAGE


async def test_a_fault_shows_neither_keys_nor_the_prompt():
    for message in (
        f"Incorrect API key provided: {KEY}.",
        "Bad key sk-abcdefghijkl",
        "Bearer abc.def is wrong",
    ):
        with pytest.raises(ModelFault) as raised:
            await answer_with(orjson.dumps({"error": {"message": message}}), status=401)
        said = str(raised.value)
        assert raised.value.error_class is ModelErrorClass.UNAUTHORIZED
        assert not any(secret in said for secret in (KEY, "abcdefghijkl", "abc.def"))


async def test_a_providers_message_that_repeats_the_prompt_is_left_out():
    secret = "the merger will be announced on friday morning"

    body = orjson.dumps({"error": {"message": f"cannot process: {secret}"}})
    for prompt, shown in (("Is it so?", True), (f"Know that {secret}.", False)):
        with pytest.raises(ModelFault) as raised:
            await answer_with(body, status=400, prompt=prompt)
        assert ("merger" in str(raised.value)) is shown


async def test_an_endless_stream_of_text_is_cut_at_the_limit():
    body = events(*[delta(content="x" * 100_000)] * 11)
    with pytest.raises(ModelFault) as raised:
        await answer_with(body, streamed=True)
    assert raised.value.error_class is ModelErrorClass.TOO_LARGE


async def test_one_connection_serves_calls_one_after_another():
    async with FakeOpenAI() as peer:
        model = OpenAIWire(peer.base_url)
        for on_text in (None, lambda _: None, None):
            await model.complete(REQUEST, on_text)
        assert len(peer.connections) == 1
        await model.close()


async def test_the_peer_runs_as_a_program_and_counts(tmp_path):
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"weather": "It rains.", "clock": '[[tool clock {"zone": "UTC"}]]'}))
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "tests.peers.fake_openai",
            "--port",
            "0",
            "--delay-ms",
            "1",
            "--script",
            str(script),
        ),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        address = (await asyncio.wait_for(process.stdout.readline(), WAIT_S)).decode().strip()
        model = OpenAIWire(address)
        for text, answer in (("How is the weather?", "It rains."), ("Is it so?", ANSWER)):
            request = replace(REQUEST, messages=(Message("user", text),), idempotency_key=text)
            assert (await model.complete(request)).text == answer
            assert (await model.complete(request, lambda _: None)).text == answer
        asked = await model.complete(replace(REQUEST, messages=(Message("user", "Read the clock"),)))
        assert [tool.name for tool in asked.tool_requests] == ["clock"]
        await model.close()
        async with aiohttp.ClientSession() as session, session.get(f"{address}/__count") as counted:
            assert await counted.json(content_type=None) == {
                "total": 5,
                "by_key": {"How is the weather?": 2, "Is it so?": 2},
            }
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), WAIT_S)
