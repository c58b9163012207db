"""Answers whose form the requirements leave open: `{"success": true, "data": …, "message": …}` (SOP §5.6.1)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, TypeVar

import orjson
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.pages import Page

DataT = TypeVar("DataT")


class Envelope(BaseModel, Generic[DataT]):
    """What an operation gave."""

    success: bool = Field(examples=[True])
    data: DataT
    message: str


class Listed(BaseModel, Generic[DataT]):
    """One page of a list."""

    success: bool = Field(examples=[True])
    data: list[DataT]
    message: str
    next_cursor: str | None = Field(description="For the next page; null at the end.")


def enveloped(data: Any, message: str, status: int = 200, **beside: Any) -> Response:
    """An answer in the envelope; `beside` are fields that stand next to `data` as well."""
    return answered({"success": True, "data": data, "message": message, **beside}, status)


def listed(page: Page, data: list[Any], message: str) -> Response:
    """A page of a list in the envelope."""
    return enveloped(data, message, next_cursor=page.next_cursor)


def answered(body: Any, status: int = 200) -> Response:
    """A JSON answer of any form."""
    content = orjson.dumps(body, default=_plain, option=orjson.OPT_UTC_Z)
    return Response(content, status, media_type="application/json")


def instant(at: datetime | str | None) -> str | None:
    """A time as answers write it: UTC, RFC 3339."""
    if at is None:
        return None
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    raise TypeError(f"not JSON: {type(value).__name__}")
