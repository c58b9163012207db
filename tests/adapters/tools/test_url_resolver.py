from __future__ import annotations

import pytest

from adapters.egress.client import DENIED_SENTENCE, EgressClient
from adapters.tools.url_resolver import url_resolver, with_scheme
from domain.ports import Effect
from tests.adapters.tools.calls import failure_of, result_of
from tests.peers.web import WebPeer

HTML = {"content-type": "text/html; charset=utf-8"}


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("example.com/a?b", "https://example.com/a?b"),
        ("example.com:8080", "https://example.com:8080"),
        ("//example.com", "https://example.com"),
        ("HTTP://example.com", "HTTP://example.com"),
        ("ftp://example.com", "ftp://example.com"),
        ("javascript:alert(1)", "https://javascript:alert(1)"),
    ],
)
def test_https_is_added_when_the_scheme_is_missing(given: str, asked: str) -> None:
    assert with_scheme(given) == asked


async def test_a_page_is_given_with_title_final_address_and_text(egress: EgressClient, peer: WebPeer) -> None:
    peer.redirect("/old", "/new")
    peer.bytes("/new", "<title>Tee</title><p>Grüner Tee".encode(), HTML)
    tool = url_resolver(egress)
    assert tool.effect is Effect.PURE
    assert await result_of(tool, url=peer.url("/old")) == f"Title: Tee\nURL: {peer.url('/new')}\n\nGrüner Tee"


async def test_a_page_may_declare_its_character_set_in_its_markup(
    egress: EgressClient, peer: WebPeer
) -> None:
    peer.bytes("/", '<meta charset="windows-1252"><p>café'.encode("cp1252"), {"content-type": "text/html"})
    assert (await result_of(url_resolver(egress), url=peer.url())).endswith("café")


@pytest.mark.parametrize(
    "media_type", ["application/json", "text/plain", "text/csv", "application/ld+json", ""]
)
async def test_text_of_other_kinds_is_passed_on(egress: EgressClient, peer: WebPeer, media_type: str) -> None:
    peer.bytes("/", b'{"a": "<b>"}', {"content-type": media_type})
    assert await result_of(url_resolver(egress), url=peer.url()) == f'URL: {peer.url("/")}\n\n{{"a": "<b>"}}'


@pytest.mark.parametrize(
    "media_type", ["image/png", "application/pdf", "application/octet-stream", "text/html", ""]
)
async def test_what_is_not_text_is_refused_with_a_sentence(
    egress: EgressClient, peer: WebPeer, media_type: str
) -> None:
    peer.bytes("/", b"\x89PNG\x00\x01", {"content-type": media_type})
    failure = await failure_of(url_resolver(egress), url=peer.url())
    assert failure.error_class == "not_text"
    assert "has no text to read" in str(failure)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 429, 500, 503, 304, 599])
async def test_an_http_error_is_a_sentence(egress: EgressClient, peer: WebPeer, status: int) -> None:
    peer.bytes("/", b"", {}, status)
    failure = await failure_of(url_resolver(egress), url=peer.url())
    assert failure.error_class == f"http_{status}"
    assert f"answered {status}" in str(failure)


@pytest.mark.parametrize(
    "url", ["10.0.0.1", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "[::1]"]
)
async def test_denied_and_unreachable_addresses_read_alike(egress: EgressClient, url: str) -> None:
    failure = await failure_of(url_resolver(egress), url=url)
    assert (str(failure), failure.error_class) == (DENIED_SENTENCE, "unreachable")
