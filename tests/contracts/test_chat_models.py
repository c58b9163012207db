"""The contract of `domain.ports.ChatModel`, against every adapter and a peer that speaks its wire."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cache

import boto3
import pytest

from adapters.chat_models.bedrock import Bedrock
from adapters.chat_models.limits import BYTES_PER_TOKEN, TOOL_RAW_CHARS_MAX, TOOL_REQUESTS_MAX
from adapters.chat_models.offline import Offline
from adapters.chat_models.ollama import Ollama
from adapters.chat_models.openai_wire import OpenAIWire
from domain.ports import (
    ChatModel,
    Message,
    ModelErrorClass,
    ModelFault,
    ModelReply,
    ModelRequest,
    TokenUsage,
    ToolRequest,
    ToolSpec,
)
from tests.peers import (
    ANSWER,
    BAD_ARGUMENTS,
    CACHED_TOKENS,
    INPUT_TOKENS,
    NUL_TEXT,
    OUTPUT_TOKENS,
    fake_bedrock,
)
from tests.peers.fake_bedrock import FakeBedrock
from tests.peers.fake_ollama import FakeOllama
from tests.peers.fake_openai import FakeOpenAI

WAIT_S = 5.0
SHORT_S = 0.15
URL_RESOLVER = ToolSpec(
    "url_resolver",
    "Fetch a page.",
    {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
)


@dataclass
class Provider:
    """An adapter, its peer, and the name of a model the peer has."""

    name: str
    model: ChatModel
    peer: FakeOpenAI | FakeOllama | FakeBedrock


@cache
def aws() -> boto3.Session:
    """One session for all tests: it keeps the service descriptions, which take long to read."""
    return fake_bedrock.credentials()


def adapter(name: str, address: str) -> ChatModel:
    match name:
        case "openai":
            return OpenAIWire(address, "sk-secret-of-this-server")
        case "ollama":
            return Ollama(address)
        case _:
            return Bedrock("us-east-1", address, session=aws(), read_timeout_s=1.0)


PEERS: dict[str, type[FakeOpenAI | FakeOllama | FakeBedrock]] = {
    "openai": FakeOpenAI,
    "ollama": FakeOllama,
    "bedrock": FakeBedrock,
}


@pytest.fixture(params=["openai", "ollama", "bedrock"])
async def provider(request: pytest.FixtureRequest) -> AsyncIterator[Provider]:
    async with PEERS[request.param]() as peer:
        model = adapter(request.param, peer.base_url)
        yield Provider(request.param, model, peer)
        await model.close()


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def asking(text: str, **changes: object) -> ModelRequest:
    request = ModelRequest(
        model="some-model",
        system="You are terse.",
        messages=(Message("user", text),),
        tools=(URL_RESOLVER,),
        timeout_s=WAIT_S,
        idempotency_key="turn 1 call 1",
    )
    return replace(request, **changes)  # type: ignore[arg-type]


async def ask(model: ChatModel, request: ModelRequest, streamed: bool) -> tuple[ModelReply, list[str]]:
    pieces: list[str] = []
    return await model.complete(request, pieces.append if streamed else None), pieces


async def fault_of(model: ChatModel, request: ModelRequest, streamed: bool) -> ModelFault:
    with pytest.raises(ModelFault) as raised:
        await ask(model, request, streamed)
    return raised.value


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def test_a_model_answers(provider: Provider):
    reply, _ = await ask(provider.model, asking("Is it so?"), streamed=False)
    assert (reply.text, reply.finish_reason, reply.tool_requests) == (ANSWER, "stop", ())
    assert reply.ttft_ms is None


async def test_a_streamed_answer_is_the_same_text_in_pieces(provider: Provider):
    reply, pieces = await ask(provider.model, asking("Is it so?"), streamed=True)
    assert reply.text == "".join(pieces) == ANSWER
    assert len(pieces) > 2
    assert reply.ttft_ms is not None and reply.ttft_ms >= 0


async def test_a_piece_is_handed_over_before_the_next_one_is_sent(provider: Provider):
    first = asyncio.Event()
    task = asyncio.create_task(provider.model.complete(asking("[[pause]]"), lambda _: first.set()))
    await asyncio.wait_for(first.wait(), WAIT_S)
    assert not task.done()
    provider.peer.resume.set()
    assert (await asyncio.wait_for(task, WAIT_S)).text == ANSWER


async def test_the_provider_counts_the_tokens_and_cached_ones_are_told_apart(
    provider: Provider, streamed: bool
):
    reply, _ = await ask(provider.model, asking("Is it so?"), streamed)
    cached = 0 if provider.name == "ollama" else CACHED_TOKENS
    assert reply.usage == TokenUsage(INPUT_TOKENS, OUTPUT_TOKENS, cache_read=cached)


async def test_tokens_that_were_not_counted_are_estimated_from_bytes(provider: Provider, streamed: bool):
    reply, _ = await ask(provider.model, asking("[[nousage]]", tools=()), streamed)
    assert reply.usage.source == "estimated"
    sent = len("You are terse." + "[[nousage]]")
    assert reply.usage.input == -(-sent // BYTES_PER_TOKEN)
    assert reply.usage.output == -(-len(ANSWER.encode()) // BYTES_PER_TOKEN)


async def test_a_tool_is_asked_for_and_its_result_is_answered(provider: Provider, streamed: bool):
    request = asking('[[tool url_resolver {"url": "example.com", "deep": [[1]]}]]')
    reply, pieces = await ask(provider.model, request, streamed)
    assert (reply.text, reply.finish_reason, pieces) == ("", "tool_calls", [])
    [asked] = reply.tool_requests
    assert asked == ToolRequest(asked.id, "url_resolver", {"url": "example.com", "deep": [[1]]})
    assert asked.id

    history = (
        *request.messages,
        Message("assistant", reply.text, tool_requests=reply.tool_requests),
        Message("tool", "Example Domain", tool_call_id=asked.id),
    )
    answered, _ = await ask(provider.model, replace(request, messages=history), streamed)
    assert answered.text == "The tool said: Example Domain"


async def test_parallel_tool_requests_keep_their_order_and_have_ids_of_their_own(
    provider: Provider, streamed: bool
):
    request = asking('[[tool url_resolver {"url": "a"}]] [[tool url_resolver {"url": "b"}]] [[tool other]]')
    reply, _ = await ask(provider.model, request, streamed)
    assert [asked.arguments for asked in reply.tool_requests] == [{"url": "a"}, {"url": "b"}, {}]
    assert len({asked.id for asked in reply.tool_requests}) == 3
    again, _ = await ask(provider.model, request, streamed)
    assert again.tool_requests == reply.tool_requests


async def test_a_request_for_a_tool_nobody_offered_is_handed_on_as_it_is(provider: Provider, streamed: bool):
    reply, _ = await ask(provider.model, asking("[[tool no.such:tool-" + "x" * 80 + "]]"), streamed)
    assert [asked.name for asked in reply.tool_requests] == ["no.such:tool-" + "x" * 80]


async def test_a_history_with_odd_names_ids_and_arguments_can_be_sent(provider: Provider, streamed: bool):
    odd = ToolRequest("functions.odd:0 ✓", "no.such:tool", None, raw=BAD_ARGUMENTS)
    messages = (
        Message("user", "Hello"),
        Message("assistant", "", tool_requests=(odd,)),
        Message("tool", "", tool_call_id=odd.id),
        Message("user", "Is it so?"),
        Message("user", "Really?"),
    )
    for tools in ((URL_RESOLVER,), ()):
        reply, _ = await ask(provider.model, asking("", messages=messages, tools=tools), streamed)
        assert reply.text == ANSWER


async def test_arguments_that_are_no_json_object_are_kept_raw(provider: Provider, streamed: bool):
    reply, _ = await ask(provider.model, asking("[[badargs url_resolver]]"), streamed)
    [asked] = reply.tool_requests
    assert asked.arguments is None
    assert BAD_ARGUMENTS in asked.raw
    assert len(asked.raw) <= TOOL_RAW_CHARS_MAX


async def test_too_many_tool_requests_are_too_large(provider: Provider, streamed: bool):
    wishes = "[[tool url_resolver]]" * (TOOL_REQUESTS_MAX + 1)
    fault = await fault_of(provider.model, asking(wishes), streamed)
    assert fault.error_class is ModelErrorClass.TOO_LARGE


async def test_a_nul_character_is_replaced(provider: Provider, streamed: bool):
    reply, pieces = await ask(provider.model, asking("[[nul]]"), streamed)
    assert reply.text == NUL_TEXT.replace("\x00", "\ufffd")
    assert not any("\x00" in piece for piece in pieces)


async def test_a_reply_cut_by_the_token_limit_says_so(provider: Provider, streamed: bool):
    reply, _ = await ask(provider.model, asking("[[length]]", max_output_tokens=3), streamed)
    assert reply.finish_reason == "length"


async def test_a_filtered_reply_says_so(provider: Provider, streamed: bool):
    reply, _ = await ask(provider.model, asking("[[filter]]"), streamed)
    assert reply.finish_reason == ("stop" if provider.name == "ollama" else "content_filter")


@pytest.mark.parametrize(
    ("directive", "error_class"),
    [
        ("[[429 1]]", ModelErrorClass.RATE_LIMITED),
        ("[[500]]", ModelErrorClass.OVERLOADED),
        ("[[status 503]]", ModelErrorClass.OVERLOADED),
        ("[[status 400]]", ModelErrorClass.REFUSED),
        ("[[context]]", ModelErrorClass.CONTEXT_TOO_LONG),
        ("[[status 401]]", ModelErrorClass.UNAUTHORIZED),
        ("[[status 403]]", ModelErrorClass.UNAUTHORIZED),
        ("[[status 404]]", ModelErrorClass.UNKNOWN_MODEL),
        ("[[garbage]]", ModelErrorClass.GARBAGE),
        ("[[utf8]]", ModelErrorClass.GARBAGE),
        ("[[truncate]]", ModelErrorClass.GARBAGE),
        ("[[reset]]", ModelErrorClass.UNREACHABLE),
        ("[[huge]]", ModelErrorClass.TOO_LARGE),
    ],
)
async def test_what_the_provider_does_wrong_has_a_class(
    provider: Provider, streamed: bool, directive: str, error_class: ModelErrorClass
):
    fault = await fault_of(provider.model, asking(directive), streamed)
    assert fault.error_class is error_class
    assert "sk-secret" not in str(fault)
    assert "terse" not in str(fault)


async def test_the_provider_says_when_to_come_back(provider: Provider, streamed: bool):
    fault = await fault_of(provider.model, asking("[[429 1 7]]"), streamed)
    assert fault.retry_after_s == 7.0
    reply, _ = await ask(provider.model, asking("[[429 1 7]]"), streamed)
    assert reply.text == ANSWER


async def test_a_provider_that_never_answers_is_given_up_in_time(provider: Provider, streamed: bool):
    fault = await asyncio.wait_for(
        fault_of(provider.model, asking("[[hang]]", timeout_s=SHORT_S), streamed), WAIT_S
    )
    assert fault.error_class is ModelErrorClass.TIMEOUT
    await asyncio.wait_for(provider.peer.idle.wait(), WAIT_S)


async def test_a_stream_that_stops_half_way_is_given_up_in_time(provider: Provider):
    pieces: list[str] = []
    with pytest.raises(ModelFault) as raised:
        await provider.model.complete(asking("[[pause]]", timeout_s=SHORT_S), pieces.append)
    assert raised.value.error_class is ModelErrorClass.TIMEOUT
    assert ANSWER.startswith("".join(pieces))


async def test_a_provider_that_is_not_there_is_unreachable_and_has_no_cards(
    provider: Provider, streamed: bool
):
    gone = adapter(provider.name, f"http://127.0.0.1:{free_port()}")
    fault = await fault_of(gone, asking("Is it so?"), streamed)
    assert fault.error_class is ModelErrorClass.UNREACHABLE
    assert list(await gone.cards()) == []
    await gone.close()


async def test_a_cancelled_call_ends_at_once_and_leaves_nothing_running(provider: Provider):
    first = asyncio.Event()
    task = asyncio.create_task(provider.model.complete(asking("[[pause]]"), lambda _: first.set()))
    await asyncio.wait_for(first.wait(), WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, SHORT_S)
    await asyncio.wait_for(provider.peer.idle.wait(), WAIT_S)
    reply, _ = await ask(provider.model, asking("Is it so?"), streamed=False)
    assert reply.text == ANSWER


async def test_many_calls_at_once_each_get_their_own_answer(provider: Provider, streamed: bool):
    calls = (ask(provider.model, asking(f"[[say number {n}]]"), streamed) for n in range(50))
    replies = await asyncio.wait_for(asyncio.gather(*calls), WAIT_S)
    assert [reply.text for reply, _ in replies] == [f"number {n}" for n in range(50)]


async def test_every_card_is_named_after_its_provider_and_only_once(provider: Provider):
    cards = await provider.model.cards()
    assert cards
    assert all(card.name.startswith(f"{provider.name}:") and card.provider == provider.name for card in cards)
    assert len({card.name for card in cards}) == len(cards)


async def test_closing_twice_is_harmless(provider: Provider):
    await ask(provider.model, asking("Is it so?"), streamed=False)
    await provider.model.close()
    await provider.model.close()


async def test_the_offline_model_keeps_the_contract_without_a_peer(streamed: bool):
    model = Offline()
    request = asking('/tool url_resolver {"url": "example.com"}')
    reply, pieces = await ask(model, request, streamed)
    assert (reply.text, reply.finish_reason, pieces) == ("", "tool_calls", [])
    [asked] = reply.tool_requests
    history = (
        *request.messages,
        Message("assistant", "", tool_requests=reply.tool_requests),
        Message("tool", "Example Domain\x00", tool_call_id=asked.id),
    )
    answered, pieces = await ask(model, replace(request, messages=history), streamed)
    assert "Example Domain\ufffd" in answered.text
    assert "".join(pieces) == (answered.text if streamed else "")
    assert answered.usage.source == "estimated" and answered.usage.output > 0
    assert [card.name for card in await model.cards()] == ["offline:offline"]
    await model.close()
