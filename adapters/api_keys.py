"""API keys: `osh_<kind>_<key id>_<secret>`, found by their id and compared by a keyed digest.

A key is checked against its pattern before anything else looks at it, and is never stored.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Sequence
from typing import cast

from adapters.crypto import derive
from domain.ports import KeyKind

KEY_ID_CHARS = 16
SECRET_BYTES = 32
SECRET_CHARS = 43  # 62**43 > 2**256
_KEY_ID_ALPHABET = string.ascii_lowercase + string.digits
_SECRET_ALPHABET = string.digits + string.ascii_letters
_KEY = re.compile(rf"osh_(user|agent)_([a-z0-9]{{{KEY_ID_CHARS}}})_([0-9A-Za-z]{{{SECRET_CHARS}}})")


class HmacApiKeys:
    """Implements `ApiKeys` with HMAC-SHA256 under a pepper that the master key gives.

    `other_master_keys`: the old ones, so that the keys issued under them go on working.
    """

    def __init__(self, master_key: bytes, other_master_keys: Sequence[bytes] = ()) -> None:
        self._peppers = [derive(each, "api keys") for each in (master_key, *other_master_keys)]

    def mint(self, kind: KeyKind) -> tuple[str, str]:
        key_id = "".join(secrets.choice(_KEY_ID_ALPHABET) for _ in range(KEY_ID_CHARS))
        return key_id, f"osh_{kind}_{key_id}_{_base62(secrets.token_bytes(SECRET_BYTES))}"

    def parse(self, text: str) -> tuple[KeyKind, str, str] | None:
        match = _KEY.fullmatch(text)
        return None if match is None else (cast(KeyKind, match[1]), match[2], match[3])

    def digest(self, key: str) -> str:
        return _digest(self._peppers[0], key)

    def matches(self, key: str, stored_digest: str | None) -> bool:
        expected = (stored_digest or "").encode()
        found = [hmac.compare_digest(_digest(pepper, key).encode(), expected) for pepper in self._peppers]
        return any(found)


def _digest(pepper: bytes, key: str) -> str:
    return hmac.new(pepper, key.encode(), hashlib.sha256).hexdigest()


def _base62(content: bytes) -> str:
    number = int.from_bytes(content)
    digits = []
    for _ in range(SECRET_CHARS):
        number, digit = divmod(number, 62)
        digits.append(_SECRET_ALPHABET[digit])
    return "".join(digits)
