"""Credits, usage and plans (SOP §13). Amounts are decimal strings, never JSON numbers."""

from __future__ import annotations

import asyncio
import time
from datetime import date, timedelta
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.bodies import Body, StrictRoute
from api.call import Call, request_name
from api.envelopes import Envelope, Listed, enveloped, instant, listed
from api.errors import invalid, not_found
from api.idempotency import OnceDep
from api.pages import PagingDep, begins_after, page_of
from api.principals import UserCall
from api.quotas import seconds_left_today
from commands.credit_account import ChangePlan
from domain.agent import Agent
from domain.credit_account import CreditAccount
from domain.errors import NotFound
from domain.ids import account_of
from domain.money import credits
from domain.plans import METERS
from domain.prices import STORAGE_WRITE, VIDEO, VIDEO_LONGEST_NCR, VIDEO_TIERS_NCR, rate_card_at
from projections.credit_ledger import (
    GrantRow,
    LedgerLine,
    get_account,
    list_grants,
    list_ledger,
    unsettled_turns,
)
from projections.usage import DIMENSIONS, Dimension, UsageRow, get_usage

SETTLING_S, LOOK_S = 2.0, 0.01  # how long a reader waits for charges under way, and how often it looks
DAYS_DEFAULT, DAYS_MAX = 30, 366
COUNT_MAX = 2**63 - 1  # more than a day can count

router = APIRouter(route_class=StrictRoute, tags=["Billing"])

Amount = Annotated[str, Field(examples=["196.55"], description="Credits, as a decimal string.")]


class PlanBody(Body):
    """Another plan."""

    plan: Annotated[str, Field(min_length=1, max_length=50, examples=["payg"])]


class Balance(BaseModel):
    """What an account has: `posted` = `available` + `held`."""

    posted: Amount
    held: Amount
    available: Amount
    plan: str
    low_balance: bool
    grants: list[dict[str, Any]]


class LedgerEntry(BaseModel):
    """What changed the balance, signed. The sum of all entries is `posted`."""

    id: str
    recorded_at: str
    kind: str
    amount: Amount
    balance_after: Amount
    meter: str | None
    quantity: int | None
    tool: str | None
    agent_id: int | None
    turn_id: str | None
    request_id: str | None
    actor: str
    reason: str | None = Field(default=None, description="Why credits were given.")
    payment_ref: str | None = Field(default=None, description="The payment that bought them.")


class UsageSum(BaseModel):
    """What was used; dimensions that were not asked for are null."""

    day: str | None
    meter: str | None
    agent_id: int | None
    actor: str | None
    quantity: int
    credits: Amount


class UsageData(BaseModel):
    """What was used from the first to the last day, both included (UTC)."""

    first: str = Field(alias="from")
    last: str = Field(alias="to")
    sums: list[UsageSum]


@router.get("/api/billing/balance", response_model=Envelope[Balance])
async def get_balance(call: UserCall) -> Response:
    """The balance. Charges of answers already given are in it."""
    await _settled(call)
    owner_id, db = call.caller().owner_id, call.server.db
    account = await get_account(db, owner_id)
    if account is None:
        raise not_found("credit account")
    grants = await list_grants(db, owner_id)
    data = {
        "posted": credits(account.posted_ncr),
        "held": credits(account.held_ncr),
        "available": credits(account.available_ncr),
        "plan": account.plan,
        "low_balance": account.low_balance,
        "grants": [_grant(grant) for grant in grants],
    }
    call.say("Oshaani-Credits-Available", credits(account.available_ncr))
    return enveloped(data, "Your balance.")


@router.get("/api/billing/ledger", response_model=Listed[LedgerEntry])
async def get_ledger(call: UserCall, paging: PagingDep) -> Response:
    """The ledger, newest first."""
    after = begins_after(call, paging.cursor, "ledger")
    await _settled(call)
    key = (int(after[0]), int(after[1])) if after else None
    rows = await list_ledger(call.server.db, call.caller().owner_id, paging.limit + 1, key)
    page = page_of(call, paging, "ledger", rows, lambda row: row.after)
    return listed(page, [await _entry(call, row) for row in page.rows], "Your ledger.")


@router.get("/api/billing/usage", response_model=Envelope[UsageData])
async def get_usage_of_user(
    call: UserCall,
    first: Annotated[date | None, Query(alias="from", description="First day, UTC.")] = None,
    last: Annotated[date | None, Query(alias="to", description="Last day, UTC.")] = None,
    group_by: Annotated[str, Query(max_length=50, description="Of day, meter, agent, actor.")] = "day,meter",
) -> Response:
    """What was used and charged, summed up by the dimensions asked for."""
    last_day = last or call.server.clock().date()
    first_day = first or last_day - timedelta(days=DAYS_DEFAULT - 1)
    if not 0 <= (last_day - first_day).days < DAYS_MAX:
        raise invalid("?from", f"From 'from' to 'to' is 1 to {DAYS_MAX} days.", "invalid_range")
    names = [name.strip() for name in group_by.split(",") if name.strip()]
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown:
        raise invalid(
            "?group_by", f"group_by is of {', '.join(DIMENSIONS)}; not {unknown[0]!r}.", "unknown_dimension"
        )
    await _settled(call)
    dimensions = cast(list[Dimension], names)
    rows = await get_usage(call.server.db, call.caller().owner_id, first_day, last_day, dimensions)
    data = [await _sum(call, row) for row in rows]
    return enveloped({"from": str(first_day), "to": str(last_day), "sums": data}, "Your usage.")


@router.get("/api/billing/limits", response_model=Envelope[list[dict[str, Any]]])
async def get_limits(call: UserCall) -> Response:
    """Today's quotas of the plan: limit, used, remaining; null means unlimited."""
    account = await _account(call)
    now = call.server.clock()
    limits = call.server.rules.plans[account.plan]
    data = []
    for meter in METERS:
        remaining = account.remaining(meter, now, limits)
        used = COUNT_MAX - (account.remaining(meter, now, {meter: COUNT_MAX}) or 0)
        line = {"limit": limits.get(meter), "used": used, "remaining": remaining}
        data.append({"meter": meter, "unit": _unit(meter), **line})
    return enveloped(data, "Today's limits.", plan=account.plan, resets_in_s=seconds_left_today(now))


@router.get("/api/billing/rates", response_model=Envelope[dict[str, Any]])
async def get_rates(call: UserCall) -> Response:
    """What everything costs now."""
    card = rate_card_at(call.server.clock())
    prices = [
        {"meter": meter, "unit": _unit(meter), "credits": credits(price_ncr)}
        for meter, price_ncr in card.unit_prices_ncr.items()
        if meter != VIDEO
    ]
    tiers = [{"seconds_up_to": seconds, "credits": credits(price)} for seconds, price in VIDEO_TIERS_NCR]
    tiers.append({"seconds_up_to": None, "credits": credits(VIDEO_LONGEST_NCR)})
    data = {
        "rate_card_id": card.rate_card_id,
        "effective_from": instant(card.effective_from),
        "prices": prices,
        "video": tiers,
    }
    return enveloped(data, "Prices in credits.")


@router.get("/api/billing/plans", response_model=Envelope[list[dict[str, Any]]])
async def list_plans(call: UserCall) -> Response:
    """The plans and their daily limits; null means unlimited."""
    data = [{"plan": plan, "limits": dict(limits)} for plan, limits in call.server.rules.plans.items()]
    return enveloped(data, "Plans.", next_cursor=None)


@router.put("/api/billing/plan", response_model=Envelope[dict[str, Any]])
async def change_plan(call: UserCall, once: OnceDep, body: PlanBody) -> Response:
    """Choose another plan: other limits, the same credits."""
    command = ChangePlan(tenant_id=call.caller().owner_id, plan=body.plan)
    outcome = await call.execute(command, once.command_id, once.digest)
    return enveloped({"plan": outcome.result["plan"]}, "Plan changed.")


async def _settled(call: Call) -> None:
    """Wait until charges of turns that have ended are booked, so that a balance is never older than an answer."""
    await call.reads()
    owner_id, deadline = call.caller().owner_id, time.monotonic() + SETTLING_S
    while time.monotonic() < deadline:
        if not await unsettled_turns(call.server.db, owner_id):
            return
        await asyncio.sleep(LOOK_S)


async def _account(call: Call) -> CreditAccount:
    owner_id = call.caller().owner_id
    return await call.server.bus.read(CreditAccount, account_of(owner_id), owner_id)


def _unit(meter: str) -> str:
    return "byte" if meter == STORAGE_WRITE else "each"


def _grant(row: GrantRow) -> dict[str, Any]:
    return {
        "id": str(row.grant_id),
        "kind": row.kind,
        "granted": credits(row.granted_ncr),
        "remaining": credits(row.remaining_ncr),
        "granted_at": instant(row.granted_at),
        "expires_at": instant(row.expires_at),
    }


async def _entry(call: Call, row: LedgerLine) -> dict[str, Any]:
    return {
        "id": str(row.ledger_id),
        "recorded_at": instant(row.recorded_at),
        "kind": row.kind,
        "grant_kind": row.grant_kind,
        "amount": credits(row.amount_ncr),
        "balance_after": credits(row.balance_after_ncr),
        "meter": row.meter,
        "quantity": row.quantity,
        "tool": row.tool,
        "agent_id": await _number(call, row.agent_id),
        "turn_id": str(row.turn_id) if row.turn_id else None,
        "request_id": request_name(row.turn_id) if row.turn_id else None,
        "actor": row.actor,
        "reason": row.reason,
        "payment_ref": row.payment_ref,
    }


async def _sum(call: Call, row: UsageRow) -> dict[str, Any]:
    return {
        "day": str(row.day) if row.day else None,
        "meter": row.meter,
        "agent_id": await _number(call, row.agent_id),
        "actor": row.actor,
        "quantity": row.quantity,
        "credits": credits(row.charged_ncr),
    }


async def _number(call: Call, agent_id: Any) -> int | None:
    """The number people know an agent by, deleted ones included."""
    if agent_id is None:
        return None
    try:
        return (await call.server.bus.read(Agent, agent_id, call.caller().owner_id)).number
    except NotFound:
        return None
