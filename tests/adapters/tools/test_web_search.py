from __future__ import annotations

import orjson
import pytest

from adapters.egress.client import EgressClient
from adapters.tools.web_search import RESULT_COUNT_MAX, SearchServices, web_search
from domain.ports import Tool
from tests.adapters.tools.calls import failure_of, result_of
from tests.peers.web import WebPeer

KEY = "tvly-canary-key"
TAVILY = """{"query": "tea", "follow_up_questions": null, "answer": null, "images": [], "results": [
  {"url": "https://tea.example/1", "title": "Tea", "content": "Leaves & water.", "score": 0.9, "raw_content": null},
  {"url": "https://tea.example/2", "title": "More tea", "content": "Cups.", "score": 0.8, "raw_content": null}],
  "response_time": 1.2, "request_id": "r"}"""
BRAVE = """{"type": "search", "query": {"original": "tea"}, "mixed": {}, "web": {"type": "search", "results": [
  {"title": "Tea &amp; cake", "url": "https://tea.example/1", "is_source_local": false, "language": "en",
   "description": "The <strong>best</strong> tea", "profile": {"name": "Tea"}}]}}"""
SEARXNG = """{"query": "tea", "number_of_results": 0, "results": [
  {"url": "https://tea.example/1", "title": "Tea", "content": "Leaves.", "engine": "duckduckgo", "score": 1.0},
  {"url": "https://tea.example/2", "title": "", "engine": "duckduckgo"}],
  "answers": [], "corrections": [], "infoboxes": [], "suggestions": [], "unresponsive_engines": []}"""


@pytest.fixture(params=["tavily", "brave", "searxng"])
def search(request: pytest.FixtureRequest, egress: EgressClient, peer: WebPeer) -> Tool:
    """The tool with one of the services, which the peer plays."""
    shut = EgressClient()
    if request.param == "searxng":
        return web_search(SearchServices(searxng_url=peer.url("/base/")), shut, egress)
    keys = {"tavily_key": KEY} if request.param == "tavily" else {"brave_key": KEY}
    services = SearchServices(**keys, tavily_url=peer.url(""), brave_url=peer.url(""), searxng_url=peer.url())
    return web_search(services, egress, shut)


PATHS = ["/search", "/res/v1/web/search", "/base/search"]


async def test_tavily_is_asked_first(egress: EgressClient, peer: WebPeer) -> None:
    peer.json("/search", TAVILY)
    tool = web_search(SearchServices(KEY, "brave", "http://x", tavily_url=peer.url("")), egress, egress)
    assert await result_of(tool, query="tea", max_results=2) == (
        "1. Tea\n   https://tea.example/1\n   Leaves & water.\n\n2. More tea\n   https://tea.example/2\n   Cups."
    )
    seen = peer.seen[0]
    assert (seen.method, seen.headers["authorization"]) == ("POST", f"Bearer {KEY}")
    assert orjson.loads(seen.body) == {"query": "tea", "max_results": 2, "search_depth": "basic"}


async def test_brave_is_asked_without_tavily(egress: EgressClient, peer: WebPeer) -> None:
    peer.json("/res/v1/web/search", BRAVE)
    tool = web_search(SearchServices(None, KEY, "http://x", brave_url=peer.url("")), egress, egress)
    assert (
        await result_of(tool, query="tea & cake")
        == "1. Tea & cake\n   https://tea.example/1\n   The best tea"
    )
    seen = peer.seen[0]
    assert (seen.method, seen.headers["x-subscription-token"]) == ("GET", KEY)
    assert seen.path == "/res/v1/web/search?q=tea+%26+cake&count=5"


async def test_searxng_is_asked_through_the_operators_door(egress: EgressClient, peer: WebPeer) -> None:
    peer.json("/base/search", SEARXNG)
    shut = EgressClient()
    tool = web_search(SearchServices(searxng_url=peer.url("/base/")), shut, egress)
    assert await result_of(tool, query="tea") == (
        "1. Tea\n   https://tea.example/1\n   Leaves.\n\n2. https://tea.example/2\n   https://tea.example/2"
    )
    assert peer.seen[0].path == "/base/search?q=tea&format=json"


async def test_without_a_service_the_tool_says_which_setting_to_set(egress: EgressClient) -> None:
    tool = web_search(SearchServices(), egress, egress)
    missing = tool.missing()
    assert missing is not None
    assert "OSHAANI_SEARCH_TAVILY_API_KEY" in missing
    assert str(await failure_of(tool, query="tea")) == missing


async def test_with_a_service_nothing_is_missing(search: Tool) -> None:
    assert search.missing() is None


async def test_no_results_are_said_to_be_none(search: Tool, peer: WebPeer) -> None:
    for path in PATHS:
        peer.json(path, '{"results": [], "web": {"results": []}}')
    assert await result_of(search, query="tea") == "No results for 'tea'."


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_an_error_of_the_service_is_a_sentence_without_the_key(
    search: Tool, peer: WebPeer, status: int
) -> None:
    for path in PATHS:
        peer.json(path, f'{{"detail": {{"error": "{KEY}"}}}}', status)
    failure = await failure_of(search, query="tea")
    assert failure.error_class == f"http_{status}"
    assert str(status) in str(failure)
    assert KEY not in str(failure)


@pytest.mark.parametrize("body", ["", "<html>", "[]", '{"results": 3, "web": {"results": "x"}}'])
async def test_an_answer_in_another_format_is_a_sentence(search: Tool, peer: WebPeer, body: str) -> None:
    for path in PATHS:
        peer.json(path, body)
    assert (await failure_of(search, query="tea")).error_class == "garbage"


async def test_a_used_up_plan_is_told_apart(egress: EgressClient, peer: WebPeer) -> None:
    peer.json("/search", '{"detail": {"error": "limit"}}', 432)
    tool = web_search(SearchServices(KEY, tavily_url=peer.url("")), egress, egress)
    assert (await failure_of(tool, query="tea")).error_class == "quota_exceeded"


async def test_a_searxng_without_json_names_the_setting(egress: EgressClient, peer: WebPeer) -> None:
    peer.json("/search", "", 403)
    tool = web_search(SearchServices(searxng_url=peer.url("")), egress, egress)
    assert "search.formats" in str(await failure_of(tool, query="tea"))


@pytest.mark.parametrize(
    "arguments", [{}, {"query": ""}, {"query": "x", "max_results": RESULT_COUNT_MAX + 1}]
)
def test_only_sensible_searches_are_made(search: Tool, arguments: dict[str, object]) -> None:
    assert search.validate(arguments) is not None


def test_keys_are_in_no_representation() -> None:
    assert KEY not in repr(SearchServices(KEY, KEY))
