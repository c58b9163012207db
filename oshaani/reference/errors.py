"""The page of errors: every code of the API, from the table that decides the statuses."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import groupby

from api.errors import CODES, RETRY_AFTER_S
from domain.errors import Refusal
from domain.ports import ModelErrorClass
from domain.turn import PASSING
from oshaani.reference.markdown import code, page, table

_INTRODUCTION = """
Every answer that is not 2xx has this body, as `application/json`, or as `application/problem+json` for a client that
asks for it:

```json
{
  "error": "Not enough credits",
  "detail": "There are not enough credits for this.",
  "code": "insufficient_credits",
  "type": "http://127.0.0.1:8080/problems/insufficient-credits",
  "title": "Not enough credits",
  "status": 402,
  "instance": "/requests/4bf92f3577b34da6a3ce929d0e0e4736",
  "request_id": "4bf92f3577b34da6a3ce929d0e0e4736"
}
```

Program against `code`; `error` and `detail` are for people. `request_id` is also the header `X-Request-Id`. Where the
table says so, more members follow. An exception in the program is 500 and tells nothing else.
"""

# Whether to send the request again, and the members that come on top. A code without a line fails the test.
_ADVICE: dict[str, tuple[str, str]] = {
    "validation_failed": ("no", "`errors`: a list of {`pointer` (RFC 6901), `code`, `message`}; `fix`"),
    "malformed_json": ("no", ""),
    "invalid_idempotency_key": ("no", ""),
    "invalid_cursor": ("no; begin without a cursor", ""),
    "unauthenticated": ("no", "header `WWW-Authenticate`"),
    "invalid_api_key": ("no", "header `WWW-Authenticate`"),
    "key_revoked": ("no", "header `WWW-Authenticate`"),
    "invalid_credentials": ("no", ""),
    "insufficient_credits": (
        "after a grant, with the same Idempotency-Key",
        "`required`, `available`, `shortfall`, `top_up_url`; for callers with an agent key only `owner_must_top_up`",
    ),
    "forbidden": ("no", ""),
    "csrf_failed": ("no", ""),
    "agent_key_mismatch": ("no", ""),
    "agent_not_published": ("when it is published", ""),
    "not_found": ("no", ""),
    "method_not_allowed": ("no", "header `Allow`"),
    "conflict": ("no", "sometimes `reason`"),
    "request_cancelled": ("no", "`request_id` of the turn, `reason`"),
    "agent_state_conflict": ("no", "`status`, `allowed_transitions`"),
    "custom_tool_limit": ("no", "`limit`"),
    "conversation_busy": ("when the conversation has answered", ""),
    "version_mismatch": ("after reading again", "`current_version`"),
    "payload_too_large": ("no", "`limit_bytes`"),
    "unsupported_media_type": ("no", ""),
    "idempotency_key_reused": ("no; use a new key", ""),
    "tool_not_available": ("no", ""),
    "rate_limited": ("yes", "header `Retry-After`"),
    "plan_limit_exceeded": (
        "tomorrow",
        "`meter`, `limit`, `resets_in_s`, `violated-policies`; header `Retry-After`",
    ),
    "too_many_concurrent_requests": ("yes", "`limit`; header `Retry-After`"),
    "internal_error": ("yes, with the same Idempotency-Key", ""),
    "upstream_failed": ("yes", "`request_id` of the turn, `reason` or `provider`"),
    "dependency_unavailable": ("yes, with the same Idempotency-Key", "header `Retry-After`"),
    "overloaded": ("yes", "header `Retry-After`"),
    "upstream_timeout": ("yes", "`request_id` of the turn, `reason`"),
}
_REFUSALS = """
## Refusals of the domain

What the rules say no to (`domain/errors.py`). Each is recorded with its command. A *remembered* one is served again
for the same Idempotency-Key for ever, because neither waiting nor paying can change it; the others leave the key free.
"""
_MODELS = """
## Why a model gave no reply

The `reason` of a failed turn is `model_` and one of these, or `turn_timeout`.
"""


def errors_page() -> str:
    """The whole page."""
    rows = [(code(name), str(status), title, *_advice(name)) for name, (status, title) in CODES.items()]
    by_status = sorted(rows, key=lambda row: row[1])
    ordered = [row for _, same in groupby(by_status, key=lambda row: row[1]) for row in same]
    return page(
        "Errors",
        _INTRODUCTION,
        table(("code", "status", "error", "send again", "more"), ordered),
        _REFUSALS,
        table(("code", "", "remembered"), _refusals()),
        _MODELS,
        table(("class", "asked again by itself"), _model_errors()),
    )


def _advice(name: str) -> tuple[str, str]:
    again, more = _ADVICE[name]
    if name in RETRY_AFTER_S and "Retry-After" not in more:
        raise ValueError(f"the advice on {name!r} does not mention Retry-After")
    return again, more


def _refusals() -> Iterator[tuple[str, str, str]]:
    for each in _below(Refusal):
        said = (inspect.getdoc(each) or "").splitlines()[0]
        yield code(each.code), said, "yes" if each.remembered else "no"


def _below(refusal: type[Refusal]) -> Iterator[type[Refusal]]:
    for each in refusal.__subclasses__():
        if each.__module__ == Refusal.__module__:
            yield each
            yield from _below(each)


def _model_errors() -> Iterator[tuple[str, str]]:
    for each in ModelErrorClass:
        yield code(each.value), "yes" if each in PASSING else "no"
