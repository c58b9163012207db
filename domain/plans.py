"""Plans: how much of each meter a day, None for no limit. The requirements give no numbers; these are the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domain.prices import AGENT_CREATE, API_CALL, MESSAGE, STORAGE_WRITE, TOOL_CALL

Limits = Mapping[str, int | None]
METERS = (MESSAGE, TOOL_CALL, API_CALL, STORAGE_WRITE, AGENT_CREATE)
_FREE: dict[str, int | None] = {
    MESSAGE: 50,
    TOOL_CALL: 200,
    API_CALL: 500,
    STORAGE_WRITE: 100_000_000,
    AGENT_CREATE: 3,
}
FREE, STARTER, PROFESSIONAL, ENTERPRISE, PAYG = "free", "starter", "professional", "enterprise", "payg"


def _times(factor: int) -> dict[str, int | None]:
    return {meter: limit * factor for meter, limit in _FREE.items() if limit is not None}


UNLIMITED: dict[str, int | None] = dict.fromkeys(METERS)
DEFAULT_PLANS: dict[str, Limits] = {
    FREE: _FREE,
    STARTER: _times(10),
    PROFESSIONAL: _times(100),
    ENTERPRISE: UNLIMITED,
    PAYG: UNLIMITED,
}


def plans_with(overrides: Mapping[str, Any]) -> dict[str, Limits]:
    """The default plans with some limits replaced, for example `{"free": {"message": 100, "agent_create": null}}`.

    Raises:
        ValueError: an unknown plan or meter, or a limit that is neither null nor a whole number ≥ 0.
    """
    plans: dict[str, Limits] = dict(DEFAULT_PLANS)
    for plan, limits in overrides.items():
        if plan not in plans:
            raise ValueError(f"unknown plan {plan!r}; known: {', '.join(plans)}")
        if not isinstance(limits, Mapping):
            raise ValueError(f"limits of plan {plan!r} must be an object of meter: limit")
        for meter, limit in limits.items():
            if meter not in METERS:
                raise ValueError(f"unknown meter {meter!r} in plan {plan!r}; known: {', '.join(METERS)}")
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
                raise ValueError(
                    f"limit of {meter!r} in plan {plan!r} must be null or a whole number >= 0, got {limit!r}"
                )
        plans[plan] = {**plans[plan], **limits}
    return plans
