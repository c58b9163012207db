"""The chat models that agents can be given."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from api.bodies import StrictRoute
from api.envelopes import Envelope, enveloped
from api.principals import UserCall

DEFAULT_MODEL_ID = 1

router = APIRouter(route_class=StrictRoute, tags=["Models"])


class ModelData(BaseModel):
    """A model that can be reached now."""

    model_id: int
    name: str
    display_name: str
    provider: str
    tools: bool
    vision: bool
    context_tokens: int | None
    price_class: str


@router.get("/api/models", response_model=Envelope[list[ModelData]])
async def list_models(call: UserCall) -> Response:
    """The models that can be reached now; `model_id` 1 always stands for the server's default."""
    data = [
        {
            "model_id": model.model_id,
            "name": model.card.name,
            "display_name": model.card.display_name,
            "provider": model.card.provider,
            "tools": model.card.tools,
            "vision": model.card.vision,
            "context_tokens": model.card.context_tokens,
            "price_class": model.card.price_class,
        }
        for model in await call.server.models.cards()
    ]
    return enveloped(data, "Models.", next_cursor=None, default_model_id=DEFAULT_MODEL_ID)
