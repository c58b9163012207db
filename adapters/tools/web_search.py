"""Tool `web_search`: results of the first configured of Tavily, Brave and SearXNG (SOP §4.1).

Formats: docs.tavily.com "Search", api.search.brave.com "Web Search", docs.searxng.org "Search API".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlencode

import orjson
from annotated_types import Interval, Len
from pydantic import Field

from adapters.tools.html_text import without_markup
from adapters.tools.http_answers import check_status
from adapters.tools.tool import tool
from domain.ports import Effect, Egress, Fetched, Tool, ToolFailed

TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 2_000_000
SNIPPET_CHARS_MAX = 500
TITLE_CHARS_MAX = 200
RESULT_COUNT_DEFAULT = 5
RESULT_COUNT_MAX = 10
MISSING_SENTENCE = (
    "Web search needs a search service: set OSHAANI_SEARCH_TAVILY_API_KEY, OSHAANI_SEARCH_BRAVE_API_KEY"
    " or OSHAANI_SEARCH_SEARXNG_URL."
)


@dataclass(frozen=True, slots=True)
class SearchServices:
    """What the operator configured; the first one present is asked."""

    tavily_key: str | None = field(default=None, repr=False)
    brave_key: str | None = field(default=None, repr=False)
    searxng_url: str | None = None
    tavily_url: str = "https://api.tavily.com"
    brave_url: str = "https://api.search.brave.com"


@dataclass(frozen=True, slots=True)
class _Found:
    title: str
    url: str
    snippet: str


def web_search(services: SearchServices, egress: Egress, operator_egress: Egress) -> Tool:
    """The tool. `operator_egress` may reach private addresses: only the operator's own SearXNG is asked there."""

    def missing() -> str | None:
        configured = services.tavily_key or services.brave_key or services.searxng_url
        return None if configured else MISSING_SENTENCE

    @tool(timeout_s=TIMEOUT_S, effect=Effect.PURE, missing=missing)
    async def web_search(
        query: Annotated[str, Len(1, 400), Field(description="What to search for")],
        max_results: Annotated[int, Interval(ge=1, le=RESULT_COUNT_MAX)] = RESULT_COUNT_DEFAULT,
    ) -> str:
        """Search the web and return titles, addresses and short extracts of the best results."""
        if services.tavily_key:
            found = await _tavily(services, egress, query, max_results)
        elif services.brave_key:
            found = await _brave(services, egress, query, max_results)
        elif services.searxng_url:
            found = await _searxng(services.searxng_url, operator_egress, query)
        else:
            raise ToolFailed(MISSING_SENTENCE, "tool_unavailable")
        return _listed(query, found[:max_results])

    return web_search


async def _tavily(services: SearchServices, egress: Egress, query: str, count: int) -> list[_Found]:
    answer = await egress.fetch(
        "POST",
        services.tavily_url.rstrip("/") + "/search",
        headers={"Authorization": f"Bearer {services.tavily_key}", "Content-Type": "application/json"},
        body=orjson.dumps({"query": query, "max_results": count, "search_depth": "basic"}),
        timeout_s=TIMEOUT_S,
        size_bytes_max=ANSWER_BYTES_MAX,
    )
    if answer.status in (432, 433):
        raise ToolFailed(
            "Tavily's plan limit is used up; raise it or set another search service.", "quota_exceeded"
        )
    results = _json(answer, "Tavily").get("results")
    return _found(results, "Tavily", snippet="content")


async def _brave(services: SearchServices, egress: Egress, query: str, count: int) -> list[_Found]:
    answer = await egress.fetch(
        "GET",
        services.brave_url.rstrip("/") + "/res/v1/web/search?" + urlencode({"q": query, "count": count}),
        headers={"X-Subscription-Token": str(services.brave_key), "Accept": "application/json"},
        timeout_s=TIMEOUT_S,
        size_bytes_max=ANSWER_BYTES_MAX,
    )
    web = _json(answer, "Brave Search").get("web")  # Absent when there are no results.
    return _found(web.get("results") if isinstance(web, dict) else [], "Brave Search", snippet="description")


async def _searxng(url: str, operator_egress: Egress, query: str) -> list[_Found]:
    answer = await operator_egress.fetch(
        "GET",
        url.rstrip("/") + "/search?" + urlencode({"q": query, "format": "json"}),
        headers={"Accept": "application/json"},
        timeout_s=TIMEOUT_S,
        size_bytes_max=ANSWER_BYTES_MAX,
    )
    if answer.status == 403:
        raise ToolFailed(
            "SearXNG does not give JSON: add json to search.formats in its settings.yml.", "http_403"
        )
    return _found(_json(answer, "SearXNG").get("results"), "SearXNG", snippet="content")


def _json(answer: Fetched, who: str) -> Mapping[str, Any]:
    check_status(answer, who)
    try:
        content = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise ToolFailed(f"{who} answered with something that is not its JSON.", "garbage")
    return content


def _found(results: Any, who: str, *, snippet: str) -> list[_Found]:
    if not isinstance(results, list):
        raise ToolFailed(f"{who} answered without a list of results.", "garbage")
    return [
        _Found(
            without_markup(str(each.get("title") or each["url"]))[:TITLE_CHARS_MAX],
            str(each["url"]),
            without_markup(str(each.get(snippet) or ""))[:SNIPPET_CHARS_MAX],
        )
        for each in results
        if isinstance(each, dict) and isinstance(each.get("url"), str)
    ]


def _listed(query: str, found: list[_Found]) -> str:
    if not found:
        return f"No results for {query!r}."
    return "\n\n".join(
        f"{number}. {each.title}\n   {each.url}" + (f"\n   {each.snippet}" if each.snippet else "")
        for number, each in enumerate(found, 1)
    )
