"""Which pages are generated, and from what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from oshaani.reference.commands import commands_page
from oshaani.reference.errors import errors_page
from oshaani.reference.events import events_page
from oshaani.reference.http import http_page
from oshaani.reference.markdown import filled
from oshaani.reference.metrics import metrics_page
from oshaani.reference.prices import plans, prices
from oshaani.reference.settings import settings_page
from oshaani.reference.topics import topics_page

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
WHOLE: Mapping[str, Callable[[], str]] = {
    "cli.md": commands_page,
    "errors.md": errors_page,
    "events.md": events_page,
    "http.md": http_page,
    "metrics.md": metrics_page,
    "settings.md": settings_page,
    "topics.md": topics_page,
}
SECTIONS: Mapping[str, Mapping[str, Callable[[], str]]] = {"billing.md": {"prices": prices, "plans": plans}}


def written() -> dict[str, str]:
    """Every page by its file's name, as the program would have it written."""
    found = {name: page() for name, page in WHOLE.items()}
    for name, sections in SECTIONS.items():
        text = (FOLDER / name).read_text("utf-8")
        for section, content in sections.items():
            text = filled(text, section, content())
        found[name] = text
    return found
