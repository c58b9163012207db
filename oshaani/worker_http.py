"""What every worker process answers to operators, on a port of its own: does it live, can it work, its metrics."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.server import Check

LOOPBACK = ("127.0.0.1", "::1")
Ready = Callable[[], Awaitable[Sequence[Check]]]


def worker_app(
    role: str, slot: str, ready: Ready, metrics: CollectorRegistry, token: str | None
) -> Starlette:
    """The pages of a worker. With a `token`, or from elsewhere than this machine, metrics need it."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "role": role, "slot": slot})

    async def readiness(request: Request) -> Response:
        checks = await ready()
        is_ready = all(check.ok for check in checks)
        body = {
            "status": "ready" if is_ready else "not_ready",
            "role": role,
            "slot": slot,
            "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks],
        }
        return JSONResponse(body, 200 if is_ready else 503)

    async def measures(request: Request) -> Response:
        if token is None:
            allowed = request.client is not None and request.client.host in LOOPBACK
        else:
            given = request.headers.get("authorization", "")
            allowed = hmac.compare_digest(given.encode(), f"Bearer {token}".encode())
        if not allowed:
            sentence = "Metrics are for this machine, or for whoever has OSHAANI_METRICS_TOKEN.\n"
            return Response(sentence, 403, media_type="text/plain")
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    routes = [Route("/healthz", health), Route("/readyz", readiness), Route("/metrics", measures)]
    return Starlette(routes=routes)
