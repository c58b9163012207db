"""Data keys in this process's memory, gone with it."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from adapters.crypto import new_key, seal, unseal
from domain.ports import KeyNotLoaded, SubjectErased


class MemoryKeyRing:
    """Real encryption under keys that nobody else has."""

    def __init__(self) -> None:
        self._ciphers: dict[UUID, AESGCM | None] = {}  # None: destroyed

    async def ensure(self, subject_ids: Sequence[UUID]) -> None:
        for subject_id in subject_ids:
            if subject_id not in self._ciphers:
                self._ciphers[subject_id] = AESGCM(new_key())

    def seal(self, subject_id: UUID, plaintext: bytes, aad: bytes) -> bytes:
        cipher = self._loaded(subject_id)
        if cipher is None:
            raise SubjectErased(subject_id)
        return seal(cipher, plaintext, aad)

    def open(self, subject_id: UUID, sealed: bytes, aad: bytes) -> bytes | None:
        cipher = self._loaded(subject_id)
        return None if cipher is None else unseal(cipher, sealed, aad)

    async def destroy(self, subject_id: UUID) -> None:
        self._ciphers[subject_id] = None

    def _loaded(self, subject_id: UUID) -> AESGCM | None:
        try:
            return self._ciphers[subject_id]
        except KeyError:
            raise KeyNotLoaded(subject_id) from None
