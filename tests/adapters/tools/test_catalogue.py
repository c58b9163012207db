from __future__ import annotations

import pytest

from adapters.egress.client import EgressClient
from adapters.tools.catalogue import ABSENT_SENTENCE, ToolCatalogue
from adapters.tools.svg_diagram import svg_diagram
from adapters.tools.tool import tool
from adapters.tools.url_resolver import url_resolver
from adapters.tools.web_search import MISSING_SENTENCE, SearchServices, web_search
from domain.custom_tool import DEFAULT_TOOL_NAMES
from domain.ports import Effect


@tool(timeout_s=1.0, effect=Effect.PURE)
async def dice() -> str:
    """Throw a die."""
    return "4"


async def test_the_catalogue_lists_what_runs_what_lacks_a_setting_and_what_is_not_here(
    egress: EgressClient,
) -> None:
    catalogue = ToolCatalogue(
        dice, svg_diagram(), url_resolver(egress), web_search(SearchServices(), egress, egress)
    )
    entries = catalogue.entries()
    assert [entry.name for entry in entries] == [*DEFAULT_TOOL_NAMES, "dice"]
    assert len(DEFAULT_TOOL_NAMES) == 16
    missing = {entry.name: entry.missing for entry in entries}
    assert missing["web_search"] == MISSING_SENTENCE
    assert missing["ocr"] == ABSENT_SENTENCE
    assert [entry.name for entry in entries if entry.missing is None] == [
        "url_resolver",
        "svg_diagram",
        "dice",
    ]
    assert [each.name for each in catalogue.all()] == ["url_resolver", "svg_diagram", "dice"]
    assert all(entry.description for entry in entries)
    assert catalogue.get("dice") is dice
    assert catalogue.get("web_search") is not None
    assert catalogue.get("ocr") is None


def test_two_tools_of_one_name_are_a_bug() -> None:
    with pytest.raises(ValueError, match="same name"):
        ToolCatalogue(dice, dice)
