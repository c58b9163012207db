"""The index of routes. What they take and give in full is in the OpenAPI document."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.routing import APIRoute

from api.app import ROUTERS
from oshaani.reference.markdown import code, page, table

_INTRODUCTION = """
An index; what each route takes and gives is in the OpenAPI document that a running server serves at `/openapi.json`,
and to read at `/docs`. Every path is served with and without a trailing slash.

**Who calls.** A person: `Authorization: Bearer <user API key>`, or a session cookie with `X-CSRF-Token`. A caller of an
agent: `Authorization: ApiKey <agent API key>` or `X-API-Key: <agent API key>`.

**Headers of requests.** `Idempotency-Key` makes a repeated request harmless, for ever. `If-Match` with an agent's `ETag`
refuses a change of another version (412). `Oshaani-Min-Position` makes a query wait for a position. `traceparent` and
`X-Request-Id` are taken over.

**Headers of answers.** `Oshaani-Position: <shard>:<position>` of what was written; `Idempotent-Replayed: true` when the
request had been served before; `Oshaani-Position-Reached: false` when the read models were behind; `RateLimit` and
`RateLimit-Policy` for the plan's daily limits; `X-Request-Id`.

**Errors**: [one body for all](errors.md). **Amounts** are decimal texts. **Lists** take `limit` (at most 200) and
`cursor`, and give `next_cursor`.
"""


def http_page() -> str:
    """The whole page."""
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for router in ROUTERS:
        for route in _routes(router):
            sections.setdefault(str(route.tags[0]) if route.tags else "Other", []).append(_row(route))
    parts = [f"## {tag}\n\n{table(('', 'path', ''), rows)}" for tag, rows in sections.items()]
    return page("HTTP", _INTRODUCTION, *parts)


def _routes(router: APIRouter) -> Iterator[APIRoute]:
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route


def _row(route: APIRoute) -> tuple[str, str, str]:
    methods = ", ".join(sorted(route.methods or ()))
    first = (inspect.getdoc(route.endpoint) or "").split("\n\n")[0]
    return methods, code(route.path), first
