from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from domain.errors import NotFound
from domain.money import ncr
from domain.prices import (
    AGENT_CREATE,
    API_CALL,
    MESSAGE,
    RATE_CARDS,
    STORAGE_WRITE,
    TOOL_CALL,
    RateCard,
    rate_card,
    rate_card_at,
    video_price_ncr,
)

MEGABYTE = 1_000_000


def test_the_first_card_has_the_prices_of_the_requirements():
    card = rate_card("rc-1")
    assert [card.price_ncr(meter) for meter in (MESSAGE, API_CALL, TOOL_CALL, AGENT_CREATE)] == [
        ncr("3"),
        0,
        ncr("0.15"),
        ncr("1.5"),
    ]
    assert card.price_ncr(STORAGE_WRITE, MEGABYTE) == ncr("0.002")
    assert card.price_ncr(STORAGE_WRITE) == 2


@pytest.mark.parametrize(
    ("delivered_s", "price"),
    [(1, "30"), (6, "30"), (7, "45"), (10, "45"), (11, "60"), (20, "60"), (21, "75")],
)
def test_a_video_costs_by_its_delivered_length(delivered_s, price):
    assert video_price_ncr(delivered_s) == ncr(price)


def test_the_latest_card_in_force_is_used_and_old_ones_stay_known():
    (first,) = RATE_CARDS
    change_at = datetime(2030, 1, 1, tzinfo=UTC)
    cards = (RateCard("rc-2", change_at, {MESSAGE: 1}), first)
    assert rate_card_at(change_at - timedelta(microseconds=1), cards) is first
    assert rate_card_at(change_at, cards).rate_card_id == "rc-2"
    with pytest.raises(NotFound):
        rate_card("rc-0")
