"""Names, numbers and the default model, over providers that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.chat_models.offline import Offline
from adapters.chat_models.openai_wire import OpenAIWire
from adapters.chat_models.registry import DEFAULT_ID, ModelRegistry, model_number, numbered
from domain.ports import ChatModel, Message, ModelCard, ModelErrorClass, ModelFault, ModelReply, ModelRequest
from tests.peers import ANSWER
from tests.peers.fake_openai import FakeOpenAI

WAIT_S = 5.0
REQUEST = ModelRequest("", "", (Message("user", "Is it so?"),), timeout_s=WAIT_S)


def card(name: str, tools: bool = True) -> ModelCard:
    return ModelCard(
        name, name.partition(":")[0], name, tools, vision=False, context_tokens=None, price_class="local"
    )


class Listed:
    """A provider that lists the cards it was given and answers with the model's name."""

    def __init__(self, provider: str, *cards: ModelCard) -> None:
        self.provider = provider
        self.offered: Sequence[ModelCard] = cards
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def cards(self) -> Sequence[ModelCard]:
        self.asked += 1
        await self.gate.wait()
        return self.offered

    async def complete(
        self, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        return ModelReply(f"{self.provider} {request.model}")

    async def close(self) -> None:
        self.gate.set()


async def cards_become(registry: ModelRegistry, cards: Sequence[ModelCard]) -> None:
    async with asyncio.timeout(WAIT_S):
        while await registry.cards() != cards:  # noqa: ASYNC110 - each look is what starts the next refresh.
            await asyncio.sleep(0)


async def default_of(*providers: ChatModel, default: str | None = None) -> str | None:
    registry = ModelRegistry(providers, default)
    found = await registry.resolve(DEFAULT_ID)
    await registry.close()
    return found.name if found else None


def test_the_number_of_a_name_is_stable_and_the_default_is_one():
    assert model_number("default") == 1
    assert model_number("offline:offline") == 1_000 + crc32(b"offline:offline") % (0x7FFF_FFFF - 999)


@given(st.sets(st.text(min_size=1, max_size=20), max_size=50))
def test_every_name_has_a_number_of_its_own_whatever_the_order(names: set[str]):
    numbers = numbered(names - {"default"})
    assert sorted(numbers.values()) == sorted(names - {"default"})
    assert all(1_000 <= number <= 0x7FFF_FFFF for number in numbers)
    assert numbers == numbered(sorted(names - {"default"}, reverse=True))


def test_of_two_names_with_one_number_the_first_by_name_keeps_it():
    # A pair found by search.
    first, second = "m:199688", "m:347810"
    numbers = numbered([second, first])
    assert numbers == {model_number(first): first, model_number(first) + 1: second}


async def test_the_default_is_the_first_provider_that_answers_with_tools_before_none():
    bedrock, ollama = Listed("bedrock"), Listed("ollama", card("ollama:a", tools=False), card("ollama:b"))
    assert await default_of(Offline(), ollama, bedrock) == "ollama:b"
    assert await default_of(Listed("ollama", card("ollama:a", tools=False)), Offline()) == "ollama:a"
    assert await default_of(Offline(), Listed("openai"), ollama, bedrock) == "ollama:b"
    assert await default_of(ollama, Listed("openai", card("openai:x"))) == "openai:x"
    assert await default_of(Listed("ollama"), Offline()) == "offline:offline"
    assert await default_of() is None


async def test_a_configured_default_holds_even_while_its_provider_is_away():
    assert await default_of(Listed("ollama"), Offline(), default="ollama:llama3:8b") == "ollama:llama3:8b"
    assert await default_of(Listed("ollama", card("ollama:b")), default="ollama:b") == "ollama:b"
    assert await default_of(Offline(), default="nobody:here") is None


async def test_a_model_is_found_by_its_number_also_after_it_went_away():
    ollama = Listed("ollama", card("ollama:a"))
    registry = ModelRegistry([ollama], ttl_s=0.0)
    number = model_number("ollama:a")
    assert await registry.number("ollama:a") == number
    assert await registry.resolve(number) == card("ollama:a")
    ollama.offered = ()
    await cards_become(registry, ())
    assert await registry.resolve(number) == card("ollama:a")
    assert await registry.resolve(12) is None
    await registry.close()


async def test_fresh_cards_are_not_asked_for_again():
    ollama = Listed("ollama", card("ollama:a"))
    registry = ModelRegistry([ollama])
    await asyncio.gather(*(registry.resolve(DEFAULT_ID) for _ in range(100)))
    await registry.cards()
    assert ollama.asked == 1
    await registry.close()


async def test_old_cards_serve_while_new_ones_are_fetched():
    ollama = Listed("ollama", card("ollama:a"))
    registry = ModelRegistry([ollama], ttl_s=0.0)
    await registry.cards()
    ollama.gate.clear()
    ollama.offered = (card("ollama:b"),)
    for _ in range(3):
        assert await asyncio.wait_for(registry.cards(), WAIT_S) == (card("ollama:a"),)
        await asyncio.sleep(0)
    assert ollama.asked == 2
    ollama.gate.set()
    await cards_become(registry, (card("ollama:b"),))
    await registry.close()


async def test_a_provider_that_hangs_does_not_keep_the_others_away():
    hung = Listed("bedrock", card("bedrock:a"))
    hung.gate.clear()
    registry = ModelRegistry([hung, Offline()])
    found = await asyncio.wait_for(registry.resolve(DEFAULT_ID), WAIT_S)
    assert found is not None and found.name == "offline:offline"
    await registry.close()


async def test_a_name_is_answered_by_its_provider():
    registry = ModelRegistry([Listed("ollama", card("ollama:llama3:8b")), Offline()])
    assert (await registry.complete("ollama:llama3:8b", REQUEST)).text == "ollama llama3:8b"
    assert (await registry.complete("default", REQUEST)).text == "ollama llama3:8b"
    for name in ("nobody:here", "ollama", "ollama:", "", "gpt-4"):
        with pytest.raises(ModelFault) as raised:
            await registry.complete(name, REQUEST)
        assert raised.value.error_class is ModelErrorClass.UNKNOWN_MODEL
    await registry.close()


async def test_a_real_upstream_becomes_the_default():
    async with FakeOpenAI() as peer:
        registry = ModelRegistry([OpenAIWire(peer.base_url), Offline()])
        found = await registry.resolve(DEFAULT_ID)
        assert found is not None
        assert (await registry.complete(found.name, REQUEST)).text == ANSWER
        await registry.close()
