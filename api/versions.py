"""How the contract changes: by additions; a change of form gets a date, and what goes away is announced first.

`Oshaani-Version` names the form that a client was written for. `Deprecation` (RFC 9745) and `Sunset` (RFC 8594) come
with the answers of an operation that will go away.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from email.utils import format_datetime

from api.errors import invalid

HEADER = b"oshaani-version"
VERSIONS = ("2026-11-01",)  # oldest first; each is served until an announced sunset
CURRENT = VERSIONS[-1]


@dataclass(frozen=True, slots=True)
class Notice:
    """Since when an operation is deprecated, from when it may be gone, and where to read what to use instead."""

    deprecated_at: datetime
    sunset_at: datetime
    link: str

    def headers(self) -> list[tuple[bytes, bytes]]:
        """As answers carry it."""
        values = {
            "deprecation": f"@{int(self.deprecated_at.timestamp())}",  # RFC 9651 §3.3.7
            "sunset": format_datetime(self.sunset_at, usegmt=True),
            "link": f'<{self.link}>; rel="deprecation"',
        }
        return [(name.encode(), value.encode("latin-1")) for name, value in values.items()]


DEPRECATED: dict[str, Notice] = {}
"""Notices by the name of the route's function."""


def version_for(asked: str) -> str:
    """The version that a client is served: the latest one that is not younger than the date it names.

    Raises:
        Problem: no date, or one before the first version.
    """
    try:
        day = date.fromisoformat(asked).isoformat()
    except ValueError:
        day = ""
    served = [version for version in VERSIONS if version <= day]
    if not served or day != asked:
        sentence = f"Oshaani-Version is a date, {VERSIONS[0]} or later; without it {CURRENT} is served."
        raise invalid("Oshaani-Version", sentence, "unknown_version")
    return served[-1]
