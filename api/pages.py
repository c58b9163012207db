"""Lists, page by page: an opaque signed cursor says where the next page begins and of which list."""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from fastapi import Depends, Query
from starlette.requests import Request

from api.call import Call
from api.errors import Problem

LIMIT_DEFAULT, LIMIT_MAX = 50, 200
SIGNATURE_BYTES = 12

RowT = TypeVar("RowT")

Limit = Annotated[
    int, Query(ge=1, le=LIMIT_MAX, description="How many entries, at most 200.", examples=[LIMIT_DEFAULT])
]
Cursor = Annotated[
    str | None, Query(max_length=500, description="`next_cursor` of the page before.", examples=[None])
]


@dataclass(frozen=True, slots=True)
class Paging:
    """Which page of a list is asked for."""

    limit: int
    cursor: str | None
    query: dict[str, str]


async def _paging(request: Request, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None) -> Paging:
    return Paging(limit, cursor, dict(request.query_params))


PagingDep = Annotated[Paging, Depends(_paging)]


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list: the rows, and the cursor of the next page if there is one."""

    rows: list[Any]
    next_cursor: str | None


def begins_after(call: Call, cursor: str | None, scope: str) -> list[Any] | None:
    """The sort key that a page begins after; `scope` names the list with its filters.

    Raises:
        Problem: not a cursor of this list.
    """
    if cursor is None:
        return None
    problem = Problem("invalid_cursor", "The cursor is not one of this list; begin without a cursor.")
    try:
        raw = urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
    except (Base64Error, ValueError):
        raise problem from None
    signature, content = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(call, content, scope)):
        raise problem
    key: list[Any] = msgspec.json.decode(content)
    return key


def after_row(call: Call, cursor: str | None, scope: str) -> tuple[datetime, UUID] | None:
    """As `begins_after`, for lists ordered by time and id."""
    key = begins_after(call, cursor, scope)
    return None if key is None else (datetime.fromisoformat(key[0]), UUID(key[1]))


def page_of(
    call: Call, paging: Paging, scope: str, found: Sequence[RowT], key: Callable[[RowT], Sequence[Any]]
) -> Page:
    """The page of a list from one row more than the limit, which tells whether there is a next. Adds the Link header."""
    shown = list(found[: paging.limit])
    if len(found) <= paging.limit:
        return Page(shown, None)
    cursor = cursor_after(call, scope, key(shown[-1]))
    query = urlencode({**paging.query, "cursor": cursor})
    call.say("Link", f'<{call.server.base_url}{call.path}/?{query}>; rel="next"')
    return Page(shown, cursor)


def cursor_after(call: Call, scope: str, key: Sequence[Any]) -> str:
    """The cursor of the page that begins after a row's sort key."""
    content = msgspec.json.encode([_plain(part) for part in key])
    return urlsafe_b64encode(_signature(call, content, scope) + content).rstrip(b"=").decode()


def _signature(call: Call, content: bytes, scope: str) -> bytes:
    whose = call.caller().owner_id.bytes
    message = b"cursor|" + whose + scope.encode() + b"|" + content
    return hmac.new(call.server.signing_key, message, hashlib.sha256).digest()[:SIGNATURE_BYTES]


def _plain(part: Any) -> Any:
    return part.isoformat() if isinstance(part, datetime) else str(part) if isinstance(part, UUID) else part
