"""Which chat models this server has: from the settings to the registry, and as people choose them."""

from __future__ import annotations

from collections.abc import Sequence

from adapters.chat_models.bedrock import find_bedrock
from adapters.chat_models.offline import Offline
from adapters.chat_models.ollama import Ollama
from adapters.chat_models.openai_wire import OpenAIWire
from adapters.chat_models.registry import DEFAULT_ID, ModelRegistry
from api.server import NumberedModel
from domain.ports import ChatModel
from oshaani.settings import Settings


async def model_registry(settings: Settings) -> ModelRegistry:
    """Every provider the settings name, best first, and the offline model, which is always there."""
    providers: list[ChatModel] = []
    bedrock = await find_bedrock(settings.aws_region, settings.bedrock_endpoint)
    if bedrock is not None:
        providers.append(bedrock)
    if settings.openai_base_url is not None:
        providers.append(OpenAIWire(settings.openai_base_url, settings.openai_api_key))
    providers += (Ollama(settings.ollama_url), Offline())
    return ModelRegistry(providers, settings.default_model)


class NumberedModels:
    """The registry as `api.server.Models`."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._numbers = {DEFAULT_ID}

    async def cards(self) -> Sequence[NumberedModel]:
        found = []
        for card in await self._registry.cards():
            number = await self._registry.number(card.name)
            if number is not None:
                found.append(NumberedModel(number, card))
        self._numbers.update(model.model_id for model in found)
        return found

    def knows(self, model_id: int) -> bool:
        return model_id in self._numbers
