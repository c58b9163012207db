"""The rate card: what each meter costs (SOP §13.3.1). Immutable; a hold is settled with the card it was taken under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from domain.errors import NotFound
from domain.money import ncr

MESSAGE, API_CALL, TOOL_CALL, AGENT_CREATE, STORAGE_WRITE, VIDEO = (
    "message",
    "api_call",
    "tool_call",
    "agent_create",
    "storage_write",
    "video",
)
VIDEO_TIERS_NCR = ((6, ncr("30")), (10, ncr("45")), (20, ncr("60")))  # delivered seconds up to → price
VIDEO_LONGEST_NCR = ncr("75")


@dataclass(frozen=True, slots=True)
class RateCard:
    """Unit prices in nano-credits, valid from `effective_from`. Units: billing reference, "Price list"."""

    rate_card_id: str
    effective_from: datetime
    unit_prices_ncr: Mapping[str, int]

    def price_ncr(self, meter: str, quantity: int = 1) -> int:
        """What `quantity` units of a meter cost."""
        return self.unit_prices_ncr[meter] * quantity


RATE_CARDS = (
    RateCard(
        "rc-1",
        datetime(2024, 1, 1, tzinfo=UTC),
        {
            MESSAGE: ncr("3"),
            API_CALL: 0,
            TOOL_CALL: ncr("0.15"),
            AGENT_CREATE: ncr("1.5"),
            STORAGE_WRITE: 2,  # per byte: exactly 0.002 credits per 10⁶ bytes
            VIDEO: 1,  # the quantity of a video line is its tier's price, see video_price_ncr
        },
    ),
)


def rate_card_at(at: datetime, cards: tuple[RateCard, ...] = RATE_CARDS) -> RateCard:
    """The card in force at an instant: the latest that is effective by then."""
    return max((card for card in cards if card.effective_from <= at), key=lambda card: card.effective_from)


def rate_card(rate_card_id: str) -> RateCard:
    """The card of an id, also when it is no longer in force."""
    for card in RATE_CARDS:
        if card.rate_card_id == rate_card_id:
            return card
    raise NotFound("rate card")


def video_price_ncr(delivered_s: int) -> int:
    """The price of a generated video by its delivered length in seconds."""
    for longest_s, price_ncr in VIDEO_TIERS_NCR:
        if delivered_s <= longest_s:
            return price_ncr
    return VIDEO_LONGEST_NCR
