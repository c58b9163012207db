"""Callbacks of requests: how far they are, and the secret that they are signed with."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.bodies import StrictRoute
from api.call import Call
from api.envelopes import Envelope, enveloped, instant
from api.principals import AgentCall
from commands.bus import LATEST
from domain.callback import Callback, CallbackStatus, callback_of
from schemas.turn_story import Story

router = APIRouter(route_class=StrictRoute, tags=["Requests"])


class CallbackData(BaseModel):
    """How far the message to `callback_url` is. `reason`: why the last attempt failed."""

    status: CallbackStatus
    attempts: int
    next_attempt_at: str | None = None
    reason: str | None = Field(default=None, examples=["http_503"])


class WebhookSecretData(BaseModel):
    """What messages to the `callback_url` of this key's requests are signed with."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])


@router.get("/api/webhook-secret", response_model=Envelope[WebhookSecretData])
async def get_webhook_secret(call: AgentCall) -> Response:
    """The secret of the calling API key's webhooks (Standard Webhooks, v1). Another key has another."""
    data = {"secret": secret_of(call, call.caller().actor)}
    return enveloped(data, "Check `webhook-signature` with this secret.")


def secret_of(call: Call, actor: str) -> str:
    """A caller's webhook secret, as Standard Webhooks write it."""
    return "whsec_" + b64encode(call.server.webhook_secrets.of(actor)).decode()


async def callback_of_story(call: Call, story: Story) -> Callback | None:
    """The callback of a request, if one was asked for."""
    accepted = story.accepted
    if accepted is None or not accepted.callback:
        return None
    return await call.server.bus.read(Callback, callback_of(story.turn_id), accepted.owner_id, LATEST)


def shown(callback: Callback | None) -> dict[str, Any]:
    """What a request's answer has of its callback: nothing when none was asked for."""
    if callback is None:
        return {}
    data = {
        "status": callback.status,
        "attempts": callback.attempts,
        "next_attempt_at": instant(callback.retry_at),
        "reason": callback.failure,
    }
    return {"callback": data}
