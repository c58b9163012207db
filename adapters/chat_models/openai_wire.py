"""Chat models of any upstream that speaks OpenAI's Chat Completions: OpenAI, vLLM, LM Studio, llama.cpp, gateways.

Source of the format: https://platform.openai.com/docs/api-reference/chat. Where upstreams differ from it in ways
that are widespread and harmless (missing ids, indexes, usage or `[DONE]`), both forms are accepted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import ip_address
from typing import Any

import msgspec
import orjson
from aiohttp import ClientResponse
from yarl import URL

from adapters.chat_models.http import Upstream
from adapters.chat_models.limits import (
    CARDS_MAX,
    CARDS_TIMEOUT_S,
    PriceClass,
    class_of_status,
    clean_text,
    fault,
    provider_words,
    retry_after_s,
    sent_arguments,
    wire_name,
)
from adapters.chat_models.reply import ReplyParts
from domain import ports

_FINISH_REASONS: dict[str | None, ports.FinishReason] = {
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_STATUS_OF_CODE = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "insufficient_quota": 429,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "context_length_exceeded": 400,
    "invalid_request_error": 400,
}
_NOT_FOR_CHAT = (
    "embed",
    "whisper",
    "tts",
    "dall-e",
    "moderation",
    "rerank",
    "gpt-image",
    "sora",
    "davinci",
    "babbage",
)


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Part(msgspec.Struct):
    text: str | None = None


class _Content(msgspec.Struct):
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    message: _Content | None = None
    delta: _Content | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | float | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Completion(msgspec.Struct):
    """A completion or one chunk of a streamed one; `error` is what some upstreams send with status 200."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_completion = msgspec.json.Decoder(_Completion)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class OpenAIWire:
    """An OpenAI-compatible upstream. `base_url` may end with `/v1` or not; `price_class` defaults by the address."""

    provider = "openai"

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        label: str = "The OpenAI-compatible upstream",
        price_class: PriceClass | None = None,
    ) -> None:
        base = URL(base_url.strip().rstrip("/"))
        # A base with a path of its own (a gateway's, for example) is taken as it stands.
        if base.path in ("", "/"):
            base = base.with_path("/v1")
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._upstream = Upstream(base, label, headers)
        self._label = label
        self._secrets = (api_key,) if api_key else ()
        self._chat_url = base / "chat" / "completions"
        self._models_url = base / "models"
        self._price_class: PriceClass = price_class or ("local" if _is_local(base.host or "") else "paid")
        # OpenAI's reasoning models refuse `max_tokens`; most other upstreams know only that name.
        self._max_tokens = "max_completion_tokens" if base.host == "api.openai.com" else "max_tokens"

    async def cards(self) -> Sequence[ports.ModelCard]:
        """The upstream's `/models` that can chat; empty when it does not answer within `CARDS_TIMEOUT_S`."""
        try:
            async with (
                self._upstream.deadline(CARDS_TIMEOUT_S),
                self._upstream.session().get(self._models_url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    return ()
                listed = orjson.loads(await self._upstream.body(response))
        except (ports.ModelFault, orjson.JSONDecodeError):
            return ()
        models = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(models, list):
            return ()
        return [self._card(model) for model in models[:CARDS_MAX] if _can_chat(model)]

    def _card(self, model: dict[str, Any]) -> ports.ModelCard:
        name = clean_text(model["id"])
        capabilities = _dict(model.get("capabilities"))  # Mistral
        parameters = model.get("supported_parameters")  # OpenRouter
        modalities = _dict(model.get("architecture")).get("input_modalities") or ()
        lengths = (model.get("max_model_len"), model.get("context_length"), model.get("max_context_length"))
        title = model.get("name")
        return ports.ModelCard(
            name=f"{self.provider}:{name}",
            provider=self.provider,
            display_name=clean_text(title) if isinstance(title, str) and title else name,
            tools=capabilities.get("function_calling") is not False
            and not (isinstance(parameters, list) and "tools" not in parameters),
            vision=capabilities.get("vision") is True
            or (isinstance(modalities, list) and "image" in modalities),
            context_tokens=next((n for n in lengths if isinstance(n, int) and n > 0), None),
            price_class=self._price_class,
        )

    async def complete(
        self, request: ports.ModelRequest, on_text: Callable[[str], None] | None = None
    ) -> ports.ModelReply:
        """Ask once; see `domain.ports.ChatModel.complete`."""
        parts = ReplyParts(request, self._label, on_text)
        body = self._body(request, streamed=on_text is not None)
        headers = {"Idempotency-Key": request.idempotency_key} if request.idempotency_key else None
        async with (
            self._upstream.deadline(request.timeout_s),
            self._upstream.session().post(
                self._chat_url, data=body, headers=headers, allow_redirects=False
            ) as response,
        ):
            if response.status != 200:
                raise await self._refusal(response, request)
            if on_text is not None and response.content_type == "text/event-stream":
                return await self._read_stream(response, request, parts)
            # An upstream that cannot stream answers as a whole; then the text is one piece.
            return self._read_whole(await self._upstream.body(response), request, parts)

    def _body(self, request: ports.ModelRequest, streamed: bool) -> bytes:
        messages: list[dict[str, Any]] = []
        if request.system:
            messages.append({"role": "system", "content": request.system})
        messages.extend(map(_wire_message, request.messages))
        body: dict[str, Any] = {"model": request.model, "messages": messages, "stream": streamed}
        if streamed:
            body["stream_options"] = {"include_usage": True}
        if request.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": t.name,
                        "description": t.description,
                        "parameters": dict(t.parameters),
                    },
                }
                for t in request.tools
            ]
        if request.max_output_tokens is not None:
            body[self._max_tokens] = request.max_output_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        return orjson.dumps(body)

    def _read_whole(self, body: bytes, request: ports.ModelRequest, parts: ReplyParts) -> ports.ModelReply:
        completion = self._decoded(body, request)
        if not completion.choices or (message := completion.choices[0].message) is None:
            raise fault(ports.ModelErrorClass.GARBAGE, self._label)
        reason = self._take(message, parts, whole=True)
        finish_reason = reason or _FINISH_REASONS.get(completion.choices[0].finish_reason, "stop")
        return parts.finished(finish_reason, _usage_of(completion.usage))

    async def _read_stream(
        self, response: ClientResponse, request: ports.ModelRequest, parts: ReplyParts
    ) -> ports.ModelReply:
        usage: ports.TokenUsage | None = None
        reason: ports.FinishReason | None = None
        refused: ports.FinishReason | None = None
        ended = False
        async for data in self._events(response):
            if data == b"[DONE]":
                ended = True
                break
            chunk = self._decoded(data, request)
            usage = _usage_of(chunk.usage) or usage
            for choice in chunk.choices or ():
                if choice.delta is not None:
                    refused = self._take(choice.delta, parts, whole=False) or refused
                if choice.finish_reason is not None:
                    reason = _FINISH_REASONS.get(choice.finish_reason, "stop")
        if not ended and reason is None:
            raise fault(ports.ModelErrorClass.GARBAGE, self._label, "the stream ended before the reply did")
        return parts.finished(refused or reason or "stop", usage)

    async def _events(self, response: ClientResponse) -> AsyncIterator[bytes]:
        """The data of the server-sent events; upstreams send one line of data an event."""
        async for line in self._upstream.lines(response):
            if line.startswith(b"data:"):
                yield line[5:].strip()
            elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise fault(ports.ModelErrorClass.GARBAGE, self._label)

    def _decoded(self, data: bytes, request: ports.ModelRequest) -> _Completion:
        try:
            completion = _completion.decode(data)
        except _MALFORMED as malformed:
            raise fault(ports.ModelErrorClass.GARBAGE, self._label) from malformed
        if completion.error is not None:
            raise self._fault_of(completion.error, 500, request, None)
        return completion

    def _take(self, content: _Content, parts: ReplyParts, whole: bool) -> ports.FinishReason | None:
        """Move a message's or delta's content over; a refusal is text and ends as a content filter does."""
        if isinstance(content.content, str):
            parts.add_text(content.content)
        else:
            for part in content.content or ():
                parts.add_text(part.text or "")
        for call in content.tool_calls or ():
            function = call.function or _Function()
            name, arguments = function.name or "", function.arguments
            if whole or isinstance(arguments, dict):
                parts.add_tool(call.id or "", name, arguments)
            else:
                parts.add_tool_piece(call.index, call.id or "", name, arguments or "")
        if content.refusal:
            parts.add_text(content.refusal)
            return "content_filter"
        return None

    async def _refusal(self, response: ClientResponse, request: ports.ModelRequest) -> ports.ModelFault:
        try:
            error = orjson.loads(await self._upstream.error_body(response))
        except orjson.JSONDecodeError:
            error = None
        return self._fault_of(error, response.status, request, retry_after_s(response.headers))

    def _fault_of(
        self, error: Any, status: int, request: ports.ModelRequest, retry_after: float | None
    ) -> ports.ModelFault:
        """The fault of an error and a status; where the status says nothing of its own, the error's code does."""
        code, message, own_status = _error_parts(error)
        if status == 500:
            status = own_status or status
        error_class = class_of_status(status, code, message)
        return fault(error_class, self._label, provider_words(message, request, self._secrets), retry_after)

    async def close(self) -> None:
        """Close the connections."""
        await self._upstream.close()


def _wire_message(message: ports.Message) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "tool", "tool_call_id": message.tool_call_id or "", "content": message.content}
    if not message.tool_requests:
        return {"role": message.role, "content": message.content}
    calls = [
        {
            "id": asked.id,
            "type": "function",
            "function": {
                "name": wire_name(asked.name),
                "arguments": orjson.dumps(sent_arguments(asked)).decode(),
            },
        }
        for asked in message.tool_requests
    ]
    return {"role": "assistant", "content": message.content or None, "tool_calls": calls}


def _usage_of(usage: _Usage | None) -> ports.TokenUsage | None:
    """The provider's count. Its prompt tokens include the cached ones; ours are told apart."""
    if usage is None or usage.prompt_tokens is None:
        return None
    prompt, output = int(usage.prompt_tokens), int(usage.completion_tokens or 0)
    details = usage.prompt_tokens_details
    cached = min(int(details.cached_tokens or 0), prompt) if details else 0
    if min(prompt, output, cached) < 0:
        return None
    return ports.TokenUsage(prompt - cached, output, cache_read=cached)


def _error_parts(error: Any) -> tuple[str, str, int | None]:
    """Code, message and status of an error: `{"error": {...}}`, the inner object alone, or a sentence."""
    error = error.get("error", error) if isinstance(error, dict) else error
    if isinstance(error, str):
        return "", error, None
    error = _dict(error)
    message = error.get("message") or error.get("detail")
    codes = [error.get("code"), error.get("type")]
    status = next((c for c in codes if isinstance(c, int) and 400 <= c < 600), None)
    names = [c for c in codes if isinstance(c, str)]
    status = status or next((_STATUS_OF_CODE[name] for name in names if name in _STATUS_OF_CODE), None)
    return " ".join(names), message if isinstance(message, str) else "", status


def _can_chat(model: Any) -> bool:
    if not isinstance(model, dict) or not isinstance(model.get("id"), str) or not model["id"]:
        return False
    return not any(word in model["id"].lower() for word in _NOT_FOR_CHAT)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".local"):
        return True
    try:
        return ip_address(host).is_private
    except ValueError:
        return False
