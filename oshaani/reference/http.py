"""The index of routes. What they take and give in full is in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from api.app import ROUTERS
from api.openapi import AGENT, AGENT_HEADER, SESSION, USER, document_of
from oshaani.reference.markdown import code, page, table

BASE_URL = "http://127.0.0.1:8080"

_INTRODUCTION = """
An index; what each route takes and gives is in the OpenAPI document that a running server serves at `/openapi.json`,
and to read at `/docs`. Every path is served with and without a trailing slash.

**Who calls.** A person: `Authorization: Bearer <user API key>`, or a session cookie with `X-CSRF-Token`. A caller of an
agent: `Authorization: ApiKey <agent API key>` or `X-API-Key: <agent API key>`.

**Headers of requests.** `Idempotency-Key` makes a repeated request harmless, for ever. `If-Match` with an agent's `ETag`
refuses a change of another version (412). `Oshaani-Min-Position` makes a query wait for a position. `traceparent` and
`X-Request-Id` are taken over. `Oshaani-Version` names the form of the API that a client was written for, a date.

**Headers of answers.** `Oshaani-Position: <shard>:<position>` of what was written; `Idempotent-Replayed: true` when the
request had been served before; `Oshaani-Position-Reached: false` when the read models were behind; `RateLimit` and
`RateLimit-Policy` for the plan's daily limits; `X-Request-Id`; `Oshaani-Version`; `Deprecation` and `Sunset` from
operations that will go away.

**Errors**: [one body for all](errors.md). **Amounts** are decimal texts. **Lists** take `limit` (at most 200) and
`cursor`, and give `next_cursor`.
"""


_CALLERS = {USER: "person", SESSION: "", AGENT: "agent key", AGENT_HEADER: ""}


def http_page() -> str:
    """The whole page."""
    app = FastAPI(openapi_url=None)
    for router in ROUTERS:
        app.include_router(router)
    sections: dict[str, list[tuple[str, str, str, str]]] = {}
    for path, operations in document_of(app, BASE_URL)["paths"].items():
        for method, operation in operations.items():
            row = (method.upper(), code(path), _callers(operation), _first_line(operation))
            sections.setdefault(operation.get("tags", ["Other"])[0], []).append(row)
    parts = [f"## {tag}\n\n{table(('', 'path', 'who calls', ''), rows)}" for tag, rows in sections.items()]
    return page("HTTP", _INTRODUCTION, *parts)


def _callers(operation: Mapping[str, Any]) -> str:
    schemes = {name for one in operation.get("security", ()) for name in one}
    return " or ".join(who for name, who in _CALLERS.items() if who and name in schemes) or "anybody"


def _first_line(operation: Mapping[str, Any]) -> str:
    return str(operation.get("description") or operation.get("summary") or "").split("\n\n")[0]
