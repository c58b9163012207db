"""JSON bodies as strangers send them: bounded, valid UTF-8, without double, misspelt or unprintable surprises."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from difflib import get_close_matches
from inspect import signature
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import Problem, all_invalid, invalid, not_found

DEPTH_MAX = 64
INTEGER_MAX = 2**63 - 1
ERRORS_MAX = 50  # of one body, that are reported
BODY_BYTES_MAX = 1_000_000

ModelT = TypeVar("ModelT", bound="Body")


class Body(BaseModel):
    """A body: fields that it does not have are refused, and types are not guessed."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class StrictRequest(Request):
    """Reads a JSON body once, counting, and refuses what a lenient parser would let through."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            check_length(self.headers.get("content-length"))
            chunks, size = [], 0
            async for chunk in self.stream():
                size += len(chunk)
                if size > BODY_BYTES_MAX:
                    raise too_large()
                chunks.append(chunk)
            self._body = b"".join(chunks)
            if self._body:
                check_media_type(self.headers.get("content-type"))
        return self._body

    async def json(self) -> Any:
        return parsed(await self.body())


class StrictRoute(APIRoute):
    """A route whose bodies are read by `StrictRequest`.

    A route that takes nothing but the request is called without the framework's machinery in between, which costs
    more than all the rest of a chat.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.is_plain = list(signature(endpoint).parameters) == ["request"]
        if self.is_plain:
            self.app = _plain(endpoint)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def _plain(endpoint: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(StrictRequest(scope, receive))
        await response(scope, receive, send)

    return app


async def body_as(model: type[ModelT], request: Request) -> ModelT:
    """The body of a route that reads it by itself, in one go."""
    raw = await request.body()
    try:
        return model.model_validate(parsed(raw))
    except ValidationError as error:
        raise problem_of_errors(error.errors(include_url=False, include_input=False), model) from None


def parsed(raw: bytes) -> Any:
    """The JSON value of a body.

    Raises:
        Problem: not JSON, or JSON that is not to be trusted.
    """
    if raw.startswith(BOM_UTF8):
        raise _malformed("The body begins with a byte order mark; send UTF-8 without one.")
    try:
        value = _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise _malformed(f"The body is not valid UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise _too_deep() from None
    if raw.count(b"[") + raw.count(b"{") > DEPTH_MAX and _depth(value) > DEPTH_MAX:
        raise _too_deep()
    # Only an escape can bring either into valid UTF-8 JSON.
    if b"\\u0000" in raw or b"\\ud" in raw.lower():
        for pointer, text in texts(value):
            check_text(pointer, text)
    return value


def check_text(pointer: str, text: str) -> None:
    """Refuse what no text column can hold."""
    if "\x00" in text:
        raise invalid(pointer, f"{pointer or 'The body'} contains the character U+0000.", "nul_character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(
            pointer, f"{pointer or 'The body'} contains half of a surrogate pair.", "lone_surrogate"
        ) from None


def texts(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, keys included, with the pointer to it."""
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield pointer, key
            yield from texts(each, f"{pointer}/{escaped(key)}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from texts(each, f"{pointer}/{index}")


def escaped(part: object) -> str:
    """A part of a JSON Pointer (RFC 6901 §3)."""
    return str(part)[:100].replace("~", "~0").replace("/", "~1")


def check_length(declared: str | None) -> None:
    """Refuse a body that says itself that it is too large, before it is read."""
    if declared and declared.isdecimal() and int(declared[:20]) > BODY_BYTES_MAX:
        raise too_large()


def check_media_type(content_type: str | None) -> None:
    """A body without a type is taken for JSON; one that says it is something else is refused."""
    if content_type is None:
        return
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise Problem(
            "unsupported_media_type",
            f"Send JSON with Content-Type: application/json, not {media_type[:100]!r}.",
        )


def too_large() -> Problem:
    """The body exceeds the limit. The connection stays open: closing it would cut off clients that are still sending."""
    sentence = f"A JSON body has at most {BODY_BYTES_MAX} bytes."
    return Problem("payload_too_large", sentence, {"limit_bytes": BODY_BYTES_MAX})


def problem_of_validation(error: RequestValidationError, model: type[BaseModel] | None) -> Problem:
    """What the framework found wrong with a request, in our words."""
    return problem_of_errors(error.errors(), model)


def problem_of_errors(errors: Any, model: type[BaseModel] | None) -> Problem:
    """Pydantic's errors as `errors[]` with JSON Pointers; a path that cannot name anything is not found."""
    if any(error["loc"][:1] == ("path",) for error in errors):
        return not_found("page")
    return all_invalid([_described(error, model) for error in errors[:ERRORS_MAX]])


def _described(error: Any, model: type[BaseModel] | None) -> dict[str, str]:
    place, *path = error["loc"] or ("body",)
    if place not in ("body", "query", "header", "cookie"):
        place, path = "body", list(error["loc"])
    if place != "body":
        name = str(path[-1]) if path else str(place)
        return {
            "pointer": f"?{name}" if place == "query" else name,
            "code": error["type"],
            "message": f"{name}: {error['msg']}.",
        }
    pointer = "".join(f"/{escaped(part)}" for part in path)
    name = ".".join(str(part)[:100] for part in path) or "The body"
    if error["type"] == "missing":
        message = f"{name!r} is required." if path else "A JSON body is required."
    elif error["type"] == "extra_forbidden":
        message = f"{name!r} is not a field of this request{_suggestion(str(path[-1]), model)}."
    else:
        message = f"{name}: {error['msg']}."
    code = {"missing": "required", "extra_forbidden": "unknown_field"}.get(error["type"], error["type"])
    return {"pointer": pointer, "code": code, "message": message}


def _suggestion(name: str, model: type[BaseModel] | None) -> str:
    known = list(model.model_fields) if model else []
    near = get_close_matches(name[:100], known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; its fields are {', '.join(known)}" if known else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise invalid(
            f"/{escaped(double)}",
            f"The field {double[:100]!r} stands twice in one object.",
            "duplicate_field",
        )
    return found


def _no_constant(name: str) -> None:
    raise _malformed(f"{name} is not a JSON number.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _malformed(f"The number {text[:20]} is out of range.")
    return number


def _integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > INTEGER_MAX:
        raise _malformed(f"The number {text[:20]}… is out of range; whole numbers have at most 64 bits.")
    return number


def _malformed(sentence: str) -> Problem:
    return Problem("malformed_json", sentence)


def _too_deep() -> Problem:
    return Problem("malformed_json", f"The body nests deeper than {DEPTH_MAX} levels.")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
)
