"""Chat models that run in Ollama (https://github.com/ollama/ollama/blob/main/docs/api.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import orjson
from aiohttp import ClientResponse
from yarl import URL

from adapters.chat_models.http import Upstream
from adapters.chat_models.limits import (
    CARDS_MAX,
    CARDS_TIMEOUT_S,
    class_of_status,
    clean_text,
    estimated_usage,
    fault,
    provider_words,
    retry_after_s,
    sent_arguments,
    wire_name,
)
from adapters.chat_models.reply import ReplyParts
from domain import ports

LABEL = "Ollama"
DEFAULT_PORT = 11434
NUM_CTX = 8_192
"""Asked for on every call: Ollama's own default is smaller, and a changed value makes it load the model anew."""
SHOWN_AT_ONCE_MAX = 8


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _ToolCall(msgspec.Struct):
    id: str | None = None
    function: _Function | None = None


class _Content(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Frame(msgspec.Struct):
    """A whole answer, or one line of a streamed one; the counts stand in the one that says `done`."""

    message: _Content | None = None
    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    error: str | None = None


class _Details(msgspec.Struct):
    """What `/api/show` says of a model. `capabilities` is missing in Ollama before 0.6.4."""

    capabilities: list[str] | None = None
    model_info: dict[str, Any] = {}
    template: str = ""


_frame = msgspec.json.Decoder(_Frame)
_details = msgspec.json.Decoder(_Details)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_UNKNOWN = _Details(capabilities=["completion"])


class Ollama:
    """An Ollama server. `host` is what OLLAMA_HOST may hold: an address, or a bare host with or without port."""

    provider = "ollama"

    def __init__(self, host: str, *, num_ctx: int = NUM_CTX) -> None:
        base = _base_of(host)
        self._upstream = Upstream(base, LABEL, {"Content-Type": "application/json"})
        self._chat_url = base / "api" / "chat"
        self._tags_url = base / "api" / "tags"
        self._show_url = base / "api" / "show"
        self._num_ctx = num_ctx
        # By name and digest: a pulled update of a model is looked at again.
        self._shown: dict[tuple[str, str], _Details] = {}
        self._context_tokens: dict[str, int] = {}

    async def cards(self) -> Sequence[ports.ModelCard]:
        """The models Ollama holds that can chat, last changed first; empty when it does not answer in time."""
        try:
            async with self._upstream.deadline(CARDS_TIMEOUT_S):
                names = await self._names()
                places = asyncio.Semaphore(SHOWN_AT_ONCE_MAX)
                shown = await asyncio.gather(*(self._show(name, digest, places) for name, digest in names))
        except ports.ModelFault:
            return ()
        cards = [
            self._card(name, details)
            for (name, _), details in zip(names, shown, strict=True)
            if details.capabilities is None or "completion" in details.capabilities
        ]
        self._context_tokens = {card.display_name: card.context_tokens or self._num_ctx for card in cards}
        return cards

    async def _names(self) -> list[tuple[str, str]]:
        async with self._upstream.session().get(self._tags_url, allow_redirects=False) as response:
            listed = _json(await self._upstream.body(response)) if response.status == 200 else {}
        models = listed.get("models")
        found = [
            (model["name"], str(model.get("digest", "")))
            for model in (models if isinstance(models, list) else [])[:CARDS_MAX]
            if isinstance(model, dict) and isinstance(model.get("name"), str)
        ]
        self._shown = {key: details for key, details in self._shown.items() if key in found}
        return found

    async def _show(self, name: str, digest: str, places: asyncio.Semaphore) -> _Details:
        if known := self._shown.get((name, digest)):
            return known
        async with (
            places,
            self._upstream.session().post(
                self._show_url, data=orjson.dumps({"model": name}), allow_redirects=False
            ) as response,
        ):
            body = await self._upstream.body(response)
            try:
                details = _details.decode(body) if response.status == 200 else None
            except _MALFORMED:
                details = None
        if details is None:
            return _UNKNOWN
        self._shown[name, digest] = details
        return details

    def _card(self, name: str, details: _Details) -> ports.ModelCard:
        lengths = (n for key, n in details.model_info.items() if key.endswith(".context_length"))
        length = next((n for n in lengths if isinstance(n, int) and n > 0), self._num_ctx)
        capabilities = details.capabilities
        return ports.ModelCard(
            name=f"{self.provider}:{clean_text(name)}",
            provider=self.provider,
            display_name=clean_text(name),
            tools=".Tools" in details.template if capabilities is None else "tools" in capabilities,
            vision="vision" in (capabilities or ()),
            context_tokens=min(length, self._num_ctx),
            price_class="local",
        )

    async def complete(
        self, request: ports.ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ports.ModelReply:
        """Ask once; see `domain.ports.ChatModel.complete`."""
        num_ctx = self._context_tokens.get(request.model, self._num_ctx)
        if estimated_usage(request, 0).input > num_ctx:
            # Ollama would drop the beginning of the prompt without a word.
            raise fault(ports.ModelErrorClass.CONTEXT_TOO_LONG, LABEL, f"about {num_ctx} tokens fit")
        parts = ReplyParts(request, LABEL, on_text)
        body = _body(request, streamed=on_text is not None, num_ctx=num_ctx)
        async with (
            self._upstream.deadline(request.timeout_s),
            self._upstream.session().post(self._chat_url, data=body, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise await _refusal(self._upstream, response, request)
            if on_text is None:
                last = _take(await self._upstream.body(response), parts, request)
                return parts.finished(_reason_of(last), _usage_of(last))
            async for line in self._upstream.lines(response):
                frame = _take(line, parts, request)
                if frame.done:
                    return parts.finished(_reason_of(frame), _usage_of(frame))
            raise fault(ports.ModelErrorClass.GARBAGE, LABEL, "the stream ended before the reply did")

    async def close(self) -> None:
        """Close the connections."""
        await self._upstream.close()


def _base_of(host: str) -> URL:
    """The address for OLLAMA_HOST, which Ollama itself also takes as a bare host or as the address to listen on."""
    host = host.strip().rstrip("/")
    base = URL(host if "://" in host else f"http://{host}")
    if "://" not in host and base.explicit_port is None:
        base = base.with_port(DEFAULT_PORT)
    return base.with_host("127.0.0.1") if base.host == "0.0.0.0" else base  # noqa: S104 - replaced, not bound.


def _body(request: ports.ModelRequest, streamed: bool, num_ctx: int) -> bytes:
    names = {asked.id: asked.name for message in request.messages for asked in message.tool_requests}
    messages: list[dict[str, Any]] = [{"role": "system", "content": request.system}] if request.system else []
    messages.extend(_wire_message(message, names) for message in request.messages)
    options: dict[str, Any] = {"num_ctx": num_ctx}
    if request.max_output_tokens is not None:
        options["num_predict"] = request.max_output_tokens
    if request.temperature is not None:
        options["temperature"] = request.temperature
    body: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "stream": streamed,
        "options": options,
    }
    if request.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
            }
            for t in request.tools
        ]
    return orjson.dumps(body)


def _wire_message(message: ports.Message, names: Mapping[str, str]) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "tool":
        # Ollama knows results by the tool's name; it has no ids.
        wire["tool_name"] = wire_name(names.get(message.tool_call_id or "", "tool"))
    elif message.tool_requests:
        wire["tool_calls"] = [
            {"function": {"name": wire_name(asked.name), "arguments": sent_arguments(asked)}}
            for asked in message.tool_requests
        ]
    return wire


def _take(data: bytes, parts: ReplyParts, request: ports.ModelRequest) -> _Frame:
    """Move one frame's text and tool requests over."""
    try:
        frame = _frame.decode(data)
    except _MALFORMED as malformed:
        raise fault(ports.ModelErrorClass.GARBAGE, LABEL) from malformed
    if frame.error is not None:
        raise _fault_of(500, frame.error, request, None)
    if frame.message is None and not frame.done:
        raise fault(ports.ModelErrorClass.GARBAGE, LABEL)
    message = frame.message or _Content()
    parts.add_text(message.content or "")
    for call in message.tool_calls or ():
        function = call.function or _Function()
        parts.add_tool(call.id or "", function.name or "", function.arguments)
    return frame


def _reason_of(frame: _Frame) -> ports.FinishReason:
    return "length" if frame.done_reason == "length" else "stop"


def _usage_of(frame: _Frame) -> ports.TokenUsage | None:
    """Ollama's counts; None when it left one out, as some versions do when the prompt was cached."""
    if frame.prompt_eval_count is None or frame.eval_count is None:
        return None
    return ports.TokenUsage(max(frame.prompt_eval_count, 0), max(frame.eval_count, 0))


async def _refusal(
    upstream: Upstream, response: ClientResponse, request: ports.ModelRequest
) -> ports.ModelFault:
    error = _json(await upstream.error_body(response)).get("error")
    message = error if isinstance(error, str) else ""
    return _fault_of(response.status, message, request, retry_after_s(response.headers))


def _fault_of(
    status: int, message: str, request: ports.ModelRequest, retry_after: float | None
) -> ports.ModelFault:
    words = provider_words(message, request)
    return fault(class_of_status(status, message=message), LABEL, words, retry_after)


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
