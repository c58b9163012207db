"""The HTTP side of a provider: one session for its whole life, bounded reading, every failure as a ModelFault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from adapters.chat_models.limits import (
    ERROR_BODY_BYTES_MAX,
    REPLY_BYTES_MAX,
    STREAM_BYTES_MAX,
    fault,
)
from domain.ports import ModelErrorClass

DNS_TTL_S = 60
KEEPALIVE_S = 15.0


class Upstream:
    """A provider's session and address. `label` is what sentences call the provider."""

    def __init__(self, base: URL, label: str, headers: Mapping[str, str]) -> None:
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError(f"{label}: {str(base.with_user(None))!r} is not an http(s) address")
        self.base = base
        self.label = label
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "oshaani", **headers}
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        """The one session, made on first use because it belongs to the running loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0, ttl_dns_cache=DNS_TTL_S, keepalive_timeout=KEEPALIVE_S
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                # One deadline rules each call: `deadline`. aiohttp's own would only add timers.
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    @asynccontextmanager
    async def deadline(self, timeout_s: float) -> AsyncIterator[None]:
        """Bound what happens inside to `timeout_s` and turn what aiohttp raises into a ModelFault."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as timeout:
            raise fault(ModelErrorClass.TIMEOUT, self.label) from timeout
        except aiohttp.ClientResponseError as broken:
            raise fault(ModelErrorClass.GARBAGE, self.label, "the answer is not HTTP") from broken
        except aiohttp.ClientPayloadError as broken:
            # The body is shorter than its own framing said: the connection broke, whoever broke it.
            words = "the connection broke off in the middle of the answer"
            raise fault(ModelErrorClass.UNREACHABLE, self.label, words) from broken
        except (aiohttp.ClientError, OSError) as broken:
            raise fault(ModelErrorClass.UNREACHABLE, self.label) from broken

    async def body(self, response: aiohttp.ClientResponse, size_bytes_max: int = REPLY_BYTES_MAX) -> bytes:
        """The whole body, unless it is larger than the limit.

        Raises:
            ModelFault: TOO_LARGE.
        """
        length = response.content_length
        if length is not None and length <= size_bytes_max and "Content-Encoding" not in response.headers:
            return await response.read()
        received = bytearray()
        async for piece in response.content.iter_any():
            received += piece
            if len(received) > size_bytes_max:
                raise fault(ModelErrorClass.TOO_LARGE, self.label, f"more than {size_bytes_max} bytes")
        return bytes(received)

    async def error_body(self, response: aiohttp.ClientResponse) -> bytes:
        """The first `ERROR_BODY_BYTES_MAX` bytes of an answer that is an error."""
        received = bytearray()
        async for piece in response.content.iter_any():
            received += piece
            if len(received) >= ERROR_BODY_BYTES_MAX:
                break
        return bytes(received[:ERROR_BODY_BYTES_MAX])

    async def lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The lines of a streamed body without their ends; the last one may lack a newline.

        Raises:
            ModelFault: TOO_LARGE, for one line or for the whole stream.
        """
        rest = b""
        total = 0
        async for piece in response.content.iter_any():
            total += len(piece)
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")
            if len(rest) > REPLY_BYTES_MAX or total > STREAM_BYTES_MAX:
                raise fault(ModelErrorClass.TOO_LARGE, self.label, f"a stream of more than {total - 1} bytes")
        if rest:
            yield rest.rstrip(b"\r")

    async def close(self) -> None:
        """Close the session; a later call makes a new one."""
        if self._session is not None:
            await self._session.close()
            self._session = None
