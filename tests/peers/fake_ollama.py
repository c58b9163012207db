"""An Ollama on loopback: /api/tags, /api/show and /api/chat, following the script of `tests.peers`.

`async with FakeOllama() as peer: Ollama(peer.base_url)`
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from typing import Any, Self

import orjson
from aiohttp import web

from tests.peers import INPUT_TOKENS, OUTPUT_TOKENS, Scene, pieces_of, scene_of

MODEL = "fake-model:latest"
CONTEXT_TOKENS = 4096
SHOWN: dict[str, dict[str, Any]] = {
    MODEL: {"capabilities": ["completion", "tools"], "model_info": {"fake.context_length": CONTEXT_TOKENS}},
    "fake-eyes:latest": {
        "capabilities": ["completion", "vision"],
        "model_info": {"fake.context_length": 131_072},
    },
    "fake-embedder:latest": {"capabilities": ["embedding"], "model_info": {}},
}
_DONE_REASONS = {"length": "length"}


class FakeOllama:
    """The peer: what it received, and the events a test steers it with."""

    def __init__(self) -> None:
        self.base_url = ""
        self.resume = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.requests: list[dict[str, Any]] = []
        self.shows: Counter[str] = Counter()
        self._attempts: Counter[str] = Counter()
        self._busy = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/api/tags", self._tags)
        app.router.add_post("/api/show", self._show)
        app.router.add_post("/api/chat", self._chat)
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

    async def _tags(self, _: web.Request) -> web.Response:
        models = [{"name": name, "model": name, "digest": f"digest of {name}", "size": 1} for name in SHOWN]
        return web.json_response({"models": models})

    async def _show(self, request: web.Request) -> web.Response:
        name = (await request.json())["model"]
        self.shows[name] += 1
        return web.json_response(SHOWN[name] | {"template": "", "license": "none"})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._busy += 1
        self.idle.clear()
        try:
            return await self._play(request)
        finally:
            self._busy -= 1
            if not self._busy:
                self.idle.set()

    async def _play(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        scene = self._scene(body["messages"])
        await asyncio.sleep(scene.slow_s)
        if scene.hang:
            await asyncio.Event().wait()
        if scene.status != 200:
            headers = {"Retry-After": str(scene.retry_after_s)} if scene.retry_after_s is not None else None
            return web.json_response({"error": scene.error}, status=scene.status, headers=headers)
        lines = (
            [scene.body] if scene.body else [orjson.dumps(frame) for frame in _frames(scene, body["stream"])]
        )
        if not body["stream"]:
            return await self._whole(request, scene, lines[0])
        return await self._stream(request, scene, lines)

    def _scene(self, messages: list[dict[str, Any]]) -> Scene:
        last = max(at for at, message in enumerate(messages) if message["role"] == "user")
        text = messages[last]["content"]
        self._attempts[text] += 1
        results = [message["content"] for message in messages[last + 1 :] if message["role"] == "tool"]
        return scene_of(text, results, self._attempts[text])

    async def _whole(self, request: web.Request, scene: Scene, body: bytes) -> web.StreamResponse:
        if scene.cut == "truncate":
            body = body[: len(body) // 2]
        if scene.cut != "reset":
            return web.Response(body=body, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[:-10])
        reset(request)
        return response

    async def _stream(self, request: web.Request, scene: Scene, lines: list[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for number, line in enumerate(lines):
            # In two pieces, so that lines and characters arrive torn.
            middle = len(line) * 2 // 3
            await response.write(line[:middle])
            await response.write(line[middle:] + b"\n")
            if scene.pause and number == 0:
                await self.resume.wait()
            if scene.cut and number == 1:
                break
        if scene.cut == "reset":
            reset(request)
        else:
            await response.write_eof()
        return response


def _frames(scene: Scene, streamed: bool) -> list[dict[str, Any]]:
    calls = [{"function": {"name": name, "arguments": _value(raw)}} for name, raw in scene.tools]
    last: dict[str, Any] = {"done": True, "done_reason": _DONE_REASONS.get(scene.reason, "stop")}
    if scene.usage:
        last |= {"prompt_eval_count": INPUT_TOKENS, "eval_count": OUTPUT_TOKENS}
    if not streamed:
        return [{"model": MODEL, "message": _message(scene.text, calls)} | last]
    frames = [{"model": MODEL, "message": _message(piece), "done": False} for piece in pieces_of(scene.text)]
    # Ollama sends each tool call as soon as it is whole, in a frame of its own.
    frames += [{"model": MODEL, "message": _message("", [call]), "done": False} for call in calls]
    return [*frames, {"model": MODEL, "message": _message("")} | last]


def _message(content: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


def _value(raw: str) -> object:
    """Ollama parses the arguments itself; what it cannot parse a model server may hand on as a string."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw


def reset(request: web.Request) -> None:
    """Break the connection with RST: lingering for no time makes the kernel send it instead of FIN."""
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
