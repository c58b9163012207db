"""`@tool` makes an annotated function a tool: its name, docstring and annotations are what a model sees."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from adapters.tools.texts import result_text
from domain.ports import Effect, EgressDenied, ToolContext, ToolFailed, ToolKind, ToolResult

CONTEXT = "context"

ToolFunction = Callable[..., Awaitable[str | ToolResult]]
Node = TypeVar("Node")


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class FunctionTool:
    """Implements `Tool` with a function. A parameter named `context` is given the call's ToolContext."""

    kind: ToolKind = "builtin"

    def __init__(
        self, function: ToolFunction, timeout_s: float, effect: Effect, missing: Callable[[], str | None]
    ) -> None:
        self.name = function.__name__
        self.description = inspect.getdoc(function) or ""
        self.effect = effect
        self.timeout_s = timeout_s
        self._function = function
        self._missing = missing
        self._takes_context = CONTEXT in inspect.signature(function).parameters
        self._model = _model_of(function)
        self.parameters: Mapping[str, Any] = json_schema(self._model)

    def missing(self) -> str | None:
        return self._missing()

    def validate(self, arguments: Mapping[str, Any]) -> str | None:
        try:
            self._model.model_validate(dict(arguments))
        except ValidationError as error:
            return _sentence(error)
        return None

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        given = self._parsed(arguments)
        if self._takes_context:
            given[CONTEXT] = context
        timeout_s = min(self.timeout_s, context.timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._function(**given)
        except TimeoutError:
            raise ToolFailed(f"{self.name} did not finish within {timeout_s:g} s.", "timed_out") from None
        except EgressDenied as error:
            raise ToolFailed(str(error), "unreachable") from error
        if isinstance(result, str):
            return ToolResult(result_text(result))
        return ToolResult(result_text(result.text), result.units, result.files)

    def _parsed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            parsed = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            raise ToolFailed(_sentence(error), "invalid_arguments") from None
        return {name: getattr(parsed, name) for name in self._model.model_fields}


def tool(
    *, timeout_s: float, effect: Effect, missing: Callable[[], str | None] = lambda: None
) -> Callable[[ToolFunction], FunctionTool]:
    """Make a tool of a function. `missing` says what the server lacks to run it, None when nothing."""
    return lambda function: FunctionTool(function, timeout_s, effect, missing)


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON Schema as chat models like it: without titles, and with definitions in their places."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    plain = _plain(schema, definitions)
    assert isinstance(plain, dict)
    return plain


def _model_of(function: ToolFunction) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name != CONTEXT:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints[name], default)
    return create_model(function.__name__, __base__=_Arguments, **fields)


def _plain(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_plain(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(definitions[node["$ref"].removeprefix("#/$defs/")], definitions)
    plain = {
        key: _plain(each, definitions) for key, each in node.items() if key not in ("title", "properties")
    }
    if "properties" in node:
        plain["properties"] = {name: _plain(each, definitions) for name, each in node["properties"].items()}
    return plain


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"The argument {field!r} does not fit: {message}."
