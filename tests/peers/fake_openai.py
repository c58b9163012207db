"""An OpenAI-compatible upstream on loopback, fast enough to measure others against.

In a test: `async with FakeOpenAI() as peer: OpenAIWire(peer.base_url)`. As a program:

    python -m tests.peers.fake_openai --port N [--delay-ms D] [--script file.json]

It follows the script of `tests.peers`. A script file is a JSON object `{"words": "what to do"}`: where the last user
message contains the words, the peer reads the other text in its place (an answer, or directives in brackets).
`GET /__count` tells how many chat completions came, and how many for each idempotency key.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import struct
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import orjson

from tests.peers import CACHED_TOKENS, INPUT_TOKENS, OUTPUT_TOKENS, Scene, pieces_of, scene_of

MODEL = "fake-model"
RECEIVED_MAX = 1_000
USAGE = {
    "prompt_tokens": INPUT_TOKENS + CACHED_TOKENS,
    "completion_tokens": OUTPUT_TOKENS,
    "total_tokens": INPUT_TOKENS + CACHED_TOKENS + OUTPUT_TOKENS,
    "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
}
MODELS = {
    "object": "list",
    "data": [
        {"id": MODEL, "object": "model", "created": 1, "owned_by": "peer", "max_model_len": 8192},
        {"id": "text-embedding-fake", "object": "model", "created": 1, "owned_by": "peer"},
    ],
}


def _answer(status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %d %s\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n"
    return head % (status, b"OK" if status == 200 else b"No", content_type, len(body), extra) + body


def _message(scene: Scene) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": scene.text or None}
    if scene.tools:
        message["tool_calls"] = [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": raw}}
            for index, (name, raw) in enumerate(scene.tools)
        ]
    return message


def _whole(scene: Scene) -> bytes:
    choice = {"index": 0, "message": _message(scene), "finish_reason": scene.reason}
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [choice],
    }
    return orjson.dumps(completion | ({"usage": USAGE} if scene.usage else {}))


def _chunk(choices: list[dict[str, Any]], **more: object) -> bytes:
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": choices,
    }
    return b"data: " + orjson.dumps(chunk | more) + b"\n\n"


def _delta(delta: dict[str, Any], reason: str | None = None) -> bytes:
    return _chunk([{"index": 0, "delta": delta, "finish_reason": reason}])


def _stream(scene: Scene) -> list[bytes]:
    """The events of a streamed completion; parallel tool calls interleave their fragments."""
    events = [_delta({"role": "assistant", "content": ""})]
    events += [_delta({"content": piece}) for piece in pieces_of(scene.text)]
    for index, (name, _) in enumerate(scene.tools):
        function = {"name": name, "arguments": ""}
        call = {"index": index, "id": f"call_{index}", "type": "function", "function": function}
        events.append(_delta({"tool_calls": [call]}))
    for half in (0, 1):
        for index, (_, raw) in enumerate(scene.tools):
            middle = len(raw) // 2
            fragment = {"arguments": raw[middle:] if half else raw[:middle]}
            events.append(_delta({"tool_calls": [{"index": index, "function": fragment}]}))
    events.append(_delta({}, scene.reason))
    if scene.usage:
        events.append(_chunk([], usage=USAGE))
    return [*events, b"data: [DONE]\n\n"]


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_PLAIN_ANSWER = _answer(200, _whole(Scene()))
_PLAIN_STREAM = _EVENT_STREAM + b"".join(map(_chunked, _stream(Scene()))) + _LAST_CHUNK


class FakeOpenAI:
    """The peer: what it received, and the events a test steers it with."""

    def __init__(self, delay_s: float = 0.0, script: Mapping[str, str] | None = None) -> None:
        self.base_url = ""
        self.resume = asyncio.Event()
        self.idle = asyncio.Event()
        self.received: deque[tuple[dict[str, str], bytes]] = deque(maxlen=RECEIVED_MAX)
        self.total = 0
        self.by_key: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.delay_s = delay_s
        self.script = script or {}
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies of the last chat completions."""
        return [orjson.loads(body) for _, body in self.received]

    async def start(self, port: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port, backlog=1024)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in tuple(self.connections):
            connection.abort()
        await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def scene(self, body: bytes, key: str) -> Scene:
        """What to do with a request, by its last user message and what tools have answered since."""
        messages = orjson.loads(body)["messages"]
        last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
        text = messages[last]["content"] if last >= 0 else ""
        text = next((what for words, what in self.script.items() if words in text), None) or text
        results = [message["content"] for message in messages[last + 1 :] if message["role"] == "tool"]
        self.attempts[key or text] += 1
        scene = scene_of(text, results, self.attempts[key or text])
        replaced = any(words in messages[last]["content"] for words in self.script) if last >= 0 else False
        return Scene(text=text) if replaced and "[[" not in text and not results else scene


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection. Requests without a script are answered from ready bytes."""

    def __init__(self, peer: FakeOpenAI) -> None:
        self._peer = peer
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._peer.connections.add(self)
        self._peer.idle.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._peer.connections.discard(self)
        if not self._peer.connections:
            self._peer.idle.set()
        if self._task is not None:
            self._task.cancel()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            at = head.lower().find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body = self._buffer[end + 4 : end + 4 + size]
            self._buffer = self._buffer[end + 4 + size :]
            self._handle(head, body)

    def _handle(self, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1]
        if path.endswith(b"/chat/completions"):
            self._complete(head, body)
        elif path == b"/__count":
            counts = {"total": self._peer.total, "by_key": self._peer.by_key}
            self._transport.write(_answer(200, orjson.dumps(counts)))
        elif path.endswith(b"/models"):
            self._transport.write(_answer(200, orjson.dumps(MODELS)))
        else:
            self._transport.write(_answer(404, b'{"error": {"message": "no such path"}}'))

    def _complete(self, head: bytes, body: bytes) -> None:
        peer = self._peer
        headers = _headers(head)
        key = headers.get("idempotency-key", "")
        peer.total += 1
        if key:
            peer.by_key[key] += 1
        peer.received.append((headers, body))
        streamed = b'"stream":true' in body
        if b"[[" not in body and not peer.script and b'"role":"tool"' not in body:
            ready = _PLAIN_STREAM if streamed else _PLAIN_ANSWER
            if peer.delay_s:
                asyncio.get_running_loop().call_later(peer.delay_s, self._transport.write, ready)
            else:
                self._transport.write(ready)
            return
        self._task = asyncio.ensure_future(self._play(peer.scene(body, key), streamed))

    async def _play(self, scene: Scene, streamed: bool) -> None:
        await asyncio.sleep(self._peer.delay_s + scene.slow_s)
        if scene.hang:
            await asyncio.Event().wait()
        elif scene.status != 200:
            extra = b"retry-after: %d\r\n" % scene.retry_after_s if scene.retry_after_s is not None else b""
            error = {"error": {"message": scene.error, "type": "peer_error", "code": None}}
            self._transport.write(_answer(scene.status, orjson.dumps(error), extra=extra))
        elif streamed:
            await self._play_stream(scene)
        else:
            body = scene.body or _whole(scene)
            if scene.cut == "truncate":
                body = body[: len(body) // 2]
            whole = _answer(200, body)
            self._transport.write(whole[:-10] if scene.cut == "reset" else whole)
            if scene.cut == "reset":
                await self._reset()

    async def _play_stream(self, scene: Scene) -> None:
        write = self._transport.write
        if scene.body is not None:
            write(_EVENT_STREAM + _chunked(b"data: " + scene.body + b"\n\n") + _LAST_CHUNK)
            return
        write(_EVENT_STREAM)
        events = _stream(scene)
        for number, event in enumerate(events):
            # In two pieces, so that lines and characters arrive torn.
            middle = len(event) * 2 // 3
            write(_chunked(event[:middle]))
            await asyncio.sleep(0)
            write(_chunked(event[middle:]))
            if scene.pause and number == 1:
                await self._peer.resume.wait()
            if scene.cut and number == 2:
                break
        if scene.cut == "reset":
            await self._reset()
        else:
            write(_LAST_CHUNK)

    async def _reset(self) -> None:
        # One round of the loop, so that what was written leaves before the connection does.
        await asyncio.sleep(0)
        # Lingering for no time makes the kernel send RST instead of FIN.
        connection = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def serve(port: int, delay_s: float, script: Mapping[str, str]) -> None:
    """Run the peer until it is ended; prints its address once it listens."""
    peer = FakeOpenAI(delay_s, script)
    await peer.start(port)
    print(peer.base_url, flush=True)  # noqa: T201 - how the one who started it learns that it listens.
    await asyncio.Event().wait()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="fake_openai", description="An OpenAI-compatible upstream for tests."
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--script", type=Path)
    options = parser.parse_args()
    script = json.loads(options.script.read_text()) if options.script else {}
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.port, options.delay_ms / 1000, script))


if __name__ == "__main__":
    main()
