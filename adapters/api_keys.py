"""API keys: `osh_<kind>_<key id>_<secret>`, found by their id and compared by a keyed digest.

A key is checked against its pattern before anything else looks at it, and is never stored.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Iterable
from typing import Literal, cast

from adapters.crypto import derive

KeyKind = Literal["user", "agent"]

KEY_ID_CHARS = 16
SECRET_CHARS = 43  # 62**43 > 2**256
DIGEST_BYTES = hashlib.sha256().digest_size
_KEY_ID_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_ALPHABET = string.digits + string.ascii_letters
_KEY = re.compile(rf"osh_(user|agent)_([a-z0-9]{{{KEY_ID_CHARS}}})_([0-9A-Za-z]{{{SECRET_CHARS}}})")


def mint(kind: KeyKind) -> tuple[str, str]:
    """A new key id, and the whole key, which is shown once."""
    key_id = "".join(secrets.choice(_KEY_ID_ALPHABET) for _ in range(KEY_ID_CHARS))
    return key_id, f"osh_{kind}_{key_id}_{_base62(secrets.token_bytes(32))}"


def parse(text: str) -> tuple[KeyKind, str, str] | None:
    """Kind, key id and secret, or None for anything that `mint` cannot have given."""
    match = _KEY.fullmatch(text)
    if match is None:
        return None
    return cast(KeyKind, match[1]), match[2], match[3]


def pepper_of(master_key: bytes) -> bytes:
    """The key of the digests: without it a stolen table of digests cannot be searched."""
    return derive(master_key, "api keys")


def digest(pepper: bytes, key: str) -> bytes:
    """What is stored of a key: 32 bytes."""
    return hmac.new(pepper, key.encode(), hashlib.sha256).digest()


def matches(peppers: Iterable[bytes], key: str, stored_digest: bytes | None) -> bool:
    """Whether `stored_digest` is the key's under one of the peppers; takes as long for None, an unknown id.

    There are several peppers while the master key is being replaced.
    """
    expected = stored_digest if stored_digest is not None else bytes(DIGEST_BYTES)
    found = [hmac.compare_digest(digest(pepper, key), expected) for pepper in peppers]
    return stored_digest is not None and any(found)


def _base62(content: bytes) -> str:
    number = int.from_bytes(content)
    digits = []
    for _ in range(SECRET_CHARS):
        number, digit = divmod(number, 62)
        digits.append(_SECRET_ALPHABET[digit])
    return "".join(digits)


class PepperedKeys:
    """Implements `domain.ports.ApiKeys`. The first pepper makes digests, all of them recognise keys."""

    def __init__(self, *peppers: bytes) -> None:
        self._peppers = peppers

    def mint(self, kind: KeyKind) -> tuple[str, str]:
        return mint(kind)

    def parse(self, text: str) -> tuple[KeyKind, str, str] | None:
        return parse(text)

    def digest(self, key: str) -> str:
        return digest(self._peppers[0], key).hex()

    def matches(self, key: str, stored_digest: str | None) -> bool:
        stored = bytes.fromhex(stored_digest) if stored_digest is not None else None
        return matches(self._peppers, key, stored)
