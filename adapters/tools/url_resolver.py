"""Tool `url_resolver`: what a web address holds (SOP §4.1)."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated

from annotated_types import Len
from pydantic import Field

from adapters.tools.html_text import readable
from adapters.tools.http_answers import check_status, is_html, text_of
from adapters.tools.tool import tool
from domain.ports import Effect, Egress, Fetched, Tool

TIMEOUT_S = 20.0
PAGE_BYTES_MAX = 5_000_000
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_HEADERS = {"Accept": "text/html,application/xhtml+xml,application/json,text/*;q=0.9,*/*;q=0.5"}


def url_resolver(egress: Egress) -> Tool:
    """The tool, reading through `egress`."""

    @tool(timeout_s=TIMEOUT_S, effect=Effect.PURE)
    async def url_resolver(
        url: Annotated[
            str,
            Len(1, 8_000),
            Field(description="A web address; https:// is added when the scheme is missing"),
        ],
    ) -> str:
        """Fetch a web page or text file and return its title, its final address and its readable text."""
        address = with_scheme(url.strip())
        answer = await egress.fetch(
            "GET", address, headers=_HEADERS, timeout_s=TIMEOUT_S, size_bytes_max=PAGE_BYTES_MAX
        )
        check_status(answer, answer.url)
        return await asyncio.to_thread(_shown, answer)

    return url_resolver


def with_scheme(url: str) -> str:
    """`url`, with https:// before it if it names no scheme."""
    return url if _SCHEME.match(url) else "https://" + url.removeprefix("//")


def _shown(answer: Fetched) -> str:
    text = text_of(answer, answer.url)
    if not is_html(answer):
        return f"URL: {answer.url}\n\n{text}"
    page = readable(text)
    title = f"Title: {page.title}\n" if page.title else ""
    return f"{title}URL: {answer.url}\n\n{page.text or '(the page has no text)'}"
