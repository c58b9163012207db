"""What a user may still spend, what running work has set aside, and where every credit came from and went.

Every event that moves credits carries its double-entry postings, which sum to zero, and the balances after it, so that
an auditor can check the account row by row (docs/reference/billing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Literal
from uuid import UUID

from domain.aggregate import Created, Root
from domain.errors import InsufficientCredits, InvalidValue, NotFound, PlanLimitExceeded
from domain.ids import AccountId, HoldId, UserId, account_of
from domain.money import ncr
from domain.plans import FREE, Limits

AVAILABLE, HELD, REVENUE, ISSUED, EXPIRED, UNCOLLECTED = (
    "available",
    "held",
    "revenue",
    "issued",
    "expired",
    "uncollected",
)
LOW_BALANCE_NCR = ncr("20")
GRANT_TEXT_CHARS_MAX = 500
REARM_NUMERATOR, REARM_DENOMINATOR = 11, 10  # the warning is re-armed above 1.1 × the threshold

GrantKind = Literal["free", "purchase", "adjustment", "promotion"]


@dataclass(frozen=True, slots=True)
class Posting:
    """One leg of a movement: what `book` gains (or loses), in nano-credits."""

    book: str
    amount_ncr: int


@dataclass(frozen=True, slots=True)
class ChargeLine:
    """One itemised charge: `quantity` units of a meter at the unit price of a rate card."""

    meter: str
    quantity: int
    unit_price_ncr: int
    rate_card_id: str
    tool: str | None = None

    @property
    def amount_ncr(self) -> int:
        return self.quantity * self.unit_price_ncr


@dataclass(frozen=True, slots=True)
class Origin:
    """What a charge is for: the dimensions of its ledger and usage rows."""

    agent_id: UUID | None = None
    turn_id: UUID | None = None
    actor: str = ""
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """How much of a grant a charge consumed."""

    grant_id: UUID
    amount_ncr: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits given; consumed in the order priority, expiry (none last), granted_at, id."""

    grant_id: UUID
    kind: GrantKind
    priority: int
    granted_at: datetime
    expires_at: datetime | None
    remaining_ncr: int

    @property
    def consumption_order(self) -> tuple[int, bool, float, datetime, UUID]:
        expiry = self.expires_at
        return (
            self.priority,
            expiry is None,
            expiry.timestamp() if expiry else 0.0,
            self.granted_at,
            self.grant_id,
        )


@dataclass(frozen=True, slots=True)
class Hold:
    """Credits set aside for an action until it is settled, released or expires."""

    amount_ncr: int
    expires_at: datetime
    extension_ids: frozenset[UUID] = frozenset()


class CreditAccount(Root):
    """The account of one user; its stream is the only truth about that user's credits."""

    TOPIC = "CreditAccount"

    class Moved(Root.Event):
        """Shared by all events that move credits."""

        TOPIC = "CreditAccount.Moved"
        postings: tuple[Posting, ...]
        available_after_ncr: int
        held_after_ncr: int

        def apply(self, aggregate: CreditAccount) -> None:
            aggregate.available_ncr = self.available_after_ncr
            aggregate.held_ncr = self.held_after_ncr

    class Opened(Root.Event, Created):
        TOPIC = "CreditAccount.Opened"
        owner_id: UserId
        plan: str

    class CreditsGranted(Moved):
        TOPIC = "CreditAccount.CreditsGranted"
        grant: Grant
        reason: str | None = None
        payment_ref: str | None = None  # what the payment provider calls the payment

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            grants = [*aggregate.grants, self.grant]
            aggregate.grants = sorted(grants, key=lambda grant: grant.consumption_order)
            aggregate.grant_ids.add(self.grant.grant_id)
            if self.grant.kind == "free":
                aggregate.free_granted = True

    class CreditsHeld(Moved):
        TOPIC = "CreditAccount.CreditsHeld"
        hold_id: HoldId
        amount_ncr: int
        meter: str
        quantity: int
        expires_at: datetime
        held_at: datetime

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            aggregate.holds[self.hold_id] = Hold(self.amount_ncr, self.expires_at)
            aggregate._count(self.meter, self.quantity, self.held_at)

    class HoldExtended(Moved):
        TOPIC = "CreditAccount.HoldExtended"
        hold_id: HoldId
        extension_id: UUID
        amount_ncr: int
        meter: str
        quantity: int
        extended_at: datetime

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            hold = aggregate.holds[self.hold_id]
            aggregate.holds[self.hold_id] = replace(
                hold,
                amount_ncr=hold.amount_ncr + self.amount_ncr,
                extension_ids=hold.extension_ids | {self.extension_id},
            )
            aggregate._count(self.meter, self.quantity, self.extended_at)

    class CreditsSettled(Moved):
        TOPIC = "CreditAccount.CreditsSettled"
        hold_id: HoldId
        lines: tuple[ChargeLine, ...]
        slices: tuple[Slice, ...]
        captured_ncr: int
        released_ncr: int
        origin: Origin

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            del aggregate.holds[self.hold_id]
            aggregate._consume(self.slices)

    class HoldReleased(Moved):
        TOPIC = "CreditAccount.HoldReleased"
        hold_id: HoldId
        released_ncr: int
        origin: Origin

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            del aggregate.holds[self.hold_id]

    class HoldExpired(Moved):
        TOPIC = "CreditAccount.HoldExpired"
        hold_id: HoldId
        released_ncr: int

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            del aggregate.holds[self.hold_id]
            aggregate.expired_hold_ids.add(self.hold_id)

    class LateCharge(Moved):
        """Work that succeeded after its hold had expired: what could be collected, and what could not."""

        TOPIC = "CreditAccount.LateCharge"
        hold_id: HoldId
        lines: tuple[ChargeLine, ...]
        slices: tuple[Slice, ...]
        captured_ncr: int
        uncollected_ncr: int
        origin: Origin

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            aggregate.expired_hold_ids.discard(self.hold_id)
            aggregate._consume(self.slices)

    class GrantExpired(Moved):
        TOPIC = "CreditAccount.GrantExpired"
        grant_id: UUID
        expired_ncr: int

        def apply(self, aggregate: CreditAccount) -> None:
            CreditAccount.Moved.apply(self, aggregate)
            aggregate._consume((Slice(self.grant_id, self.expired_ncr),))

    class PlanChanged(Root.Event):
        TOPIC = "CreditAccount.PlanChanged"
        plan: str

        def apply(self, aggregate: CreditAccount) -> None:
            aggregate.plan = self.plan

    class LowBalanceCrossed(Root.Event):
        TOPIC = "CreditAccount.LowBalanceCrossed"
        threshold_ncr: int
        posted_ncr: int

        def apply(self, aggregate: CreditAccount) -> None:
            aggregate.low_balance_armed = False

    class BalanceRecovered(Root.Event):
        TOPIC = "CreditAccount.BalanceRecovered"
        threshold_ncr: int
        posted_ncr: int

        def apply(self, aggregate: CreditAccount) -> None:
            aggregate.low_balance_armed = True

    def __init__(self, owner_id: UserId, plan: str) -> None:
        self.owner_id = owner_id
        self.plan = plan
        self.available_ncr = 0
        self.held_ncr = 0
        self.grants: list[Grant] = []  # with something left, in the order of consumption
        self.grant_ids: set[UUID] = set()  # of all grants ever: each is given once
        self.holds: dict[UUID, Hold] = {}
        self.expired_hold_ids: set[UUID] = set()  # whose work may still report
        self.free_granted = False
        self.low_balance_armed = True
        self.counted_on: date | None = None
        self.counts: dict[str, int] = {}

    @classmethod
    def open(cls, owner_id: UserId, plan: str = FREE) -> CreditAccount:
        """The account a user gets with the first login."""
        return cls.begin(cls.Opened, account_of(owner_id), owner_id=owner_id, plan=plan)

    @property
    def account_id(self) -> AccountId:
        return AccountId(self.id)

    @property
    def posted_ncr(self) -> int:
        """The settled balance: what is available plus what is set aside."""
        return self.available_ncr + self.held_ncr

    # --- money comes in

    def grant(
        self,
        grant_id: UUID,
        kind: GrantKind,
        amount_ncr: int,
        granted_at: datetime,
        expires_at: datetime | None = None,
        reason: str | None = None,
        payment_ref: str | None = None,
    ) -> None:
        """Give credits. The free grant happens once in the life of an account, other grants once per id.

        Raises:
            InvalidValue: the amount is nothing, or a text is too long.
        """
        if amount_ncr <= 0:
            raise InvalidValue("/amount", "The amount must be more than 0 credits.")
        for field, text in (("reason", reason), ("payment_ref", payment_ref)):
            if text is not None and not 1 <= len(text) <= GRANT_TEXT_CHARS_MAX:
                sentence = f"{field} has 1 to {GRANT_TEXT_CHARS_MAX} characters."
                raise InvalidValue(f"/{field}", sentence, "length")
        if (kind == "free" and self.free_granted) or grant_id in self.grant_ids:
            return
        priority = {"free": 0, "promotion": 1}.get(kind, 2)
        grant = Grant(grant_id, kind, priority, granted_at, expires_at, amount_ncr)
        postings = ((ISSUED, -amount_ncr), (AVAILABLE, amount_ncr))
        self._move(self.CreditsGranted, postings, grant=grant, reason=reason, payment_ref=payment_ref)
        self._rearm_warning()

    def expire_grants(self, now: datetime) -> None:
        """Take back what is left of grants past their expiry, as far as running work has not set it aside."""
        for grant in tuple(self.grants):
            expired_ncr = min(grant.remaining_ncr, self.available_ncr)
            if grant.expires_at is not None and grant.expires_at <= now and expired_ncr > 0:
                postings = ((AVAILABLE, -expired_ncr), (EXPIRED, expired_ncr))
                self._move(self.GrantExpired, postings, grant_id=grant.grant_id, expired_ncr=expired_ncr)

    # --- work

    def hold(
        self,
        hold_id: HoldId,
        amount_ncr: int,
        meter: str,
        now: datetime,
        lifetime: timedelta,
        limits: Limits,
        quantity: int = 1,
    ) -> None:
        """Set credits aside before work starts, so that it can never outspend its owner.

        An account with nothing available is refused also when the price is 0.

        Raises:
            PlanLimitExceeded: the plan's daily quota of `meter` is used up.
            InsufficientCredits: fewer than `amount_ncr` nano-credits are available.
        """
        if hold_id in self.holds:
            return
        self.expire_holds(now)
        self.expire_grants(now)
        self._check_limit(meter, quantity, now, limits)
        if amount_ncr > self.available_ncr or self.available_ncr <= 0:
            raise InsufficientCredits(amount_ncr, self.available_ncr)
        self._move(
            self.CreditsHeld,
            ((AVAILABLE, -amount_ncr), (HELD, amount_ncr)),
            hold_id=hold_id,
            amount_ncr=amount_ncr,
            meter=meter,
            quantity=quantity,
            expires_at=now + lifetime,
            held_at=now,
        )

    def extend(
        self, hold_id: HoldId, extension_id: UUID, amount_ncr: int, meter: str, now: datetime, limits: Limits
    ) -> None:
        """Set more aside for work that grew, for example by a tool call; once per `extension_id`.

        Raises:
            NotFound: the hold has ended.
            PlanLimitExceeded: the plan's daily quota of `meter` is used up.
            InsufficientCredits: fewer than `amount_ncr` nano-credits are available.
        """
        if hold_id not in self.holds:
            raise NotFound("hold")
        if extension_id in self.holds[hold_id].extension_ids:
            return
        self._check_limit(meter, 1, now, limits)
        if amount_ncr > self.available_ncr:
            raise InsufficientCredits(amount_ncr, self.available_ncr)
        self._move(
            self.HoldExtended,
            ((AVAILABLE, -amount_ncr), (HELD, amount_ncr)),
            hold_id=hold_id,
            extension_id=extension_id,
            amount_ncr=amount_ncr,
            meter=meter,
            quantity=1,
            extended_at=now,
        )

    def settle(self, hold_id: HoldId, lines: Sequence[ChargeLine], origin: Origin) -> None:
        """End a hold: charge the lines, give the rest back. One that has expired is charged late, once.

        A hold that already ended otherwise is left alone.

        Raises:
            InvalidValue: the lines cost more than was set aside.
        """
        hold = self.holds.get(hold_id)
        if hold is None:
            self.charge_late(hold_id, lines, origin)
            return
        cost_ncr = sum(line.amount_ncr for line in lines)
        if cost_ncr > hold.amount_ncr:
            raise InvalidValue(
                "/lines", f"The lines cost {cost_ncr} ncr but only {hold.amount_ncr} ncr are held."
            )
        rest_ncr = hold.amount_ncr - cost_ncr
        if not lines:
            postings = ((HELD, -hold.amount_ncr), (AVAILABLE, hold.amount_ncr))
            self._move(
                self.HoldReleased, postings, hold_id=hold_id, released_ncr=hold.amount_ncr, origin=origin
            )
        else:
            self._move(
                self.CreditsSettled,
                ((HELD, -hold.amount_ncr), (REVENUE, cost_ncr), (AVAILABLE, rest_ncr)),
                hold_id=hold_id,
                lines=tuple(lines),
                slices=self._slices(cost_ncr),
                captured_ncr=cost_ncr,
                released_ncr=rest_ncr,
                origin=origin,
            )
        self._warn_if_low()

    def expire_holds(self, now: datetime) -> None:
        """Give back every hold past its expiry. It outlives its turn's deadline by far, so no such turn is alive."""
        # Holds are taken in the order in which they expire, but for a few that are settled at once.
        while self.holds and (first := next(iter(self.holds.items())))[1].expires_at <= now:
            self.expire_hold(HoldId(first[0]), now)

    def expire_hold(self, hold_id: HoldId, now: datetime) -> None:
        """Give back what was set aside for work that never reported. Whoever asks has made sure that it is not alive."""
        hold = self.holds.get(hold_id)
        if hold is not None and hold.expires_at <= now:
            postings = ((HELD, -hold.amount_ncr), (AVAILABLE, hold.amount_ncr))
            self._move(self.HoldExpired, postings, hold_id=hold_id, released_ncr=hold.amount_ncr)

    def charge_late(self, hold_id: HoldId, lines: Sequence[ChargeLine], origin: Origin) -> None:
        """Charge work whose hold had expired: as much as is available, the rest is booked as uncollected.

        Once per hold; a hold that did not expire is left alone.
        """
        if hold_id not in self.expired_hold_ids or not lines:
            return
        cost_ncr = sum(line.amount_ncr for line in lines)
        captured_ncr = min(cost_ncr, self.available_ncr)
        uncollected_ncr = cost_ncr - captured_ncr
        self._move(
            self.LateCharge,
            ((AVAILABLE, -captured_ncr), (UNCOLLECTED, -uncollected_ncr), (REVENUE, cost_ncr)),
            hold_id=hold_id,
            lines=tuple(lines),
            slices=self._slices(captured_ncr),
            captured_ncr=captured_ncr,
            uncollected_ncr=uncollected_ncr,
            origin=origin,
        )
        self._warn_if_low()

    def change_plan(self, plan: str) -> None:
        """Another set of limits; balances are untouched."""
        if plan != self.plan:
            self.trigger_event(self.PlanChanged, plan=plan)

    def remaining(self, meter: str, now: datetime, limits: Limits) -> int | None:
        """How much of today's quota of a meter is left; None without a limit."""
        limit = limits.get(meter)
        return None if limit is None else max(0, limit - self._counted(meter, now))

    # --- inside

    def _counted(self, meter: str, now: datetime) -> int:
        return self.counts.get(meter, 0) if self.counted_on == now.date() else 0

    def _count(self, meter: str, quantity: int, at: datetime) -> None:
        if self.counted_on != at.date():
            self.counted_on, self.counts = at.date(), {}
        self.counts[meter] = self.counts.get(meter, 0) + quantity

    def _check_limit(self, meter: str, quantity: int, now: datetime, limits: Limits) -> None:
        limit = limits.get(meter)
        if limit is not None and self._counted(meter, now) + quantity > limit:
            midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), now.tzinfo)
            raise PlanLimitExceeded(meter, limit, int((midnight - now).total_seconds()) + 1)

    def _slices(self, amount_ncr: int) -> tuple[Slice, ...]:
        slices = []
        for grant in self.grants:
            taken_ncr = min(grant.remaining_ncr, amount_ncr)
            if taken_ncr > 0:
                slices.append(Slice(grant.grant_id, taken_ncr))
                amount_ncr -= taken_ncr
        return tuple(slices)

    def _consume(self, slices: Sequence[Slice]) -> None:
        taken_ncr: Mapping[UUID, int] = {s.grant_id: s.amount_ncr for s in slices}
        left = [replace(g, remaining_ncr=g.remaining_ncr - taken_ncr.get(g.grant_id, 0)) for g in self.grants]
        # A spent grant is forgotten here; the log and the ledger keep it.
        self.grants = [g for g in left if g.remaining_ncr > 0]

    def _move(self, event_class: type[Moved], postings: Sequence[tuple[str, int]], **facts: object) -> None:
        legs = tuple(Posting(book, amount_ncr) for book, amount_ncr in postings if amount_ncr)
        gained = {leg.book: leg.amount_ncr for leg in legs}
        self.trigger_event(
            event_class,
            postings=legs,
            available_after_ncr=self.available_ncr + gained.get(AVAILABLE, 0),
            held_after_ncr=self.held_ncr + gained.get(HELD, 0),
            **facts,
        )

    def _warn_if_low(self) -> None:
        """Warn once per crossing of the threshold, judged on the settled balance when it is debited."""
        posted_ncr = self.posted_ncr
        if self.low_balance_armed and posted_ncr < LOW_BALANCE_NCR:
            self.trigger_event(self.LowBalanceCrossed, threshold_ncr=LOW_BALANCE_NCR, posted_ncr=posted_ncr)

    def _rearm_warning(self) -> None:
        """After a warning, one more is due only when the balance has been well above the threshold."""
        posted_ncr = self.posted_ncr
        recovered = posted_ncr * REARM_DENOMINATOR > LOW_BALANCE_NCR * REARM_NUMERATOR
        if not self.low_balance_armed and recovered:
            self.trigger_event(self.BalanceRecovered, threshold_ncr=LOW_BALANCE_NCR, posted_ncr=posted_ncr)
