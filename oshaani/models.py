"""Which chat models this server has: from the settings to the registry, and as people choose them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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
    if _may_name_a_region(settings):
        # Imported only here: boto3 takes a quarter of a second and 20 MB that most servers have no use for.
        from adapters.chat_models.bedrock import find_bedrock

        bedrock = await find_bedrock(settings.aws_region, settings.bedrock_endpoint)
        if bedrock is not None:
            providers.append(bedrock)
    if settings.openai_base_url is not None:
        providers.append(OpenAIWire(settings.openai_base_url, settings.openai_api_key))
    providers += (Ollama(settings.ollama_url), Offline())
    return ModelRegistry(providers, settings.default_model)


def _may_name_a_region(settings: Settings) -> bool:
    """Whether boto3's chain can find a region at all: in the environment or in its configuration file."""
    file = Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    return settings.aws_region is not None or file.exists()


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
