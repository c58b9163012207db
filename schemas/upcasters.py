"""How facts written long ago are read today: one function per event type and version, from version n to n + 1.

An upcaster takes the plain JSON of the old version and returns that of the next; it never fails and never looks at
anything else. Events are for ever: fields are added with defaults here or as a new version, never renamed or reused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Upcaster = Callable[[Json], Json]

UPCASTERS: dict[tuple[str, int], Upcaster] = {}


def upcasts(event_type: str, from_version: int) -> Callable[[Upcaster], Upcaster]:
    """Declare how `event_type` of `from_version` becomes the next version."""

    def declare(upcaster: Upcaster) -> Upcaster:
        if (event_type, from_version) in UPCASTERS:
            raise ValueError(f"two upcasters for {event_type!r} from version {from_version}")
        UPCASTERS[event_type, from_version] = upcaster
        return upcaster

    return declare


def upcast(event_type: str, version: int, current_version: int, fields: Json) -> Json:
    """The fields as the current version has them."""
    while version < current_version:
        fields = UPCASTERS[event_type, version](fields)
        version += 1
    return fields
