"""The tables of the billing page: prices, tiers, daily limits of the plans."""

from __future__ import annotations

from domain.money import credits
from domain.plans import DEFAULT_PLANS, METERS
from domain.prices import RATE_CARDS, STORAGE_WRITE, VIDEO, VIDEO_LONGEST_NCR, VIDEO_TIERS_NCR, RateCard
from oshaani.reference.markdown import code, table

_UNITS = {
    "message": "one message to an agent, on every route but those of `api_call`",
    "api_call": "one call of `POST /api/v1/chat` or `/api/v1/query`",
    "tool_call": "one successful run of a tool",
    "agent_create": "one agent",
    "storage_write": "one byte stored, once; per 10⁶ bytes",
    "video": "one generated video, by its length",
}
_MEGABYTE = 1_000_000


def prices() -> str:
    """The rate cards, one table each."""
    return "\n\n".join(
        f"Rate card `{card.rate_card_id}`, in force since {card.effective_from:%Y-%m-%d}:\n\n{_card(card)}"
        for card in RATE_CARDS
    )


def plans() -> str:
    """Daily limits of the plans."""
    rows = [
        (code(plan), *(_limit(limits.get(meter)) for meter in METERS))
        for plan, limits in DEFAULT_PLANS.items()
    ]
    return table(("plan", *map(code, METERS)), rows)


def _card(card: RateCard) -> str:
    rows = [(code(meter), _UNITS[meter], _price(card, meter)) for meter in card.unit_prices_ncr]
    return table(("meter", "unit", "credits"), rows)


def _price(card: RateCard, meter: str) -> str:
    if meter == VIDEO:
        tiers = [f"{credits(price_ncr)} up to {longest_s} s" for longest_s, price_ncr in VIDEO_TIERS_NCR]
        return ", ".join([*tiers, f"{credits(VIDEO_LONGEST_NCR)} beyond"])
    quantity = _MEGABYTE if meter == STORAGE_WRITE else 1
    return credits(card.price_ncr(meter, quantity))


def _limit(limit: int | None) -> str:
    return "no limit" if limit is None else f"{limit:,}".replace(",", " ")
