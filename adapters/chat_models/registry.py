"""All chat models of this server under one roof: which there are, which is the default, and who answers for a name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from zlib import crc32

from adapters.chat_models.limits import CARDS_TIMEOUT_S, PriceClass
from domain.ports import ChatModel, ModelCard, ModelErrorClass, ModelFault, ModelReply, ModelRequest

CARDS_TTL_S = 10.0
DEFAULT_NAME = "default"
DEFAULT_ID = 1
FIRST_ID = 1_000
LAST_ID = 0x7FFF_FFFF
DEFAULT_ORDER = ("bedrock", "openai", "ollama", "offline")
_PRICES: dict[str, PriceClass] = {"offline": "free", "ollama": "local"}


def model_number(name: str) -> int:
    """The `model_id` of a name: 1 for the default, else a number of 31 bits from `FIRST_ID` up that follows from the name.

    Two names may share a number; `numbered` tells them apart.
    """
    if name == DEFAULT_NAME:
        return DEFAULT_ID
    return FIRST_ID + crc32(name.encode()) % (LAST_ID - FIRST_ID + 1)


def numbered(names: Iterable[str]) -> dict[int, str]:
    """Each name by its number. Of two with the same number the first by name keeps it, the other takes the next free."""
    numbers: dict[int, str] = {}
    for name in sorted(set(names)):
        number = model_number(name)
        while number in numbers:
            number = number + 1 if number < LAST_ID else FIRST_ID
        numbers[number] = name
    return numbers


class ModelRegistry:
    """Routes `provider:model` to its adapter. `default` is the name the operator chose, if any.

    What the providers offer is asked for at first use and kept for `CARDS_TTL_S`; after that the old answer still
    serves while a new one is fetched, so that nobody waits for a provider that is slow or gone.
    """

    def __init__(
        self, providers: Sequence[ChatModel], default: str | None = None, *, ttl_s: float = CARDS_TTL_S
    ) -> None:
        self._providers = {provider.provider: provider for provider in providers}
        self._default_name = default
        self._ttl_s = ttl_s
        self._cards: tuple[ModelCard, ...] = ()
        self._default: ModelCard | None = None
        # A model that was seen once keeps its number while its provider is away: asking for it then fails as
        # unreachable, which passes, and not as unknown, which does not.
        self._known: dict[str, ModelCard] = {}
        self._numbers: dict[int, str] = {}
        self._fresh_until: float | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def cards(self) -> Sequence[ModelCard]:
        """The models that can be reached now, by provider in the order given."""
        await self._ready()
        return self._cards

    async def resolve(self, model_id: int) -> ModelCard | None:
        """The model of an id; id 1 is the server's default. None when this server has never seen it."""
        await self._ready()
        if model_id == DEFAULT_ID:
            return self._default
        return self._known.get(self._numbers.get(model_id, ""))

    async def number(self, name: str) -> int | None:
        """The id of a model's name, as `resolve` understands it; None when this server has never seen it."""
        if name == DEFAULT_NAME:
            return DEFAULT_ID
        await self._ready()
        return next((number for number, known in self._numbers.items() if known == name), None)

    async def complete(
        self, name: str, request: ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ModelReply:
        """Ask the model of that name, whatever `request.model` says.

        Raises:
            ModelFault: as `ChatModel.complete`; UNKNOWN_MODEL for a name none of the providers answers for.
        """
        if name == DEFAULT_NAME:
            await self._ready()
            name = self._default.name if self._default else ""
        provider, _, model = name.partition(":")
        if provider not in self._providers or not model:
            raise ModelFault(ModelErrorClass.UNKNOWN_MODEL, f"This server has no model {name[:100]!r}.")
        return await self._providers[provider].complete(replace(request, model=model), on_text)

    async def close(self) -> None:
        """Stop asking and close every provider."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        for provider in self._providers.values():
            await provider.close()

    async def _ready(self) -> None:
        """Have cards. Only the first use waits for them; nothing is asked while they are fresh."""
        if self._fresh_until is not None and time.monotonic() < self._fresh_until:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        if self._fresh_until is None:
            await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        offers = await asyncio.gather(*map(_offer, self._providers.values()))
        self._cards = tuple(card for offer in offers for card in offer)
        self._known |= {card.name: card for card in self._cards}
        self._default = self._choose()
        if self._default is not None:
            self._known.setdefault(self._default.name, self._default)
        self._numbers = numbered(self._known)
        self._fresh_until = time.monotonic() + self._ttl_s

    def _choose(self) -> ModelCard | None:
        """The configured model even while it is away; else the first provider that answers, tools before none."""
        if self._default_name is not None:
            return self._known.get(self._default_name) or self._assumed(self._default_name)
        for provider in (*DEFAULT_ORDER, *self._providers):
            offered = [card for card in self._cards if card.provider == provider]
            if offered:
                return next((card for card in offered if card.tools), offered[0])
        return None

    def _assumed(self, name: str) -> ModelCard | None:
        """A card for a configured model that its provider does not list, or has not yet."""
        provider, _, model = name.partition(":")
        if provider not in self._providers or not model:
            return None
        price = _PRICES.get(provider, "paid")
        return ModelCard(
            name, provider, model, tools=True, vision=False, context_tokens=None, price_class=price
        )


async def _offer(provider: ChatModel) -> Sequence[ModelCard]:
    try:
        async with asyncio.timeout(CARDS_TIMEOUT_S):
            return await provider.cards()
    except TimeoutError:
        return ()
