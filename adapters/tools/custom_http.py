"""Tools that users define: each call is one HTTP request through the one door (SOP §4.1)."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlencode, urlsplit

import orjson

from adapters.tools.http_answers import check_status, status_text, text_of
from adapters.tools.json_schema import ArgumentsSchema, schema_fault
from adapters.tools.texts import decoded, result_text
from domain.custom_tool import TIMEOUT_S_DEFAULT, placeholders, validate_definition
from domain.ports import (
    Effect,
    Egress,
    EgressDenied,
    Fetched,
    ToolContext,
    ToolFailed,
    ToolKind,
    ToolResult,
    Vault,
)

ANSWER_BYTES_MAX = 1_000_000
ERROR_DETAIL_CHARS_MAX = 500
SECRET_CHARS_MIN = 4  # Shorter words would be blanked out of ordinary text.
BLANK = "[secret]"
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}

_IN_QUERY = frozenset({"GET", "DELETE"})
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class CustomHttpTool:
    """Implements `Tool` from a definition that `domain.custom_tool` accepts. Secrets are read at each call."""

    kind: ToolKind = "custom"

    def __init__(self, definition: Mapping[str, Any], egress: Egress, vault: Vault) -> None:
        if faults := validate_definition(definition):
            raise ValueError(f"{faults[0].pointer}: {faults[0].message}")
        self.name: str = definition["name"]
        self.description: str = definition["description"]
        self.parameters: Mapping[str, Any] = definition.get("parameters", NO_PARAMETERS)
        self.timeout_s = float(definition.get("timeout_s", TIMEOUT_S_DEFAULT))
        self._method: str = definition["method"]
        self._url: str = definition["url"]
        self._headers: Mapping[str, Any] = definition.get("headers") or {}
        self.effect = _effect_of(self._method, bool(definition.get("idempotent", False)))
        # Other tools of the agent must not suffer from parameters that nobody can check.
        self._missing = schema_fault(self.parameters)
        self._schema = ArgumentsSchema(NO_PARAMETERS if self._missing else self.parameters)
        self._egress = egress
        self._vault = vault

    def missing(self) -> str | None:
        return self._missing and f"Change the tool's parameters: they are {self._missing}."

    def validate(self, arguments: Mapping[str, Any]) -> str | None:
        return self.missing() or self._schema.fault(arguments)

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        if fault := self.validate(arguments):
            raise ToolFailed(fault, "invalid_arguments")
        url, body = self._request(arguments)
        timeout_s = min(self.timeout_s, context.timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                headers, secrets = await self._filled_headers(context, has_body=body is not None)
                answer = await self._egress.fetch(
                    self._method,
                    url,
                    headers=headers,
                    body=body,
                    timeout_s=timeout_s,
                    size_bytes_max=ANSWER_BYTES_MAX,
                )
        except TimeoutError:
            sentence = f"{self.name} did not finish within {timeout_s:g} s."
            raise ToolFailed(sentence + self._doubt(), "timed_out") from None
        except EgressDenied as error:
            raise ToolFailed(f"{self.name}: {error}{self._doubt()}", "unreachable") from None
        return self._result(answer, secrets)

    def _doubt(self) -> str:
        return "" if self.effect is Effect.PURE else " Whether it was carried out is not known."

    def _request(self, arguments: Mapping[str, Any]) -> tuple[str, bytes | None]:
        in_url = set(placeholders(self._url))
        url = _PLACEHOLDER.sub(lambda match: _in_url(match[1], arguments[match[1]]), self._url)
        if any(unquote(part) in (".", "..") for part in urlsplit(url).path.split("/")):
            raise ToolFailed("The arguments would lead to another path of the server.", "invalid_arguments")
        rest = {name: value for name, value in arguments.items() if name not in in_url}
        if self._method in _IN_QUERY:
            return _with_query(url, rest), None
        return url, orjson.dumps(rest)

    async def _filled_headers(
        self, context: ToolContext, *, has_body: bool
    ) -> tuple[dict[str, str], list[str]]:
        headers = {"Content-Type": "application/json"} if has_body else {}
        secrets: list[str] = []
        for name, value in self._headers.items():
            if isinstance(value, Mapping):
                secret = await self._vault.get(context.tenant_id, value["secret_ref"])
                if secret is None:
                    sentence = f"The secret for header {name!r} of {self.name} was removed; set it again."
                    raise ToolFailed(sentence, "secret_missing")
                secrets.append(secret)
                value = secret
            headers = {key: each for key, each in headers.items() if key.lower() != name.lower()} | {
                name: value
            }
        if self.effect is Effect.IDEMPOTENT:
            headers["Idempotency-Key"] = context.idempotency_key
        return headers, secrets

    def _result(self, answer: Fetched, secrets: list[str]) -> ToolResult:
        if not 200 <= answer.status < 300:
            detail = _blanked(decoded(answer.body, None), secrets)
            check_status(answer, self.name, " ".join(detail.split())[:ERROR_DETAIL_CHARS_MAX])
        text = _blanked(text_of(answer, f"The answer of {self.name}"), secrets) if answer.body else ""
        return ToolResult(result_text(f"HTTP {status_text(answer.status)}\n\n{text}".rstrip()))


def _effect_of(method: str, idempotent: bool) -> Effect:
    if method == "GET":
        return Effect.PURE
    return Effect.IDEMPOTENT if idempotent else Effect.UNSAFE


def _in_url(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float) or value == "":
        raise ToolFailed(
            f"The argument {name!r} goes into the URL: it must be text or a number.", "invalid_arguments"
        )
    return quote(_plain(value), safe="")


def _with_query(url: str, arguments: Mapping[str, Any]) -> str:
    pairs = [
        (name, _plain(each))
        for name, value in arguments.items()
        for each in (value if isinstance(value, list) else [value])
        if each is not None
    ]
    if not pairs:
        return url
    base, _, _ = url.partition("#")
    return base + ("&" if "?" in base else "?") + urlencode(pairs, quote_via=quote)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _blanked(text: str, secrets: Iterable[str]) -> str:
    """`text` without the secrets, should the other side repeat them: whole, without their scheme, or encoded."""
    words = {word for secret in secrets for word in (secret, secret.rpartition(" ")[2])}
    forms = {form for word in words if len(word) >= SECRET_CHARS_MIN for form in _forms(word)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, BLANK)
    return text


def _forms(word: str) -> Iterator[str]:
    yield from (word, html.escape(word), json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1])
    yield from (quote(word), quote(word, safe=""), quote_plus(word))
