"""For operators and for whoever builds a client: health, metrics, the OpenAPI document and a page that shows it."""

from __future__ import annotations

import hmac
import html
from ipaddress import ip_address
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from api.bodies import StrictRoute
from api.call import CallDep
from api.envelopes import answered
from api.errors import Problem

DOCS_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
code{font:14px ui-monospace,monospace}h2{margin-top:2.5rem}
article{border-top:1px solid #ccc;padding:.5rem 0}b{display:inline-block;min-width:4.5rem}
"""

router = APIRouter(route_class=StrictRoute, tags=["Operators"])


class Health(BaseModel):
    """Whether the server lives, or can serve."""

    status: str
    checks: list[dict[str, Any]] = []


@router.get("/healthz", response_model=Health)
async def get_health() -> Response:
    """The process lives."""
    return answered({"status": "ok"})


@router.get("/readyz", response_model=Health)
async def get_readiness(call: CallDep) -> Response:
    """Whether the server can serve: 200 or 503, with what was checked."""
    checks = await call.server.ready()
    ready = all(check.ok for check in checks)
    body = {
        "status": "ready" if ready else "not_ready",
        "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks],
    }
    return answered(body, 200 if ready else 503)


@router.get("/metrics", response_class=Response)
async def get_metrics(request: Request, call: CallDep) -> Response:
    """Metrics for Prometheus; from this machine, or with the operator's token."""
    token = call.server.metrics_token
    header = request.headers.get("authorization", "")
    if token is not None:
        allowed = hmac.compare_digest(header.encode(), f"Bearer {token}".encode())
    else:
        allowed = _is_loopback(call.client) and "x-forwarded-for" not in request.headers
    if not allowed:
        raise Problem("forbidden", "Metrics are for this machine, or for whoever has OSHAANI_METRICS_TOKEN.")
    return Response(generate_latest(call.server.metrics), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", response_class=Response)
async def get_openapi(request: Request) -> Response:
    """This API as an OpenAPI 3.1 document."""
    return answered(request.app.openapi())


@router.get("/docs", response_class=HTMLResponse)
async def get_docs(request: Request) -> Response:
    """This API as a page to read; it loads nothing from anywhere."""
    page = _page(request.app.openapi())
    return HTMLResponse(page, headers={"Content-Security-Policy": DOCS_CSP})


def _is_loopback(client: str) -> bool:
    try:
        return ip_address(client).is_loopback
    except ValueError:
        return False


def _page(document: dict[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            groups.setdefault(operation["tags"][0], []).append(_article(path, method, operation))
    body = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(articles)}" for tag, articles in groups.items())
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(document['info']['description'])}</p>"
        f'<p>Machine-readable: <a href="/openapi.json">/openapi.json</a></p>{body}</html>'
    )


def _article(path: str, method: str, operation: dict[str, Any]) -> str:
    names = ", ".join(
        f"<code>{html.escape(parameter['name'])}</code>"
        for parameter in operation.get("parameters", ())
        if parameter.get("in") == "query"
    )
    statuses = ", ".join(operation["responses"])
    return (
        f'<article id="{html.escape(operation["operationId"])}"><b>{method.upper()}</b> <code>{html.escape(path)}</code>'
        f"<p>{html.escape(operation.get('description', ''))}</p>"
        f"<p>{f'Query: {names}. ' if names else ''}Answers: {statuses}</p></article>"
    )
