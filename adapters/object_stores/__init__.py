"""Where large immutable bytes are kept, one file per kind of store."""

from __future__ import annotations

import re

KEY_CHARS_MAX = 512
KEY_PART_CHARS_MAX = 128
_KEY = re.compile(rf"[a-z0-9_-]{{1,{KEY_PART_CHARS_MAX}}}(?:/[a-z0-9_-]{{1,{KEY_PART_CHARS_MAX}}})*")


class BadObjectKey(ValueError):
    """An object key is parts of a-z, 0-9, _ and - joined by /, at most 512 characters."""


def checked_key(key: str) -> str:
    """`key` itself.

    Raises:
        BadObjectKey: not a name an object can have in every store.
    """
    if len(key) > KEY_CHARS_MAX or not _KEY.fullmatch(key):
        raise BadObjectKey(f"object key {key[:KEY_CHARS_MAX]!r} is not parts of a-z 0-9 _ - joined by /")
    return key
