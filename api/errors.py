"""What a client is told when something is refused or fails: one body for every status, and the only table of statuses.

The body carries the requirements' `error` and `detail` beside the members of RFC 9457.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from commands.bus import Overloaded
from commands.command import RefusedBefore
from domain.errors import Refusal
from domain.event_log import LogUnavailable
from domain.money import credits
from domain.ports import Busy, SubjectErased
from projections.read_side import ReadSideUnavailable
from schemas.codec import UnknownEvent, encode_json

Headers = Mapping[str, str]

# status and title of every code
CODES: dict[str, tuple[int, str]] = {
    "validation_failed": (400, "The request is not valid"),
    "malformed_json": (400, "The body is not JSON"),
    "invalid_idempotency_key": (400, "The Idempotency-Key is not valid"),
    "invalid_cursor": (400, "The cursor is not valid"),
    "unauthenticated": (401, "Authentication is required"),
    "invalid_api_key": (401, "The API key is not valid"),
    "key_revoked": (401, "The API key is revoked"),
    "invalid_credentials": (401, "The e-mail address or the password is wrong"),
    "insufficient_credits": (402, "Not enough credits"),
    "forbidden": (403, "Not allowed"),
    "csrf_failed": (403, "The request did not come from this site"),
    "agent_key_mismatch": (403, "The key belongs to another agent"),
    "agent_not_published": (403, "The agent is not published"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "conflict": (409, "Conflict"),
    "request_cancelled": (409, "The request was cancelled"),
    "agent_state_conflict": (409, "The agent's state does not allow this"),
    "custom_tool_limit": (409, "Too many custom tools"),
    "conversation_busy": (409, "The conversation is busy"),
    "version_mismatch": (412, "Another version"),
    "payload_too_large": (413, "Too large"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "idempotency_key_reused": (422, "The Idempotency-Key was used for another request"),
    "tool_not_available": (422, "The tool is not available"),
    "rate_limited": (429, "Too many requests"),
    "plan_limit_exceeded": (429, "The plan's limit is reached"),
    "too_many_concurrent_requests": (429, "Too many requests at once"),
    "internal_error": (500, "Internal error"),
    "upstream_failed": (502, "The model or tool failed"),
    "dependency_unavailable": (503, "Temporarily unavailable"),
    "overloaded": (503, "Overloaded"),
    "upstream_timeout": (504, "The answer took too long"),
}
DAY_S = 86_400
RETRY_AFTER_S = {"dependency_unavailable": 1, "overloaded": 1, "too_many_concurrent_requests": 1}


class Problem(Exception):
    """A request is answered with an error; `code` decides status and title."""

    def __init__(
        self,
        code: str,
        detail: str,
        extensions: Mapping[str, Any] | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.extensions, self.headers = dict(extensions or {}), dict(headers or {})
        if code in RETRY_AFTER_S:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S[code]))

    @property
    def status(self) -> int:
        return CODES[self.code][0]

    @property
    def title(self) -> str:
        return CODES[self.code][1]

    def body(self, base_url: str, request_id: str) -> dict[str, Any]:
        """The members of the answer; `request_id` names the HTTP request unless an extension names another."""
        return {
            "error": self.title,
            "detail": self.detail,
            "code": self.code,
            "type": f"{base_url}/problems/{self.code.replace('_', '-')}",
            "title": self.title,
            "status": self.status,
            "instance": f"/requests/{request_id}",
            "request_id": request_id,
            **self.extensions,
        }

    def response(self, base_url: str, request_id: str, accept: str) -> Response:
        """The answer, in the media type that the client asked for."""
        media_type = "application/problem+json" if "problem+json" in accept else "application/json"
        content = encode_json(self.body(base_url, request_id))
        return Response(content, self.status, headers=self.headers, media_type=media_type)


def not_found(noun: str) -> Problem:
    """The same for what does not exist and for what is somebody else's."""
    return Problem("not_found", f"There is no such {noun}.")


def invalid(pointer: str, message: str, code: str = "invalid") -> Problem:
    """One field is not acceptable."""
    return all_invalid([{"pointer": pointer, "code": code, "message": message}])


def all_invalid(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Fields are not acceptable; the first one's message is the sentence."""
    fix = "Correct the fields that `errors` points to (JSON Pointer, RFC 6901) and send the request again."
    return Problem("validation_failed", errors[0]["message"], {"errors": list(errors), "fix": fix})


def problem_of(failure: Exception, by_owner: bool, base_url: str) -> Problem | None:
    """What to answer for an exception; None for one that is a bug."""
    match failure:
        case Problem():
            return failure
        case Refusal():
            return _of_refusal(failure, by_owner, base_url)
        case SubjectErased():
            return not_found("user")
        case LogUnavailable() | ReadSideUnavailable() | UnknownEvent():
            return _unavailable(failure)
        case Overloaded() | Busy():
            return Problem("overloaded", "Too much is going on at once; try again in a moment.")
        case _:
            return None


def _unavailable(failure: Exception) -> Problem:
    sentence = "The database cannot be reached now; nothing was lost."
    if isinstance(failure, UnknownEvent):
        sentence = (
            "A newer version of this server has gone on with it; this one cannot until it is upgraded, too."
        )
    return Problem("dependency_unavailable", sentence)


def _of_refusal(refusal: Refusal, by_owner: bool, base_url: str) -> Problem:
    facts, detail = refusal.facts, str(refusal)
    headers = {"Idempotent-Replayed": "true"} if isinstance(refusal, RefusedBefore) else {}
    match refusal.code:
        case "validation_failed":
            problem = invalid(facts["pointer"], detail, facts["value_code"])
            problem.headers.update(headers)
            return problem
        case "insufficient_credits":
            return Problem(refusal.code, detail, _credits_facts(facts, by_owner, base_url), headers)
        case "plan_limit_exceeded":
            return Problem(refusal.code, detail, *_limit_facts(facts, headers))
        case (
            "agent_state_conflict" | "custom_tool_limit" | "version_mismatch" | "too_many_concurrent_requests"
        ):
            return Problem(refusal.code, detail, facts, headers)
        case code if code in CODES:
            return Problem(code, detail, None, headers)
        case code:
            return Problem("conflict", detail, {"reason": code}, headers)


def quota_headers(meter: str, limit: int, left: int, resets_in_s: int) -> dict[str, str]:
    """A daily quota as draft-ietf-httpapi-ratelimit-headers-10 writes it."""
    name = f"{meter.replace('_', '-')}s-day"
    return {
        "RateLimit-Policy": f'"{name}";q={limit};w={DAY_S}',
        "RateLimit": f'"{name}";r={left};t={resets_in_s}',
    }


def _limit_facts(facts: Mapping[str, Any], headers: Headers) -> tuple[dict[str, Any], dict[str, str]]:
    quota = quota_headers(facts["meter"], facts["limit"], 0, facts["resets_in_s"])
    policy = {"name": f"{facts['meter'].replace('_', '-')}s-day", "limit": facts["limit"]}
    retry = {"Retry-After": str(facts["resets_in_s"])}
    return {**facts, "violated-policies": [policy]}, {**headers, **quota, **retry}


def _credits_facts(facts: Mapping[str, Any], by_owner: bool, base_url: str) -> dict[str, Any]:
    if not by_owner:
        return {"owner_must_top_up": True}
    required, available = facts["needed_ncr"], facts["available_ncr"]
    return {
        "required": credits(required),
        "available": credits(available),
        "shortfall": credits(max(0, required - available)),
        "top_up_url": f"{base_url}/dashboard/credits/",
    }
