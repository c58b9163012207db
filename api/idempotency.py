"""Resending a request is harmless: the key that a client gives decides the command's id, and the bus serves an id once.

draft-ietf-httpapi-idempotency-key-header-06; the bare token that many clients send is taken too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any
from uuid import UUID, uuid4

import orjson
from fastapi import Depends
from starlette.requests import Request

from api.call import call_of
from api.errors import Problem
from domain.ids import derived

_STRING = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\]){1,255})"')  # RFC 9651 §3.3.3
_TOKEN = re.compile(r"[\x21\x23-\x7e]{1,255}")


@dataclass(frozen=True, slots=True)
class Once:
    """Under which id a request's command runs, and what must be the same when it is sent again."""

    command_id: UUID
    digest: bytes | None


async def once(request: Request) -> Once:
    """What the Idempotency-Key of a request means. Needs the caller: declare it after the call."""
    header = request.headers.get("idempotency-key")
    if header is None:
        return Once(uuid4(), None)
    call = call_of(request)
    key = key_of(header)
    actor = call.principal.actor if call.principal else "anyone"
    return Once(
        derived("request", actor, call.method, call.path, key),
        digest_of(await request.body(), request.scope.get("query_string", b"")),
    )


OnceDep = Annotated[Once, Depends(once)]


def key_of(header: str) -> str:
    """The key in a header.

    Raises:
        Problem: neither a structured-field string nor a token.
    """
    if match := _STRING.fullmatch(header):
        return re.sub(r"\\(.)", r"\1", match[1])
    if _TOKEN.fullmatch(header):
        return header
    raise Problem(
        "invalid_idempotency_key",
        'The Idempotency-Key is 1 to 255 printable ASCII characters, like "8e03978e-40d5".',
    )


def digest_of(body: bytes, query: bytes) -> bytes:
    """The same for the same JSON, however it is written down."""
    try:
        canonical: Any = orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS) if body else b""
    except orjson.JSONDecodeError:
        canonical = body  # refused as a body in a moment
    return sha256(canonical + b"\x00" + query).digest()
