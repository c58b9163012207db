"""The HTTP application, put together from its routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api import (
    agents,
    api_keys,
    auth,
    billing,
    chat,
    conversations,
    models,
    operators,
    published,
    requests,
    simple,
    tools,
    webhooks,
)
from api.auth import Failures
from api.bodies import problem_of_validation
from api.call import Shared, call_of
from api.edge import Edge
from api.errors import Problem
from api.metrics import HttpMetrics
from api.openapi import document_of
from api.principals import Principals
from api.server import Server
from schemas.records import AnyRecord

# Routes are tried in this order: those on the path of every chat come first.
ROUTERS = (
    chat.router,
    conversations.router,
    requests.router,
    webhooks.router,
    simple.router,
    agents.router,
    api_keys.router,
    tools.router,
    models.router,
    billing.router,
    auth.router,
    operators.router,
    published.router,
)


def create_app(server: Server) -> FastAPI:
    """The application. It hears of everything that `server.bus` commits, and leaves it to its earlier listener too."""
    app = FastAPI(
        title="Oshaani",
        version=server.version,
        redirect_slashes=False,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # The platform measures itself; the framework's own asks the environment at every request whether it shall.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    shared = Shared(server, Principals(server), HttpMetrics(server.metrics), Failures())
    listener = server.bus.on_commit

    def committed(records: Sequence[AnyRecord]) -> None:
        shared.on_records(records)
        listener(records)

    server.bus.on_commit = committed
    app.state.on_records = shared.on_records  # for records that other processes committed
    for router in ROUTERS:
        # Not `include_router`, which would look each request up twice.
        app.router.routes.extend(router.routes)
    app.openapi = lambda: document_of(app, server.base_url)  # type: ignore[method-assign]
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(Edge, shared=shared, routes=app.router.routes)
    return app


async def _not_valid(request: Request, error: Exception) -> Response:
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    known = model if isinstance(model, type) and issubclass(model, BaseModel) else None
    return _respond(request, problem_of_validation(cast(RequestValidationError, error), known))


async def _no_route(request: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    if failure.status_code == 405:
        allowed = ", ".join(_methods_of(request))
        problem = Problem("method_not_allowed", f"Use {allowed}.", None, {"Allow": allowed})
    elif failure.status_code == 404:
        problem = Problem("not_found", "There is no such page.")
    elif isinstance(failure.__cause__, Problem):
        # The framework wraps whatever reading a body raises.
        problem = failure.__cause__
    else:
        problem = Problem("malformed_json", str(failure.detail))
    return _respond(request, problem)


def _methods_of(request: Request) -> list[str]:
    """What the path takes: each method is a route of its own."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    fitting = [route for route in routes if route.path_regex.match(request.scope["path"])]
    return sorted({method for route in fitting for method in route.methods or ()})


def _respond(request: Request, problem: Problem) -> Response:
    call = call_of(request)
    return problem.response(call.server.base_url, call.request_id, request.headers.get("accept", ""))
