"""Headers about what is left: the plan's daily quotas (draft-ietf-httpapi-ratelimit-headers-10) and credits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from api.call import Call
from api.errors import quota_headers
from domain.credit_account import CreditAccount
from domain.errors import NotFound
from domain.ids import account_of
from domain.money import credits


async def say_quota(call: Call, meter: str) -> None:
    """Add what is left of a meter today; to the owner also the credits that are left."""
    server, principal = call.server, call.caller()
    try:
        account = await server.bus.read(CreditAccount, account_of(principal.owner_id), principal.owner_id)
    except NotFound:
        return
    if principal.is_owner:
        call.say("Oshaani-Credits-Available", credits(account.available_ncr))
    limits, now = server.rules.plans[account.plan], server.clock()
    left = account.remaining(meter, now, limits)
    limit = limits.get(meter)
    if left is not None and limit is not None:
        for name, value in quota_headers(meter, limit, left, seconds_left_today(now)).items():
            call.say(name, value)


def seconds_left_today(now: datetime) -> int:
    """Until the quotas are whole again: midnight UTC."""
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return int((midnight - now).total_seconds()) + 1
