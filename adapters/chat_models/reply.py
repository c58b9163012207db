"""A model's reply while its pieces come in; keeps the limits, so that each adapter only reads its wire."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from adapters.chat_models.limits import (
    REPLY_TEXT_BYTES_MAX,
    TOOL_REQUESTS_MAX,
    clean_json,
    clean_text,
    estimated_usage,
    fault,
    minted_id,
    tool_request_of,
    utf8_size,
)
from domain.ports import FinishReason, ModelErrorClass, ModelReply, ModelRequest, TokenUsage, ToolRequest


class ToolParts:
    """A tool request whose arguments arrive in pieces, as JSON text or as a finished value."""

    __slots__ = ("call_id", "name", "pieces", "value")

    def __init__(self, call_id: str, name: str) -> None:
        self.call_id = call_id
        self.name = name
        self.pieces: list[str] = []
        self.value: dict[str, Any] | None = None


class ReplyParts:
    """The growing reply to `request`.

    Raises:
        ModelFault: from any `add_…`: TOO_LARGE, as soon as a limit is passed; from `finished`: GARBAGE.
    """

    __slots__ = (
        "_by_index",
        "_label",
        "_on_text",
        "_request",
        "_size_bytes",
        "_started",
        "_texts",
        "_tools",
        "_ttft_ms",
    )

    def __init__(
        self, request: ModelRequest, label: str, on_text: Callable[[str], None] | None = None
    ) -> None:
        self._request = request
        self._label = label
        self._on_text = on_text
        self._started = time.perf_counter()
        self._ttft_ms: int | None = None
        self._texts: list[str] = []
        self._tools: list[ToolParts] = []
        self._by_index: dict[int, ToolParts] = {}
        self._size_bytes = 0

    def add_text(self, piece: str) -> None:
        """Take a piece of text and hand it on; U+0000 becomes U+FFFD."""
        if not piece:
            return
        piece = clean_text(piece)
        self._grow(utf8_size(piece))
        self._texts.append(piece)
        if self._on_text is not None:
            self._on_text(piece)

    def add_tool_piece(self, index: int | None, call_id: str, name: str, piece: str) -> None:
        """Take a piece of a tool request's arguments.

        `index` tells parallel requests apart. Some upstreams leave it out or send 0 for all of them: a new id then
        starts a new request.
        """
        at = index if index is not None else max(len(self._tools) - 1, 0)
        parts = self._by_index.get(at)
        if parts is None or (call_id and parts.call_id and call_id != parts.call_id):
            parts = self._by_index[at] = self._new_tool(call_id, name)
        else:
            parts.call_id = parts.call_id or call_id
            parts.name = parts.name or name
        if piece:
            self._grow(utf8_size(piece))
            parts.pieces.append(piece)

    def add_tool(self, call_id: str, name: str, arguments: object) -> None:
        """Take a whole tool request; `arguments` is a JSON value, its text, or None where there are none."""
        raw = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
        self._grow(utf8_size(raw))
        parts = self._new_tool(call_id, name)
        if isinstance(arguments, dict):
            parts.value = arguments
        elif arguments is not None:
            parts.pieces.append(raw)

    def _new_tool(self, call_id: str, name: str) -> ToolParts:
        if len(self._tools) >= TOOL_REQUESTS_MAX:
            raise fault(
                ModelErrorClass.TOO_LARGE, self._label, f"more than {TOOL_REQUESTS_MAX} tool requests"
            )
        self._grow(len(name))
        parts = ToolParts(call_id, name)
        self._tools.append(parts)
        return parts

    def _grow(self, size_bytes: int) -> None:
        if self._ttft_ms is None and self._on_text is not None:
            self._ttft_ms = round((time.perf_counter() - self._started) * 1000)
        self._size_bytes += size_bytes
        if self._size_bytes > REPLY_TEXT_BYTES_MAX:
            raise fault(
                ModelErrorClass.TOO_LARGE, self._label, f"more than {REPLY_TEXT_BYTES_MAX} bytes of text"
            )

    def finished(self, reason: FinishReason, usage: TokenUsage | None) -> ModelReply:
        """The whole reply. Requests without an id, or with one twice, get a minted id; no usage is estimated."""
        tools = self._tool_requests() if self._tools else ()
        if reason == "stop" and tools:
            reason = "tool_calls"
        elif reason == "tool_calls" and not tools:
            reason = "stop"
        return ModelReply(
            text="".join(self._texts),
            tool_requests=tools,
            finish_reason=reason,
            usage=usage or estimated_usage(self._request, self._size_bytes),
            ttft_ms=self._ttft_ms,
        )

    def _tool_requests(self) -> tuple[ToolRequest, ...]:
        requests: dict[str, ToolRequest] = {}
        for index, parts in enumerate(self._tools):
            if not parts.name:
                raise fault(ModelErrorClass.GARBAGE, self._label, "a tool request without a name")
            call_id = parts.call_id
            if not call_id or call_id in requests:
                call_id = minted_id(self._request, index)
            if parts.value is None:
                requests[call_id] = tool_request_of(call_id, parts.name, "".join(parts.pieces))
            else:
                requests[call_id] = ToolRequest(
                    clean_text(call_id), clean_text(parts.name), clean_json(parts.value)
                )
        return tuple(requests.values())
