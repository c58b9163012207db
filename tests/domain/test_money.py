from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from domain.money import NCR_PER_CREDIT, credits, ncr

AMOUNTS_NCR = st.integers(-(10**18) + 1, 10**18 - 1)


@given(AMOUNTS_NCR)
@example(0)
@example(-1)
def test_an_amount_survives_being_written_and_read(amount_ncr):
    assert ncr(credits(amount_ncr)) == amount_ncr


@given(AMOUNTS_NCR)
def test_written_amounts_have_two_decimals_and_no_zeros_too_many(amount_ncr):
    assert re.fullmatch(r"-?(0|[1-9]\d*)\.\d(\d|\d{1,7}[1-9])", credits(amount_ncr))


@given(st.integers(0, 999_999_999), st.text("0123456789", min_size=1, max_size=9))
def test_what_people_write_means_what_it_says(whole, decimals):
    fraction_ncr = int(decimals) * 10 ** (9 - len(decimals))
    assert ncr(f"{whole}.{decimals}") == whole * NCR_PER_CREDIT + fraction_ncr
    assert ncr(f"-{whole}.{decimals}") == -ncr(f"{whole}.{decimals}")


@given(AMOUNTS_NCR.filter(lambda amount: amount > 0), AMOUNTS_NCR.filter(lambda amount: amount > 0))
def test_sums_are_exact(one, other):
    assert ncr(credits(one)) + ncr(credits(other)) == one + other


@pytest.mark.parametrize(
    ("amount_ncr", "text"),
    [
        *((0, "0.00"), (NCR_PER_CREDIT, "1.00"), (150_000_000, "0.15"), (3_450_000_000, "3.45")),
        *((1, "0.000000001"), (-1, "-0.000000001"), (-1_500_000_000, "-1.50"), (100_000_000, "0.10")),
    ],
)
def test_amounts_as_people_see_them(amount_ncr, text):
    assert credits(amount_ncr) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "1.",
        ".5",
        "1e3",
        "+1",
        " 1",
        "1\n",
        "1,5",
        "0x1",
        "1.0000000001",
        "1234567890",
        "--1",
        "1_0",
        "٣",
        "NaN",
    ],
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="not an amount of credits"):
        ncr(text)
