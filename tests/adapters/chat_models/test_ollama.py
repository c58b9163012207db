"""What only Ollama has: its address, what it shows of a model, and a context that it cuts without a word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.chat_models.ollama import NUM_CTX, Ollama, _base_of
from domain.ports import Message, ModelErrorClass, ModelFault, ModelRequest, ToolRequest
from tests.peers import ANSWER
from tests.peers.fake_ollama import CONTEXT_TOKENS, MODEL, FakeOllama

REQUEST = ModelRequest(MODEL, "Be terse.", (Message("user", "Is it so?"),), idempotency_key="turn 1 call 1")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("gpu.example:5000", "http://gpu.example:5000"),
        ("0.0.0.0:11434", "http://127.0.0.1:11434"),
        ("http://gpu.example/", "http://gpu.example"),
        ("https://gpu.example/ollama", "https://gpu.example/ollama"),
    ],
)
def test_the_address_is_read_as_ollama_reads_it(host: str, address: str):
    assert str(_base_of(host)).rstrip("/") == address


async def test_cards_tell_what_each_model_can_and_each_is_looked_at_once():
    async with FakeOllama() as peer:
        model = Ollama(peer.base_url)
        cards = await model.cards()
        assert [(card.name, card.tools, card.vision, card.context_tokens) for card in cards] == [
            (f"ollama:{MODEL}", True, False, CONTEXT_TOKENS),
            ("ollama:fake-eyes:latest", False, True, NUM_CTX),
        ]
        assert {card.price_class for card in cards} == {"local"}
        assert await model.cards() == cards
        assert set(peer.shows.values()) == {1}
        await model.close()


async def test_a_request_has_the_form_of_the_api():
    asked = ToolRequest("call_9", "clock", {"zone": "UTC"})
    messages = (
        Message("user", "What time is it?"),
        Message("assistant", "Let me look.", tool_requests=(asked,)),
        Message("tool", "noon", tool_call_id="call_9"),
    )
    async with FakeOllama() as peer:
        model = Ollama(peer.base_url)
        await model.cards()
        await model.complete(replace(REQUEST, messages=messages, max_output_tokens=9, temperature=0.5))
        assert peer.requests == [
            {
                "model": MODEL,
                "stream": False,
                "options": {"num_ctx": CONTEXT_TOKENS, "num_predict": 9, "temperature": 0.5},
                "messages": [
                    {"role": "system", "content": "Be terse."},
                    {"role": "user", "content": "What time is it?"},
                    {
                        "role": "assistant",
                        "content": "Let me look.",
                        "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}],
                    },
                    {"role": "tool", "content": "noon", "tool_name": "clock"},
                ],
            }
        ]
        await model.close()


async def test_a_prompt_that_ollama_would_cut_is_not_sent():
    async with FakeOllama() as peer:
        model = Ollama(peer.base_url)
        with pytest.raises(ModelFault) as raised:
            await model.complete(replace(REQUEST, system="x" * (4 * NUM_CTX + 1)))
        assert raised.value.error_class is ModelErrorClass.CONTEXT_TOO_LONG
        assert peer.requests == []
        assert (await model.complete(REQUEST)).text == ANSWER
        await model.close()


async def test_tool_requests_get_ids_that_follow_from_the_idempotency_key():
    async with FakeOllama() as peer:
        model = Ollama(peer.base_url)
        asking = replace(REQUEST, messages=(Message("user", "[[loop clock]] [[loop clock]]"),))
        first = await model.complete(asking)
        again = await model.complete(asking)
        other = await model.complete(replace(asking, idempotency_key="turn 1 call 2"))
        ids = [tuple(asked.id for asked in reply.tool_requests) for reply in (first, again, other)]
        assert ids[0] == ids[1]
        assert len({*ids[0], *ids[2]}) == 4
        await model.close()
