"""The OpenAPI 3.1 document: what the framework knows of the routes, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import chat, conversations
from api.errors import CODES
from api.idempotency import once
from api.principals import calling_agent, calling_anyone, calling_user
from api.samples import SAMPLES
from api.versions import DEPRECATED, VERSIONS

DESCRIPTION = (
    "Create, train, publish and talk to AI agents. Every path works with and without its trailing slash. Amounts are "
    "credits as decimal strings. Errors have one form, `Problem`."
)
USER, SESSION, AGENT, AGENT_HEADER = "userApiKey", "session", "agentApiKey", "agentApiKeyHeader"
SECURITY_SCHEMES = {
    USER: {
        "type": "http",
        "scheme": "bearer",
        "description": "A user API key: `Authorization: Bearer osh_user_…`.",
    },
    SESSION: {
        "type": "apiKey",
        "in": "cookie",
        "name": "oshaani_session",
        "description": "A browser that is logged in (`__Host-oshaani_session` over https). What changes something "
        "also needs the header X-CSRF-Token.",
    },
    AGENT: {
        "type": "http",
        "scheme": "ApiKey",
        "description": "The API key of a published agent: `Authorization: ApiKey osh_agent_…`.",
    },
    AGENT_HEADER: {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
PARAMETERS: dict[str, Any] = {
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "maxLength": 257},
        "description": "Makes sending the request again harmless: the same key has its effect once, for ever.",
        "example": '"8e03978e-40d5-43dd-bc93-6894a57f9324"',
    },
    "IfMatch": {
        "name": "If-Match",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "Change only this version (an ETag); else 412.",
        "example": '"v17"',
    },
    "MinPosition": {
        "name": "Oshaani-Min-Position",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "pattern": "^[0-9]{1,2}:[0-9]{1,18}$"},
        "description": "Wait up to 2 s until what is at this position (`Oshaani-Position`) can be read.",
    },
    "Version": {
        "name": "Oshaani-Version",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "format": "date"},
        "description": "The form of the API that you were written for; answers name the one they have.",
        "example": VERSIONS[0],
    },
    "LastEventId": {
        "name": "Last-Event-ID",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "The `id` of the last event that was received.",
    },
}
PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "What went wrong: the members of RFC 9457, with `error` beside. As application/problem+json if "
    "the request accepts it.",
    "required": ["error", "detail", "code", "type", "title", "status", "instance", "request_id"],
    "properties": {
        "error": {"type": "string"},
        "detail": {"type": "string"},
        "code": {"type": "string", "enum": sorted(CODES)},
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "instance": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "code", "message"],
                "properties": {
                    "pointer": {"type": "string"},
                    "code": {"type": "string"},
                    "message": {"type": "string"},
                },
            },
        },
    },
    "additionalProperties": True,
}


def document_of(app: FastAPI, base_url: str) -> dict[str, Any]:
    """The document; put together once."""
    if app.openapi_schema is None:
        app.openapi_schema = _built(app, base_url)
    return app.openapi_schema


def _built(app: FastAPI, base_url: str) -> dict[str, Any]:
    routes = list(_routes(app.routes))
    document = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        description=DESCRIPTION,
        routes=routes,
        servers=[{"url": base_url}],
    )
    components = document.setdefault("components", {})
    components["securitySchemes"] = SECURITY_SCHEMES
    components["parameters"] = PARAMETERS
    components["responses"] = {
        f"Problem{status}": _problem(status) for status in sorted({s for s, _ in CODES.values()})
    }
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = PROBLEM
    _add_models(schemas)
    paths: dict[str, Any] = {}
    for route in routes:
        for method in sorted(route.methods or ()):
            operation = document["paths"][route.path_format][method.lower()]
            shown = route.path_format + ("/" if _has_slash(route.path_format) else "")
            paths.setdefault(shown, {})[method.lower()] = _operation(route, operation)
    document["paths"] = paths
    return document


def _routes(routes: Iterable[Any]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from _routes(route.original_router.routes)


def _operation(route: APIRoute, operation: dict[str, Any]) -> dict[str, Any]:
    operation["operationId"] = _camel(route.name)
    operation["description"] = " ".join((route.endpoint.__doc__ or "").split())
    operation["summary"] = operation["description"].partition(".")[0].partition(";")[0]
    calls = set(_calls(route.dependant))
    own = OWN.get(route.name)
    security = own.security if own else _security(calls)
    operation["security"] = [{name: []} for name in security]
    parameters = operation.setdefault("parameters", [])
    if own:
        _describe_own(operation, own)
    _add_path_parameters(route.path_format, parameters)
    changes = "GET" not in (route.methods or ())
    if own is not None or once in calls:
        parameters.append({"$ref": "#/components/parameters/IdempotencyKey"})
    if _takes_if_match(route):
        parameters.append({"$ref": "#/components/parameters/IfMatch"})
    if not changes and security:
        parameters.append({"$ref": "#/components/parameters/MinPosition"})
    if route.name == "follow_request":
        parameters.append({"$ref": "#/components/parameters/LastEventId"})
    parameters.append({"$ref": "#/components/parameters/Version"})
    if notice := DEPRECATED.get(route.name):
        operation["deprecated"] = True
        operation["x-sunset"] = notice.sunset_at.date().isoformat()
    _add_problems(route, operation, bool(security), changes)
    _add_sample(route.name, operation)
    return operation


class OwnBody:
    """A route that reads its body by itself: the body, the answer, and whose keys it takes."""

    def __init__(self, body: str, answer: str, status: int, security: tuple[str, ...]) -> None:
        self.body, self.answer, self.status, self.security = body, answer, status, security


OF_AGENT, OF_KEY = (AGENT, AGENT_HEADER, USER, SESSION), (AGENT, AGENT_HEADER)
OWN = {
    "chat": OwnBody("ChatBody", "ChatAnswer", 200, OF_AGENT),
    "query": OwnBody("QueryBody", "ChatAnswer", 200, OF_AGENT),
    "invoke": OwnBody("InvokeBody", "InvokeAnswer", 200, OF_AGENT),
    "simple_chat": OwnBody("ChatBody", "ChatAnswer", 200, OF_KEY),
    "simple_query": OwnBody("QueryBody", "ChatAnswer", 200, OF_KEY),
    "create_conversation": OwnBody("CreateConversationBody", "Accepted", 202, OF_KEY),
    "continue_conversation": OwnBody("ContinueConversationBody", "Accepted", 202, OF_KEY),
}
_MODELS: tuple[type[BaseModel], ...] = (
    chat.ChatBody,
    chat.QueryBody,
    chat.InvokeBody,
    chat.ChatAnswer,
    chat.InvokeAnswer,
    conversations.CreateConversationBody,
    conversations.ContinueConversationBody,
    conversations.Accepted,
)


def _add_models(schemas: dict[str, Any]) -> None:
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas.update(definitions["$defs"])


def _describe_own(operation: dict[str, Any], own: OwnBody) -> None:
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(own.body)}}}
    content: dict[str, Any] = {"application/json": {"schema": _ref(own.answer)}}
    if own.body in ("ChatBody", "QueryBody"):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation["responses"] = {str(own.status): {"description": "The answer.", "content": content}}
    if own.status == 200:
        queued = {"application/json": {"schema": _ref("Accepted")}}
        late = "The answer takes longer than a request may wait: poll for it."
        operation["responses"]["202"] = {"description": late, "content": queued}


def _add_path_parameters(path: str, parameters: list[Any]) -> None:
    known = {parameter.get("name") for parameter in parameters}
    if "{agent_id}" in path and "agent_id" not in known:
        schema = {"type": "integer", "minimum": 1}
        parameters.insert(0, {"name": "agent_id", "in": "path", "required": True, "schema": schema})


def _add_problems(route: APIRoute, operation: dict[str, Any], secured: bool, changes: bool) -> None:
    statuses = {500, 503}
    if secured:
        statuses |= {401, 403}
    if "{" in route.path_format or route.name in ("get_answer", "find_conversation", *OWN):
        statuses |= {404}
    if changes:
        statuses |= {400, 409, 413, 415, 422, 429}
    statuses |= {400}
    if _takes_if_match(route):
        statuses |= {412}
    statuses |= {"log_in": {401}, "get_metrics": {403}}.get(route.name, set())
    if route.name in OWN or route.name == "create_agent":
        statuses |= {402}
    if route.name in ("chat", "query", "invoke", "simple_chat", "simple_query"):
        statuses |= {502, 504}
    responses = operation["responses"]
    responses.pop("422", None)
    for status in sorted(statuses):
        responses.setdefault(str(status), {"$ref": f"#/components/responses/Problem{status}"})


def _add_sample(name: str, operation: dict[str, Any]) -> None:
    sample = SAMPLES.get(name)
    if sample is None:
        return
    if sample.request is not None:
        operation["requestBody"]["content"]["application/json"]["examples"] = {
            title: {"value": value} for title, value in sample.request.items()
        }
    if sample.response is not None:
        content = operation["responses"][str(sample.status)]["content"]
        content["application/json"]["examples"] = {"requirements": {"value": sample.response}}


def _security(calls: set[Any]) -> tuple[str, ...]:
    if calling_user in calls:
        return USER, SESSION
    if calling_agent in calls:
        return OF_KEY
    return OF_AGENT if calling_anyone in calls else ()


def _calls(dependant: Dependant) -> Iterator[Any]:
    for each in dependant.dependencies:
        yield each.call
        yield from _calls(each)


def _takes_if_match(route: APIRoute) -> bool:
    return route.name in (
        "update_agent",
        "delete_agent",
        "publish_agent",
        "unpublish_agent",
        "train_agent",
        "test_agent",
        "create_custom_tool",
        "replace_custom_tool",
        "delete_custom_tool",
    )


def _has_slash(path: str) -> bool:
    """The requirements print the paths of their first base with a slash at the end, the others without."""
    return path.startswith(
        ("/api/agents", "/api/api-keys", "/api/models", "/api/requests")
    ) and not path.endswith("/events")


def _problem(status: int) -> Mapping[str, Any]:
    titles = [f"`{code}`: {title}" for code, (each, title) in CODES.items() if each == status]
    return {
        "description": "; ".join(titles),
        "content": {
            "application/json": {"schema": _ref("Problem")},
            "application/problem+json": {"schema": _ref("Problem")},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)
