"""What only Bedrock has: its stop reasons, frames with exceptions, catalogue, credentials and threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache

import boto3
import pytest

from adapters.chat_models.bedrock import Bedrock, find_bedrock
from domain.ports import (
    FinishReason,
    Message,
    ModelErrorClass,
    ModelFault,
    ModelRequest,
    ToolRequest,
    ToolSpec,
)
from tests.peers import ANSWER
from tests.peers.fake_bedrock import MODEL, PROFILE, FakeBedrock, credentials

WAIT_S = 5.0
REQUEST = ModelRequest(MODEL, "Be terse.", (Message("user", "Is it so?"),), timeout_s=WAIT_S)
CLOCK = ToolSpec("clock", "", {"type": "object", "properties": {}})


@cache
def aws() -> boto3.Session:
    """One session for all tests: it keeps the service descriptions, which take long to read."""
    return credentials()


@pytest.fixture
async def peer() -> AsyncIterator[FakeBedrock]:
    async with FakeBedrock() as server:
        yield server


@pytest.fixture
async def model(peer: FakeBedrock) -> AsyncIterator[Bedrock]:
    bedrock = Bedrock("us-east-1", peer.base_url, session=aws(), threads=4, read_timeout_s=1.0)
    yield bedrock
    await bedrock.close()


def nothing(_: str) -> None:
    """Take a piece of a streamed reply."""


@pytest.mark.parametrize("on_text", [None, nothing])
@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
        ("tool_use", "stop"),
        ("a_reason_of_the_future", "stop"),
    ],
)
async def test_every_stop_reason_has_a_meaning(
    peer, model, on_text, stop_reason: str, finish_reason: FinishReason
):
    peer.stop_reason = stop_reason
    assert (await model.complete(REQUEST, on_text)).finish_reason == finish_reason


async def test_malformed_output_is_garbage(peer, model):
    peer.stop_reason = "malformed_tool_use"
    with pytest.raises(ModelFault) as raised:
        await model.complete(REQUEST)
    assert raised.value.error_class is ModelErrorClass.GARBAGE


@pytest.mark.parametrize(
    ("exception", "error_class"),
    [
        ("throttlingException", ModelErrorClass.RATE_LIMITED),
        ("internalServerException", ModelErrorClass.OVERLOADED),
        ("serviceUnavailableException", ModelErrorClass.OVERLOADED),
        ("modelStreamErrorException", ModelErrorClass.OVERLOADED),
        ("validationException", ModelErrorClass.REFUSED),
    ],
)
async def test_an_exception_in_the_middle_of_a_stream_has_a_class(
    peer, model, exception: str, error_class: ModelErrorClass
):
    peer.exception_frame = exception
    pieces: list[str] = []
    with pytest.raises(ModelFault, match="slow down") as raised:
        await model.complete(REQUEST, pieces.append)
    assert raised.value.error_class is error_class
    assert ANSWER.startswith("".join(pieces)) and pieces


async def test_cards_are_text_models_in_use_and_profiles_the_default_first(model):
    cards = await model.cards()
    assert [(card.name, card.tools, card.vision) for card in cards] == [
        (f"bedrock:{MODEL}", True, True),
        ("bedrock:amazon.titan-text-express-v1", False, False),
        (f"bedrock:{PROFILE}", True, True),
    ]
    assert {card.price_class for card in cards} == {"paid"}


async def test_a_request_has_the_form_of_the_api(peer, model):
    asked = (ToolRequest("call_1", "clock", {"zone": "UTC"}), ToolRequest("call_2", "clock", {}))
    messages = (
        Message("user", "What time"),
        Message("user", "is it?"),
        Message("assistant", "", tool_requests=asked),
        Message("tool", "noon", tool_call_id="call_1"),
        Message("tool", " ", tool_call_id="call_2"),
    )
    request = replace(REQUEST, messages=messages, tools=(CLOCK,), max_output_tokens=9, temperature=0.5)
    await model.complete(request)
    assert peer.requests == [
        {
            "modelId": MODEL,
            "system": [{"text": "Be terse."}, {"cachePoint": {"type": "default"}}],
            "inferenceConfig": {"maxTokens": 9, "temperature": 0.5},
            "messages": [
                {"role": "user", "content": [{"text": "What time"}, {"text": "is it?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"toolUse": {"toolUseId": "call_1", "name": "clock", "input": {"zone": "UTC"}}},
                        {"toolUse": {"toolUseId": "call_2", "name": "clock", "input": {}}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"toolResult": {"toolUseId": "call_1", "content": [{"text": "noon"}]}},
                        {"toolResult": {"toolUseId": "call_2", "content": [{"text": "(empty)"}]}},
                    ],
                },
            ],
            "toolConfig": {
                "tools": [
                    {
                        "toolSpec": {
                            "name": "clock",
                            "description": "clock",
                            "inputSchema": {"json": {"type": "object", "properties": {}}},
                        }
                    }
                ]
            },
        }
    ]


async def test_a_model_that_does_not_know_caching_is_not_asked_for_it(peer, model):
    await model.complete(replace(REQUEST, model="meta.llama3-1-8b-instruct-v1:0"))
    assert peer.requests[-1]["system"] == [{"text": "Be terse."}]


async def test_waiting_for_bedrock_does_not_hold_the_loop(peer, model):
    waiting = asyncio.create_task(
        model.complete(replace(REQUEST, messages=(Message("user", "[[pause]]"),)), nothing)
    )
    assert (await model.complete(REQUEST)).text == ANSWER
    assert not waiting.done()
    peer.resume.set()
    assert (await asyncio.wait_for(waiting, WAIT_S)).text == ANSWER


async def test_calls_beyond_the_threads_wait_no_longer_than_their_time(peer, model):
    hang = replace(REQUEST, messages=(Message("user", "[[hang]]"),), timeout_s=0.2)
    faults = await asyncio.gather(*(model.complete(hang) for _ in range(12)), return_exceptions=True)
    assert {getattr(fault, "error_class", fault) for fault in faults} == {ModelErrorClass.TIMEOUT}
    # The calls that never got a thread were never sent.
    assert len(peer.requests) <= 4


async def test_without_region_or_credentials_there_is_no_bedrock(monkeypatch, tmp_path):
    for name in (
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert await find_bedrock() is None
    assert await find_bedrock("us-east-1") is None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "peer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "peer")
    assert await find_bedrock() is None
    found = await find_bedrock("us-east-1")
    assert found is not None
    await found.close()
