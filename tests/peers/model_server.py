"""What the HTTP peers of models have in common: they serve on loopback, count attempts, and break connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import orjson
from aiohttp import web

from tests.peers import Scene, scene_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ModelServer:
    """The peer: what it received, and the events a test steers it with."""

    def __init__(self) -> None:
        self.base_url = ""
        self.resume = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.requests: list[dict[str, Any]] = []
        self._attempts: Counter[str] = Counter()
        self._busy = 0
        self._runner: web.AppRunner | None = None

    def routes(self) -> Iterable[tuple[str, str, Handler]]:
        """Method, path and handler of everything that is served."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        app = web.Application()
        for method, path, handler in self.routes():
            app.router.add_route(method, path, handler)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        self.resume.set()
        await self._runner.cleanup()

    def counted(self, handler: Handler) -> Handler:
        """`handler`, while which runs the peer is not idle."""

        async def count(request: web.Request) -> web.StreamResponse:
            self._busy += 1
            self.idle.clear()
            try:
                return await handler(request)
            finally:
                self._busy -= 1
                if not self._busy:
                    self.idle.set()

        return count

    def scene(self, text: str, results: Sequence[str]) -> Scene:
        """What to do about the user's last words, of which this is one more attempt."""
        self._attempts[text] += 1
        return scene_of(text, results, self._attempts[text])

    async def refused(
        self, scene: Scene, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> web.StreamResponse | None:
        """Take the time that the scene takes; its error, if it is one."""
        await asyncio.sleep(scene.slow_s)
        if scene.hang:
            await asyncio.Event().wait()
        if scene.status == 200:
            return None
        retry = {} if scene.retry_after_s is None else {"Retry-After": str(scene.retry_after_s)}
        return web.json_response(body, status=scene.status, headers={**headers, **retry})


async def whole(request: web.Request, scene: Scene, body: bytes) -> web.StreamResponse:
    """An answer in one piece, as far as the scene lets it come."""
    if scene.cut == "truncate":
        body = body[: len(body) // 2]
    if scene.cut != "reset":
        return web.Response(body=body, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[:-10])
    reset(request)
    return response


async def torn(response: web.StreamResponse, piece: bytes) -> None:
    """Send in two pieces, so that frames and characters arrive torn."""
    middle = len(piece) * 2 // 3
    await response.write(piece[:middle])
    await response.write(piece[middle:])


async def ended(request: web.Request, scene: Scene, response: web.StreamResponse) -> web.StreamResponse:
    """End a stream properly, or not."""
    if scene.cut == "reset":
        reset(request)
    else:
        await response.write_eof()
    return response


def reset(request: web.Request) -> None:
    """Break the connection with RST: lingering for no time makes the kernel send it instead of FIN."""
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


def value_of(raw: str) -> object:
    """Providers parse the arguments themselves; a model's broken JSON comes as a string."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw
