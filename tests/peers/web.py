"""A web server on this machine that answers as a test wants, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

Answer = web.StreamResponse | Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class WebPeer:
    """Routes by path. What was not told answers 404."""

    host: str = "127.0.0.1"
    port: int = 0
    scheme: str = "http"
    seen: list[Seen] = field(default_factory=list)
    answers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = field(default_factory=dict)

    def url(self, path: str = "/", host: str | None = None) -> str:
        """The address of `path`, under another name of this machine if one is given."""
        return f"{self.scheme}://{host or self.host}:{self.port}{path}"

    def text(self, path: str, text: str, **headers: str) -> None:
        """Answer with text; `content_type` and other headers by keyword, with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.bytes(path, text.encode(), {"content-type": "text/plain; charset=utf-8", **named})

    def json(self, path: str, text: str, status: int = 200) -> None:
        """Answer with JSON."""
        self.bytes(path, text.encode(), {"content-type": "application/json"}, status)

    def bytes(self, path: str, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        """Answer with exactly these bytes and headers."""

        async def answer(_: web.Request) -> web.Response:
            return web.Response(status=status, body=body, headers=headers)

        self.answers[path] = answer

    def redirect(self, path: str, location: str, status: int = 302) -> None:
        """Answer with a redirect."""
        self.bytes(path, b"", {"location": location}, status)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append(Seen(request.method, request.path_qs, headers, await request.read()))
        answer = self.answers.get(request.path)
        return web.Response(status=404, text="not told") if answer is None else await answer(request)


@asynccontextmanager
async def web_peer(ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[WebPeer]:
    """Serve on a free port of the loopback address."""
    peer = WebPeer(scheme="https" if ssl_context else "http")
    app = web.Application(client_max_size=20_000_000)
    app.router.add_route("*", "/{path:.*}", peer._serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, peer.host, 0, ssl_context=ssl_context)
    await site.start()
    peer.port = runner.addresses[0][1]
    try:
        yield peer
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_peer(answer: bytes, *, hold: bool = False) -> AsyncIterator[int]:
    """Serve `answer` byte for byte to whoever connects, then close, or with `hold` never; gives the port."""
    held: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(answer)
        if hold:
            held.add(writer)
        else:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for writer in held:
            writer.close()
        server.close()
