"""Secrets in this process's memory, encrypted all the same: a memory dump or a log of it shows none."""

from __future__ import annotations

from uuid import UUID, uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from adapters.crypto import new_key, seal, unseal
from adapters.vault import checked_secret, secret_aad, secret_id_of, secret_ref_of


class MemoryVault:
    """The same name keeps its `secret_ref` when its secret is replaced."""

    def __init__(self) -> None:
        self._cipher = AESGCM(new_key())
        self._ids: dict[tuple[UUID, str], UUID] = {}
        self._sealed: dict[tuple[UUID, UUID], bytes] = {}

    async def put(self, tenant_id: UUID, name: str, secret: str) -> str:
        plaintext = checked_secret(name, secret)
        secret_id = self._ids.setdefault((tenant_id, name), uuid4())
        self._sealed[tenant_id, secret_id] = seal(self._cipher, plaintext, secret_aad(tenant_id, secret_id))
        return secret_ref_of(secret_id)

    async def get(self, tenant_id: UUID, secret_ref: str) -> str | None:
        secret_id = secret_id_of(secret_ref)
        if secret_id is None or (sealed := self._sealed.get((tenant_id, secret_id))) is None:
            return None
        return unseal(self._cipher, sealed, secret_aad(tenant_id, secret_id)).decode()

    async def remove(self, tenant_id: UUID, secret_ref: str) -> None:
        secret_id = secret_id_of(secret_ref)
        if secret_id is None or self._sealed.pop((tenant_id, secret_id), None) is None:
            return
        self._ids = {name: each for name, each in self._ids.items() if each != secret_id}

    async def remove_all(self, tenant_id: UUID) -> None:
        self._sealed = {key: sealed for key, sealed in self._sealed.items() if key[0] != tenant_id}
        self._ids = {key: each for key, each in self._ids.items() if key[0] != tenant_id}
