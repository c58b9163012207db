"""Talking to a running server as any client does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from oshaani.cli.show import plain
from oshaani.cli.trouble import Failed

CONNECT_S, ANSWER_S = 3.0, 150.0  # a chat call waits for its answer
ANSWER_BYTES_MAX = 5_000_000
DETAIL_CHARS_MAX = 300


class NotOshaani(Failed):
    """Something answers, and it is another kind of server."""


class Api:
    """One client: it keeps its cookies, whatever the address of the server."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session, self.base_url = session, base_url
        self.cookies: dict[str, str] = {}

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON object that answers; see `ask`."""
        return await self.ask("GET", path, None, headers)

    async def post(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON object that answers; see `ask`."""
        return await self.ask("POST", path, body, headers)

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """Send one request.

        Raises:
            Failed: no server, another kind of server, or an answer that is not 2xx.
        """
        status, found = await self.exchange(method, path, body, headers)
        if not 200 <= status < 300:
            said = plain(str(found.get("detail") or found.get("error") or ""), DETAIL_CHARS_MAX)
            raise Failed(f"{method} {path} was answered with {status}: {said}")
        return found

    async def exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None
    ) -> tuple[int, dict[str, Any]]:
        """As `ask`, with the status whatever it is."""
        sent = {**(headers or {}), "Accept": "application/json"}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            sent["X-CSRF-Token"] = next(
                (value for name, value in self.cookies.items() if name.endswith("csrf")), ""
            )
        try:
            async with self._session.request(
                method, self.base_url + path, json=body, headers=sent, allow_redirects=False
            ) as answer:
                self.cookies |= {name: morsel.value for name, morsel in answer.cookies.items()}
                return answer.status, self._object(await answer.content.read(ANSWER_BYTES_MAX))
        except aiohttp.ServerTimeoutError as late:
            raise Failed(f"the server at {self.base_url} did not answer in time") from late
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            raise Failed(
                f"no server answers at {self.base_url}; start one with `oshaani up`, or name it with --url"
            ) from failure

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = orjson.loads(content)
        except orjson.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise NotOshaani(f"what answers at {self.base_url} is not Oshaani; name the server with --url")
        return found


@asynccontextmanager
async def api_at(base_url: str, answer_s: float = ANSWER_S) -> AsyncIterator[Api]:
    """A client of the server at `base_url`.

    Raises:
        Failed: that is not an address.
    """
    if urlsplit(base_url).scheme not in ("http", "https"):
        raise Failed(f"{base_url!r} is not an address; write it like http://127.0.0.1:8080")
    timeout = aiohttp.ClientTimeout(answer_s, sock_connect=CONNECT_S)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar, json_serialize=_json) as session:
        yield Api(session, base_url.rstrip("/"))


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
