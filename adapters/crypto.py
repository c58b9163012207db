"""Authenticated encryption: AES-256-GCM for contents, and a master key that wraps the keys of the contents.

Sealed bytes are `version (1) | nonce (12) | ciphertext and tag`; wrapped keys carry the wrapping key's id in
front, so that old and new master keys can be in use at the same time.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
MASTER_KEY_ID_BYTES = 4
VERSION = b"\x01"


class NotAuthentic(Exception):
    """Bytes that this key did not seal with these associated data: changed, misplaced or of another key."""


class UnknownMasterKey(Exception):
    """A data key is wrapped by a master key that this process was not given."""


def new_key() -> bytes:
    """A fresh AES-256 key."""
    return os.urandom(KEY_BYTES)


def seal(cipher: AESGCM, plaintext: bytes, aad: bytes) -> bytes:
    """Encrypt under a fresh random nonce; one key may seal 2**32 times (NIST SP 800-38D §8.3)."""
    nonce = os.urandom(NONCE_BYTES)
    return VERSION + nonce + cipher.encrypt(nonce, plaintext, aad)


def unseal(cipher: AESGCM, sealed: bytes, aad: bytes) -> bytes:
    """The plaintext.

    Raises:
        NotAuthentic: anything but what `seal` gave for this key and these associated data.
    """
    if sealed[:1] != VERSION:
        raise NotAuthentic(f"unknown version {sealed[:1]!r}")
    try:
        return cipher.decrypt(sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :], aad)
    except (InvalidTag, ValueError) as error:
        raise NotAuthentic("the seal is broken") from error


def derive(master_key: bytes, label: str) -> bytes:
    """A 32-byte key for one purpose; labels never collide with each other nor give the master key away."""
    return hmac.new(_checked(master_key), b"oshaani|" + label.encode(), hashlib.sha256).digest()


class MasterKey:
    """Wraps data keys with `key`, and unwraps what `key` or any of `others` wrapped.

    Rotation without a pause: give every process the new key among `others`; then make it `key` and the old
    one one of the `others`; rewrap what is stored; drop the old one.
    """

    def __init__(self, key: bytes, others: Sequence[bytes] = ()) -> None:
        self.id = _key_id(key)
        self._ciphers = {_key_id(each): AESGCM(derive(each, "wrap")) for each in (*others, key)}

    def wrap(self, data_key: bytes, aad: bytes) -> bytes:
        """`data_key` as it may be stored."""
        return self.id + seal(self._ciphers[self.id], data_key, aad)

    def wrapped(self, wrapped_key: bytes) -> bool:
        """Whether the current key wrapped these bytes."""
        return wrapped_key[:MASTER_KEY_ID_BYTES] == self.id

    def unwrap(self, wrapped_key: bytes, aad: bytes) -> bytes:
        """The data key.

        Raises:
            UnknownMasterKey: wrapped by a key this process does not have.
            NotAuthentic: the stored bytes were changed, or belong elsewhere.
        """
        key_id = wrapped_key[:MASTER_KEY_ID_BYTES]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise UnknownMasterKey(f"no master key with id {key_id.hex()}")
        return unseal(cipher, wrapped_key[MASTER_KEY_ID_BYTES:], aad)


def _checked(master_key: bytes) -> bytes:
    if len(master_key) != KEY_BYTES:
        raise ValueError(f"a master key has {KEY_BYTES} bytes, this one {len(master_key)}")
    return master_key


def _key_id(master_key: bytes) -> bytes:
    return derive(master_key, "id")[:MASTER_KEY_ID_BYTES]
