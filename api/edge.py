"""The outermost layer: one form of every path, headers that every answer has, and an answer for every exception."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import versions
from api.bodies import StrictRoute, check_text
from api.call import Call, Shared
from api.errors import Problem, problem_of

log_of = logging.getLogger(__name__)

_CURRENT = versions.CURRENT.encode()
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


class Edge:
    """Pure ASGI, because it is on the path of every chat."""

    def __init__(self, app: ASGIApp, shared: Shared, routes: Sequence[BaseRoute]) -> None:
        self._app, self._shared = app, shared
        # What the framework puts around these does nothing for them: they are found and called without it.
        self._plain = {
            (method, route.path): route
            for route in routes
            if isinstance(route, StrictRoute) and route.is_plain and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_at = time.perf_counter()
        path = scope["path"]
        if path[-1:] == "/" and path != "/":
            # Both forms of a path are one route: a redirect would lose or repeat the body of a POST.
            scope["path"] = path.rstrip("/") or "/"
        if scope["method"] == "HEAD":
            # Answered as GET; the server sends no body to whoever asked with HEAD, as its own scope still says.
            scope = {**scope, "method": "GET"}
        call = scope["oshaani"] = Call(scope, self._shared)
        status, version = 0, _CURRENT

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if notice := versions.DEPRECATED.get(getattr(scope.get("route"), "name", "")):
                    call.headers.extend(notice.headers())
                given = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(each for each in _ALWAYS if each[0] not in given),
                    (versions.HEADER, version),
                    *call.headers,
                    (b"x-request-id", call.request_id.encode()),
                    (b"traceresponse", call.traceparent.encode()),
                ]
            await send(message)

        try:
            version = _checked(scope, call)
            route = self._plain.get((scope["method"], scope["path"]))
            if route is None:
                await self._app(scope, receive, send_with_headers)
            else:
                scope["route"] = route
                await route.app(scope, receive, send_with_headers)
        except Exception as failure:
            if status:
                # Too late for another answer; the server cuts the connection.
                raise
            await self._answer(failure, call, Request(scope, receive))(scope, receive, send_with_headers)
        finally:
            template = getattr(scope.get("route"), "path", "other")
            method = call.method if call.method in METHODS else "other"
            self._shared.metrics.count(template, method, status or 499, time.perf_counter() - began_at)
        return None

    def _answer(self, failure: Exception, call: Call, request: Request) -> Any:
        base_url = self._shared.server.base_url
        by_owner = call.principal is not None and call.principal.is_owner
        problem = problem_of(failure, by_owner, base_url)
        if problem is None:
            log_of.error(
                "request %s failed: %s %s", call.request_id, call.method, call.path, exc_info=failure
            )
            problem = Problem("internal_error", "Something went wrong on our side; it has been noted.")
        return problem.response(base_url, call.request_id, request.headers.get("accept", ""))


def _checked(scope: Scope, call: Call) -> bytes:
    """What can be wrong with any request; the version that it is served."""
    if "\x00" in scope["path"] or b"%00" in scope.get("query_string", b""):
        check_text("", "\x00")
    asked = call.header(versions.HEADER)
    return _CURRENT if asked is None else versions.version_for(asked).encode()
