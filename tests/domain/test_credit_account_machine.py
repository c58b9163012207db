"""Whatever is asked of an account in whatever order, what must always be true of it is true."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from domain.credit_account import (
    AVAILABLE,
    EXPIRED,
    HELD,
    ISSUED,
    REVENUE,
    UNCOLLECTED,
    ChargeLine,
    CreditAccount,
    Origin,
)
from domain.errors import Refusal
from domain.ids import HoldId, UserId
from domain.plans import UNLIMITED
from domain.prices import MESSAGE, TOOL_CALL
from tests.domain.spec import state_of

MIDNIGHT = datetime(2026, 1, 1, tzinfo=UTC)
LIFETIME = timedelta(hours=2)
LIMITS = {**UNLIMITED, MESSAGE: 20}
GRANTS = st.integers(0, 5).map(lambda number: UUID(int=100 + number))
HOLDS = st.integers(0, 7)
EXTENSIONS = st.integers(0, 3).map(lambda number: UUID(int=200 + number))
AMOUNTS = st.integers(0, 40) | st.integers(0, 3)
KINDS = st.sampled_from(["free", "promotion", "adjustment", "purchase"])


class AccountMachine(RuleBasedStateMachine):
    """An account whose unit prices are one nano-credit, so that small numbers meet every edge."""

    def __init__(self) -> None:
        super().__init__()
        self.account = CreditAccount.open(UserId(UUID(int=1)))
        self.replica: CreditAccount | None = None
        for event in self.account.collect_events():
            self.replica = event.mutate(self.replica)
        self.books: Counter[str] = Counter()
        self.now = MIDNIGHT
        self.used_holds: set[int] = set()
        self.ends: Counter[UUID] = Counter()
        self.given: Counter[UUID] = Counter()
        self.usage_ncr = 0

    def ask(self, name: str, *arguments: object) -> None:
        """Decide on a fork and keep it unless it refuses, as the bus does."""
        fork = self.account.fork()
        fork._pending_events = []
        before = state_of(self.account)
        try:
            getattr(fork, name)(*arguments)
        except Refusal:
            assert state_of(self.account) == before
            return
        for event in fork.collect_events():
            self.record(event)
        self.account = fork

    def record(self, event: Any) -> None:
        self.replica = event.mutate(self.replica)
        if isinstance(event, CreditAccount.Moved):
            assert sum(leg.amount_ncr for leg in event.postings) == 0
            self.books.update({leg.book: leg.amount_ncr for leg in event.postings})
            assert event.available_after_ncr == self.books[AVAILABLE] >= 0
            assert event.held_after_ncr == self.books[HELD] >= 0
        match event:
            case CreditAccount.CreditsGranted(grant=grant):
                self.given[grant.grant_id] += 1
            case CreditAccount.CreditsSettled():
                assert event.captured_ncr + event.released_ncr == -next(
                    (leg.amount_ncr for leg in event.postings if leg.book == HELD), 0
                )
                self.used(event)
                self.ends[event.hold_id] += 1
            case CreditAccount.LateCharge():
                self.used(event)
            case CreditAccount.HoldReleased() | CreditAccount.HoldExpired():
                self.ends[event.hold_id] += 1

    def used(self, event: CreditAccount.CreditsSettled | CreditAccount.LateCharge) -> None:
        assert sum(each.amount_ncr for each in event.slices) == event.captured_ncr
        assert all(each.amount_ncr > 0 for each in event.slices)
        self.usage_ncr += sum(line.quantity * line.unit_price_ncr for line in event.lines)

    @rule(grant_id=GRANTS, kind=KINDS, amount_ncr=AMOUNTS, lives_h=st.none() | st.integers(1, 30))
    def grant(self, grant_id: UUID, kind: str, amount_ncr: int, lives_h: int | None) -> None:
        expires_at = None if lives_h is None else self.now + timedelta(hours=lives_h)
        self.ask("grant", grant_id, kind, amount_ncr, self.now, expires_at)

    @rule(number=HOLDS, amount_ncr=AMOUNTS)
    def hold(self, number: int, amount_ncr: int) -> None:
        # An id that has ended does not come again: the stream of its turn exists.
        hold_id = self.hold_id(number)
        if self.ends[hold_id] == 0:
            self.ask("hold", hold_id, amount_ncr, MESSAGE, self.now, LIFETIME, LIMITS)

    @rule(number=HOLDS, extension_id=EXTENSIONS, amount_ncr=AMOUNTS)
    def extend(self, number: int, extension_id: UUID, amount_ncr: int) -> None:
        self.ask("extend", self.hold_id(number), extension_id, amount_ncr, TOOL_CALL, self.now, LIMITS)

    @rule(number=HOLDS, message=st.booleans(), tools=AMOUNTS)
    def settle(self, number: int, message: bool, tools: int) -> None:
        self.ask("settle", self.hold_id(number), self.lines(message, tools), Origin())

    @rule(number=HOLDS)
    def settle_all_of_it(self, number: int) -> None:
        hold = self.account.holds.get(self.hold_id(number))
        if hold is not None:
            self.ask("settle", self.hold_id(number), self.lines(True, max(0, hold.amount_ncr - 1)), Origin())

    @rule(number=HOLDS)
    def expire_hold(self, number: int) -> None:
        self.ask("expire_hold", self.hold_id(number), self.now)

    @rule(number=HOLDS, tools=AMOUNTS)
    def charge_late(self, number: int, tools: int) -> None:
        self.ask("charge_late", self.hold_id(number), self.lines(True, tools), Origin())

    @rule()
    def expire_grants(self) -> None:
        self.ask("expire_grants", self.now)

    @rule(hours=st.integers(1, 13))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @staticmethod
    def hold_id(number: int) -> HoldId:
        return HoldId(UUID(int=300 + number))

    @staticmethod
    def lines(message: bool, tools: int) -> list[ChargeLine]:
        lines = [ChargeLine(MESSAGE, 1, 1, "rc-1")] if message else []
        return [*lines, ChargeLine(TOOL_CALL, tools, 1, "rc-1", "ocr")] if tools else lines

    @invariant()
    def balances_are_never_below_zero(self) -> None:
        assert self.account.available_ncr == self.books[AVAILABLE] >= 0
        assert self.account.held_ncr == self.books[HELD] >= 0

    @invariant()
    def open_holds_are_what_is_held(self) -> None:
        assert sum(hold.amount_ncr for hold in self.account.holds.values()) == self.account.held_ncr

    @invariant()
    def remaining_grants_are_the_settled_balance(self) -> None:
        assert sum(grant.remaining_ncr for grant in self.account.grants) == self.account.posted_ncr
        assert all(grant.remaining_ncr > 0 for grant in self.account.grants)
        orders = [grant.consumption_order for grant in self.account.grants]
        assert orders == sorted(orders)

    @invariant()
    def books_balance(self) -> None:
        assert sum(self.books.values()) == 0
        assert self.books[REVENUE] == self.usage_ncr
        assert self.books[ISSUED] <= 0 <= self.books[EXPIRED]
        assert self.books[UNCOLLECTED] <= 0

    @invariant()
    def nothing_happens_twice(self) -> None:
        assert max(self.ends.values(), default=0) <= 1
        assert max(self.given.values(), default=0) <= 1

    @invariant()
    def replay_gives_the_same_account(self) -> None:
        assert self.replica is not None
        assert state_of(self.replica) == state_of(self.account)


TestAccountMachine = AccountMachine.TestCase
TestAccountMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
