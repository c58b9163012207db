"""Ids as people write them on the command line."""

from __future__ import annotations

from uuid import UUID

from oshaani.cli.trouble import Failed

TURN, CONVERSATION = "req-", "conv-"


def turn_id_of(text: str) -> UUID:
    """The turn of `req-…`, or of its bare id.

    Raises:
        Failed: it is neither.
    """
    return uuid_of(text.removeprefix(TURN), text)


def uuid_of(text: str, said: str) -> UUID:
    """An id; `said` is what the person wrote.

    Raises:
        Failed: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise Failed(f"{said!r} is not an id; it looks like req-6f1c2b1e-…, or without the prefix") from None
