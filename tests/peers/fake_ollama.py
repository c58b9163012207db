"""An Ollama on loopback: /api/tags, /api/show and /api/chat, following the script of `tests.peers`.

`async with FakeOllama() as peer: Ollama(peer.base_url)`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson
from aiohttp import web

from tests.peers import INPUT_TOKENS, OUTPUT_TOKENS, Scene, pieces_of
from tests.peers.model_server import Handler, ModelServer, ended, torn, value_of, whole

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


class FakeOllama(ModelServer):
    """The peer; `shows` counts who was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.shows: Counter[str] = Counter()

    def routes(self) -> Iterable[tuple[str, str, Handler]]:
        yield "GET", "/api/tags", self._tags
        yield "POST", "/api/show", self._show
        yield "POST", "/api/chat", self.counted(self._play)

    async def _tags(self, _: web.Request) -> web.Response:
        models = [{"name": name, "model": name, "digest": f"digest of {name}", "size": 1} for name in SHOWN]
        return web.json_response({"models": models})

    async def _show(self, request: web.Request) -> web.Response:
        name = (await request.json())["model"]
        self.shows[name] += 1
        return web.json_response(SHOWN[name] | {"template": "", "license": "none"})

    async def _play(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        scene = self._scene(body["messages"])
        refused = await self.refused(scene, {"error": scene.error}, {})
        if refused is not None:
            return refused
        lines = (
            [scene.body] if scene.body else [orjson.dumps(frame) for frame in _frames(scene, body["stream"])]
        )
        if not body["stream"]:
            return await whole(request, scene, lines[0])
        return await self._stream(request, scene, lines)

    def _scene(self, messages: list[dict[str, Any]]) -> Scene:
        last = max(at for at, message in enumerate(messages) if message["role"] == "user")
        text = messages[last]["content"]
        results = [message["content"] for message in messages[last + 1 :] if message["role"] == "tool"]
        return self.scene(text, results)

    async def _stream(self, request: web.Request, scene: Scene, lines: list[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for number, line in enumerate(lines):
            await torn(response, line + b"\n")
            if scene.pause and number == 0:
                await self.resume.wait()
            if scene.cut and number == 1:
                break
        return await ended(request, scene, response)


def _frames(scene: Scene, streamed: bool) -> list[dict[str, Any]]:
    calls = [{"function": {"name": name, "arguments": value_of(raw)}} for name, raw in scene.tools]
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
