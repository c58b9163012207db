"""What every chat model adapter holds to: named limits, and how text, arguments and numbers are made safe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from typing import Any, Literal

import orjson

from domain.ports import ModelErrorClass, ModelFault, ModelRequest, TokenUsage, ToolRequest

REPLY_BYTES_MAX = 2_000_000
"""The body of a reply that is not streamed; also one line of a streamed one."""
REPLY_TEXT_BYTES_MAX = 1_000_000
"""The text of a reply, and the arguments of all its tool requests together."""
STREAM_BYTES_MAX = 64_000_000
"""A whole streamed body: providers wrap each token of a few bytes in some 300 bytes of JSON."""
ERROR_BODY_BYTES_MAX = 65_536
TOOL_REQUESTS_MAX = 32
TOOL_RAW_CHARS_MAX = 65_536
PROVIDER_MESSAGE_CHARS_MAX = 200
RETRY_AFTER_S_MAX = 3_600.0
CARDS_TIMEOUT_S = 2.0
CARDS_MAX = 1_000
BYTES_PER_TOKEN = 4
"""The estimate's rule where a provider does not count: four bytes of UTF-8 are one token, rounded up."""

PriceClass = Literal["free", "local", "paid"]

_ECHO_CHARS = 24
_SECRET_LIKE = re.compile(r"(?i)bearer\s+\S+|\b(?:sk|pk|key|api)[-_][\w*.-]{6,}|[\w+/=*-]{24,}")
_ODD_IN_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CONTEXT_WORDS = (
    "context length",
    "context_length",
    "context window",
    "context size",
    "context_size",
    "maximum context",
    "too many tokens",
    "too many input tokens",
    "prompt is too long",
    "input is too long",
    "input length and",
    "exceeds the maximum number of tokens",
)
_CLASS_OF_STATUS = {
    401: ModelErrorClass.UNAUTHORIZED,
    403: ModelErrorClass.UNAUTHORIZED,
    404: ModelErrorClass.UNKNOWN_MODEL,
    408: ModelErrorClass.TIMEOUT,
    413: ModelErrorClass.CONTEXT_TOO_LONG,
    429: ModelErrorClass.RATE_LIMITED,
}


def utf8_size(text: str) -> int:
    """Length of `text` in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def clean_text(text: str) -> str:
    """`text` without what Postgres and UTF-8 cannot hold: U+0000 and lone surrogates become U+FFFD."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_json(value: Any) -> Any:
    """`value` with every text in it cleaned, keys too."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_json(item) for item in value]
    return value


def minted_id(request: ModelRequest, index: int) -> str:
    """An id for a tool request that came without one: the same on every attempt of the same call."""
    call = request.idempotency_key or f"{request.model} {len(request.messages)}"
    return "call_" + blake2b(f"{call} {index}".encode(), digest_size=12).hexdigest()


def tool_request_of(call_id: str, name: str, raw: str) -> ToolRequest:
    """A tool request from the arguments' JSON text; no text at all means no arguments.

    `raw` is kept (cut at `TOOL_RAW_CHARS_MAX`) only where it is not a JSON object.
    """
    arguments: Any = {}
    if raw and not raw.isspace():
        try:
            arguments = orjson.loads(raw)
        except (orjson.JSONDecodeError, RecursionError):
            arguments = None
    call_id, name = clean_text(call_id), clean_text(name)
    if isinstance(arguments, dict):
        return ToolRequest(call_id, name, clean_json(arguments) if "\\u0000" in raw else arguments)
    return ToolRequest(call_id, name, None, clean_text(raw[:TOOL_RAW_CHARS_MAX]))


def sent_arguments(request: ToolRequest) -> dict[str, Any]:
    """The arguments to show a provider in the history: always an object, since several refuse anything else."""
    return request.arguments if request.arguments is not None else {"invalid_arguments": request.raw}


def wire_name(name: str) -> str:
    """A tool's name in the history as providers accept it; a model may have asked for a name that is none."""
    return name if _TOOL_NAME.fullmatch(name) else (_ODD_IN_NAME.sub("_", name)[:64] or "_")


def tokens_of(byte_count: int) -> int:
    """The estimated number of tokens in so many bytes."""
    return -(-byte_count // BYTES_PER_TOKEN)


def estimated_usage(request: ModelRequest, output_bytes: int) -> TokenUsage:
    """Usage by the rule of `BYTES_PER_TOKEN`, over everything sent and everything received."""
    size = utf8_size(request.system)
    for message in request.messages:
        size += utf8_size(message.content)
        for asked in message.tool_requests:
            size += len(asked.name) + len(orjson.dumps(sent_arguments(asked)))
    for tool in request.tools:
        size += len(tool.name) + utf8_size(tool.description) + len(orjson.dumps(dict(tool.parameters)))
    return TokenUsage(tokens_of(size), tokens_of(output_bytes), source="estimated")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """When the provider wants to be asked again: `retry-after-ms`, or `Retry-After` as seconds or HTTP date.

    A date is read against the answer's own `Date`, so that our clock may be wrong (RFC 9110 §10.2.3).
    """
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return _bounded(float(milliseconds) / 1000)
        if not (value := headers.get("Retry-After")):
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return _bounded(float(value))
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return _bounded((parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _bounded(seconds: float) -> float | None:
    return min(max(seconds, 0.0), RETRY_AFTER_S_MAX) if seconds == seconds else None


def provider_words(message: str, request: ModelRequest | None, secrets: Iterable[str] = ()) -> str:
    """A provider's own message, fit to be shown: one short line without keys; empty if it repeats the prompt."""
    line = " ".join(clean_text(message[: PROVIDER_MESSAGE_CHARS_MAX * 4]).split())
    for secret in secrets:
        line = line.replace(secret, "***")
    line = _SECRET_LIKE.sub("***", line)[:PROVIDER_MESSAGE_CHARS_MAX].strip()
    if request is not None and _repeats_prompt(line, request):
        return ""
    return line


def _repeats_prompt(line: str, request: ModelRequest) -> bool:
    texts = [request.system, *(message.content for message in request.messages)]
    prompt = " ".join(" ".join(texts).split())
    pieces = (line[at : at + _ECHO_CHARS] for at in range(max(len(line) - _ECHO_CHARS, 0) + 1))
    return any(len(piece) == _ECHO_CHARS and piece in prompt for piece in pieces)


def class_of_status(status: int, code: str = "", message: str = "") -> ModelErrorClass:
    """The error class of an HTTP status, the provider's error code and its message."""
    words = f"{code} {message}".lower()
    error_class = _CLASS_OF_STATUS.get(status)
    if error_class is ModelErrorClass.RATE_LIMITED and "insufficient_quota" in words:
        # A used-up account answers 429 too, and waiting does not help it.
        return ModelErrorClass.REFUSED
    if error_class is not None:
        return error_class
    if status < 400:
        return ModelErrorClass.GARBAGE
    if status >= 500:
        return ModelErrorClass.OVERLOADED
    if any(word in words for word in _CONTEXT_WORDS):
        return ModelErrorClass.CONTEXT_TOO_LONG
    return ModelErrorClass.REFUSED


_SENTENCES: dict[ModelErrorClass, str] = {
    ModelErrorClass.RATE_LIMITED: "{label} is limiting how often it answers",
    ModelErrorClass.OVERLOADED: "{label} is overloaded or failing",
    ModelErrorClass.TIMEOUT: "{label} gave no complete answer in time",
    ModelErrorClass.UNREACHABLE: "{label} cannot be reached",
    ModelErrorClass.GARBAGE: "{label} answered with something that is not its wire format",
    ModelErrorClass.TOO_LARGE: "{label} sent a reply that is too large",
    ModelErrorClass.CONTEXT_TOO_LONG: "{label} cannot take a prompt this long",
    ModelErrorClass.REFUSED: "{label} will not serve this request",
    ModelErrorClass.UNAUTHORIZED: "{label} does not accept this server's credentials",
    ModelErrorClass.UNKNOWN_MODEL: "{label} does not have this model",
    ModelErrorClass.WORKER_LOST: "The process that asked {label} died before it recorded an answer",
}


def fault(
    error_class: ModelErrorClass, label: str, words: str = "", retry_after: float | None = None
) -> ModelFault:
    """The fault of a class: our sentence first, the provider's cleaned words after a colon."""
    sentence = _SENTENCES[error_class].format(label=label)
    return ModelFault(error_class, f"{sentence}: {words}" if words else f"{sentence}.", retry_after)
