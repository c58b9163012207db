"""Credits as whole numbers: one credit is 10⁹ nano-credits (ncr). No float, no division, ever."""

from __future__ import annotations

import re

NCR_PER_CREDIT = 1_000_000_000
_CREDITS = re.compile(r"(-?)(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)


def ncr(credits: str) -> int:
    """Nano-credits of a decimal string such as "0.15".

    Raises:
        ValueError: not a plain decimal with at most nine digits on either side of the point.
    """
    match = _CREDITS.fullmatch(credits)
    if match is None:
        raise ValueError(f"not an amount of credits: {credits!r}; write it like '12.5', at most 9 decimals")
    sign, whole, fraction = match.groups()
    amount_ncr = int(whole) * NCR_PER_CREDIT + int((fraction or "").ljust(9, "0"))
    return -amount_ncr if sign else amount_ncr


def credits(amount_ncr: int) -> str:
    """The decimal string people see: at least two decimals, no superfluous zeros, "-" only before a debt."""
    whole, fraction = divmod(abs(amount_ncr), NCR_PER_CREDIT)
    decimals = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount_ncr < 0 else ''}{whole}.{decimals}"
