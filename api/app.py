"""The HTTP application, put together from its routes."""

from __future__ import annotations

from typing import cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api import chat
from api.bodies import problem_of_validation
from api.call import Shared, call_of
from api.edge import Edge
from api.errors import Problem
from api.metrics import HttpMetrics
from api.principals import Principals
from api.server import Server

ROUTERS = (chat.router,)


def create_app(server: Server) -> FastAPI:
    """The application. `app.state.shared.on_records` must be told of everything this process commits."""
    app = FastAPI(
        title="Oshaani", version=server.version, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    shared = Shared(server, Principals(server), HttpMetrics(server.metrics))
    app.state.shared = shared
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(Edge, shared=shared)
    return app


async def _not_valid(request: Request, error: Exception) -> Response:
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    known = model if isinstance(model, type) and issubclass(model, BaseModel) else None
    return _respond(request, problem_of_validation(cast(RequestValidationError, error), known))


async def _no_route(request: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    if failure.status_code == 405:
        allowed = (failure.headers or {}).get("Allow", "")
        problem = Problem("method_not_allowed", f"Use {allowed}.", None, {"Allow": allowed})
    elif failure.status_code == 404:
        problem = Problem("not_found", "There is no such page.")
    else:
        problem = Problem("malformed_json", str(failure.detail))
    return _respond(request, problem)


def _respond(request: Request, problem: Problem) -> Response:
    call = call_of(request)
    return problem.response(call.server.base_url, call.request_id, request.headers.get("accept", ""))
