"""Secrets of webhooks, one for each caller, that follow from the server's own: none is stored."""

from __future__ import annotations

from adapters.crypto import derive


class DerivedWebhookSecrets:
    """Implements `WebhookSecrets`."""

    def __init__(self, secret: bytes) -> None:
        self._secret = derive(secret, "webhooks")

    def of(self, actor: str) -> bytes:
        return derive(self._secret, actor)
