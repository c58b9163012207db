"""Versions of things as entity tags: `"v17"` (RFC 9110 §8.8.3, §13.1)."""

from __future__ import annotations

import re

from api.call import Call
from api.errors import invalid

_TAG = re.compile(r'(?:W/)?"v([0-9]{1,9})"')


def tag_of(version: int) -> str:
    """The entity tag of a version."""
    return f'"v{version}"'


def say_version(call: Call, version: int) -> None:
    """Add the ETag of a version to the answer."""
    call.say("ETag", tag_of(version))


def expected_version(call: Call) -> int | None:
    """The version that the caller has seen and wants to change; None for "whatever it is".

    Raises:
        Problem: If-Match is not an entity tag of ours.
    """
    header = call.header(b"if-match")
    if header is None or header.strip() == "*":
        return None
    match = _TAG.fullmatch(header.strip())
    if match is None:
        raise invalid("If-Match", 'If-Match is the ETag of an earlier answer, like "v17".')
    return int(match[1])


def is_known(call: Call, tag: str) -> bool:
    """Whether the caller has this version already (If-None-Match)."""
    header = call.header(b"if-none-match")
    if header is None:
        return False
    known = [each.strip().removeprefix("W/") for each in header.split(",")]
    return tag in known or "*" in known
