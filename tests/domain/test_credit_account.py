from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from domain.credit_account import (
    LOW_BALANCE_NCR,
    UNCOLLECTED,
    ChargeLine,
    CreditAccount,
    Grant,
    GrantKind,
    Origin,
    Posting,
    Slice,
)
from domain.errors import InsufficientCredits, InvalidValue, NotFound, PlanLimitExceeded
from domain.ids import HoldId, UserId, account_of, hold_of
from domain.money import ncr
from domain.plans import DEFAULT_PLANS, FREE, PAYG, UNLIMITED, Limits
from domain.prices import MESSAGE, RATE_CARDS, STORAGE_WRITE, TOOL_CALL
from tests.domain.spec import When, given

Account = CreditAccount
Do = Callable[[CreditAccount], None]

OWNER = UserId(UUID(int=1))
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
TURN_1, TURN_2 = hold_of(UUID(int=11)), hold_of(UUID(int=12))
SEARCH, OCR = UUID(int=21), UUID(int=22)
GRANT_1, GRANT_2, GRANT_3 = UUID(int=31), UUID(int=32), UUID(int=33)
ORIGIN = Origin(agent_id=UUID(int=41), turn_id=UUID(int=42), actor="user:1")
(CARD,) = RATE_CARDS


def opened() -> CreditAccount:
    return CreditAccount.open(OWNER)


def granted(
    credits: str, grant_id: UUID = GRANT_1, kind: GrantKind = "purchase", expires_at: datetime | None = None
) -> Do:
    return lambda account: account.grant(grant_id, kind, ncr(credits), NOON, expires_at)


def test_a_grant_says_why_and_what_paid_for_it():
    paid = given(opened).when(
        lambda account: account.grant(GRANT_1, "purchase", 5, NOON, None, "ten for nine", "pi_1")
    )
    paid.then(CreditAccount.CreditsGranted)
    assert (paid.events[0].reason, paid.events[0].payment_ref) == ("ten for nine", "pi_1")
    for texts in (("", None), (None, "x" * 501)):
        given(opened).when(
            lambda account, texts=texts: account.grant(GRANT_1, "purchase", 5, NOON, None, *texts)
        ).then_refused(InvalidValue)


def held(
    hold_id: HoldId,
    credits: str,
    meter: str = MESSAGE,
    at: datetime = NOON,
    limits: Limits = UNLIMITED,
    quantity: int = 1,
) -> Do:
    return lambda account: account.hold(hold_id, ncr(credits), meter, at, HOUR, limits, quantity)


def extended(
    hold_id: HoldId,
    extension_id: UUID,
    credits: str = "0.15",
    at: datetime = NOON,
    limits: Limits = UNLIMITED,
) -> Do:
    return lambda account: account.extend(hold_id, extension_id, ncr(credits), TOOL_CALL, at, limits)


def line(meter: str = MESSAGE, tool: str | None = None, quantity: int = 1) -> ChargeLine:
    return ChargeLine(meter, quantity, CARD.price_ncr(meter), CARD.rate_card_id, tool)


def settled(hold_id: HoldId, *lines: ChargeLine) -> Do:
    return lambda account: account.settle(hold_id, lines, ORIGIN)


def hold_expired(hold_id: HoldId, at: datetime = NOON + HOUR) -> Do:
    return lambda account: account.expire_hold(hold_id, at)


def charged_late(hold_id: HoldId, *lines: ChargeLine) -> Do:
    return lambda account: account.charge_late(hold_id, lines, ORIGIN)


def grants_expired(at: datetime) -> Do:
    return lambda account: account.expire_grants(at)


def postings_of(when: When[CreditAccount]) -> list[dict[str, int]]:
    return [{leg.book: leg.amount_ncr for leg in event.postings} for event in when.events]


# --- holds


def test_an_account_is_opened_empty_on_the_free_plan():
    when = given(opened).when()
    when.then(available_ncr=0, held_ncr=0, plan=FREE, owner_id=OWNER, account_id=account_of(OWNER))


def test_a_hold_sets_credits_aside():
    when = given(opened, granted("5")).when(held(TURN_1, "3"))
    when.then(Account.CreditsHeld, available_ncr=ncr("2"), held_ncr=ncr("3"), posted_ncr=ncr("5"))
    assert postings_of(when) == [{"available": -ncr("3"), "held": ncr("3")}]
    assert when.events[0].expires_at == NOON + HOUR


def test_a_second_turn_cannot_hold_what_the_first_has_set_aside():
    when = given(opened, granted("5"), held(TURN_1, "4")).when(held(TURN_2, "2"))
    when.then_refused(InsufficientCredits, needed_ncr=ncr("2"), available_ncr=ncr("1"))


def test_the_last_credit_can_be_held():
    given(opened, granted("3")).when(held(TURN_1, "3")).then(Account.CreditsHeld, available_ncr=0)


def test_work_that_costs_nothing_is_refused_when_nothing_is_available():
    given(opened).when(held(TURN_1, "0")).then_refused(InsufficientCredits, needed_ncr=0, available_ncr=0)
    given(opened, granted("3"), held(TURN_1, "3")).when(held(TURN_2, "0")).then_refused(InsufficientCredits)


def test_work_that_costs_nothing_is_held_when_something_is_available():
    when = given(opened, granted("0.000000001")).when(held(TURN_1, "0"), settled(TURN_1, line("api_call")))
    when.then(Account.CreditsHeld, Account.CreditsSettled, Account.LowBalanceCrossed, available_ncr=1)


def test_the_same_hold_is_taken_once():
    given(opened, granted("5"), held(TURN_1, "3")).when(held(TURN_1, "3")).then(available_ncr=ncr("2"))


def test_credit_for_ten_turns_means_ten_turns():
    turns = [held(hold_of(UUID(int=n)), "3") for n in range(10)]
    given(opened, granted("30"), *turns).when(held(TURN_1, "3")).then_refused(InsufficientCredits)


def test_a_hold_grows_by_a_tools_price():
    when = given(opened, granted("5"), held(TURN_1, "3")).when(extended(TURN_1, SEARCH))
    when.then(Account.HoldExtended, available_ncr=ncr("1.85"), held_ncr=ncr("3.15"))


def test_the_same_extension_is_taken_once():
    before = given(opened, granted("5"), held(TURN_1, "3"), extended(TURN_1, SEARCH))
    before.when(extended(TURN_1, SEARCH)).then(held_ncr=ncr("3.15"))
    before.when(extended(TURN_1, OCR)).then(Account.HoldExtended, held_ncr=ncr("3.3"))


def test_an_extension_that_cannot_be_paid_is_refused_and_the_hold_stays():
    before = given(opened, granted("3.1"), held(TURN_1, "3"))
    before.when(extended(TURN_1, SEARCH)).then_refused(InsufficientCredits, needed_ncr=ncr("0.15"))
    before.when(settled(TURN_1, line())).then(
        Account.CreditsSettled, Account.LowBalanceCrossed, available_ncr=ncr("0.1")
    )


def test_a_hold_that_has_ended_cannot_grow():
    before = given(opened, granted("5"), held(TURN_1, "3"), settled(TURN_1, line()))
    before.when(extended(TURN_1, SEARCH)).then_refused(NotFound)


# --- the end of a hold


def test_a_settlement_charges_its_lines_and_gives_the_rest_back():
    before = given(opened, granted("50"), held(TURN_1, "3"), extended(TURN_1, SEARCH), extended(TURN_1, OCR))
    when = before.when(settled(TURN_1, line(), line(TOOL_CALL, "web_search")))
    when.then(Account.CreditsSettled, available_ncr=ncr("46.85"), held_ncr=0, holds={})
    (event,) = when.events
    assert postings_of(when) == [{"held": -ncr("3.3"), "revenue": ncr("3.15"), "available": ncr("0.15")}]
    assert (event.captured_ncr, event.released_ncr) == (ncr("3.15"), ncr("0.15"))
    assert event.captured_ncr == sum(each.amount_ncr for each in event.lines)
    assert event.slices == (Slice(GRANT_1, ncr("3.15")),)
    assert event.origin == ORIGIN


def test_a_settlement_without_lines_releases_everything():
    when = given(opened, granted("50"), held(TURN_1, "3")).when(settled(TURN_1))
    when.then(Account.HoldReleased, available_ncr=ncr("50"), held_ncr=0, holds={})


def test_a_settlement_happens_once():
    before = given(opened, granted("50"), held(TURN_1, "3"), settled(TURN_1, line()))
    before.when(settled(TURN_1, line())).then(available_ncr=ncr("47"))
    before.when(settled(TURN_2, line())).then(available_ncr=ncr("47"))
    before.when(hold_expired(TURN_1)).then()
    before.when(charged_late(TURN_1, line())).then()


def test_more_than_was_held_is_never_charged():
    before = given(opened, granted("50"), held(TURN_1, "3"))
    before.when(settled(TURN_1, line(), line(TOOL_CALL))).then_refused(InvalidValue)


def test_new_work_first_frees_what_expired_holds_still_set_aside():
    before = given(opened(), granted("5"), held(TURN_1, "4"))
    when = before.when(held(TURN_2, "4", at=NOON + HOUR))
    when.then(CreditAccount.HoldExpired, CreditAccount.CreditsHeld, available_ncr=ncr("1"), held_ncr=ncr("4"))


def test_a_hold_expires_at_its_time_and_not_before():
    before = given(opened, granted("50"), held(TURN_1, "3"))
    before.when(hold_expired(TURN_1, NOON + HOUR - timedelta(microseconds=1))).then(held_ncr=ncr("3"))
    before.when(hold_expired(TURN_1, NOON + HOUR)).then(
        Account.HoldExpired, available_ncr=ncr("50"), held_ncr=0
    )


def test_an_expired_hold_ends_once():
    before = given(opened, granted("50"), held(TURN_1, "3"), hold_expired(TURN_1))
    before.when(hold_expired(TURN_1)).then()
    before.when(settled(TURN_1)).then()


def test_work_that_succeeds_after_its_hold_expired_is_charged_once():
    before = given(opened, granted("50"), held(TURN_1, "3"), hold_expired(TURN_1))
    for charge in (charged_late, settled):
        when = before.when(charge(TURN_1, line()), charge(TURN_1, line()))
        when.then(Account.LateCharge, available_ncr=ncr("47"))
        assert postings_of(when) == [{"available": -ncr("3"), "revenue": ncr("3")}]


def test_what_cannot_be_collected_late_is_booked_and_the_balance_stays_at_zero():
    before = given(opened, granted("3"), held(TURN_1, "3"), hold_expired(TURN_1), held(TURN_2, "1"))
    when = before.when(charged_late(TURN_1, line()))
    when.then(Account.LateCharge, Account.LowBalanceCrossed, available_ncr=0, held_ncr=ncr("1"))
    event = when.events[0]
    assert (event.captured_ncr, event.uncollected_ncr) == (ncr("2"), ncr("1"))
    assert Posting(UNCOLLECTED, -ncr("1")) in event.postings
    assert sum(leg.amount_ncr for leg in event.postings) == 0


def test_only_an_expired_hold_is_charged_late():
    before = given(opened, granted("50"), held(TURN_1, "3"))
    before.when(charged_late(TURN_1, line())).then(available_ncr=ncr("47"))
    before.when(charged_late(TURN_2, line())).then(available_ncr=ncr("47"))


# --- grants


def test_the_free_grant_happens_once_in_the_life_of_an_account():
    before = given(opened, granted("200", GRANT_1, "free"))
    before.when(granted("200", GRANT_2, "free")).then(available_ncr=ncr("200"))
    before.when(granted("10", GRANT_2)).then(Account.CreditsGranted, available_ncr=ncr("210"))


def test_a_grant_is_given_once_also_when_it_is_spent():
    before = given(opened, granted("3"), granted("50", GRANT_2, "adjustment"))
    spent = given(opened, granted("3"), held(TURN_1, "3"), settled(TURN_1, line()))
    before.when(granted("3")).then(available_ncr=ncr("53"))
    assert spent.root.grants == []
    spent.when(granted("3")).then(available_ncr=0)


@pytest.mark.parametrize("amount_ncr", [0, -1])
def test_a_grant_gives_something(amount_ncr):
    given(opened).when(lambda account: account.grant(GRANT_1, "purchase", amount_ncr, NOON)).then_refused(
        InvalidValue, pointer="/amount"
    )


def test_free_credits_are_spent_first_then_what_expires_first_then_the_oldest():
    def grant(number: int, kind: GrantKind, days: int | None, minutes: int = 0) -> Do:
        expires_at = None if days is None else NOON + timedelta(days=days)
        granted_at = NOON + timedelta(minutes=minutes)
        return lambda account: account.grant(UUID(int=number), kind, ncr("1"), granted_at, expires_at)

    before = given(
        opened,
        *(grant(7, "purchase", None, 1), grant(6, "purchase", None), grant(5, "purchase", 9)),
        *(grant(4, "adjustment", 8), grant(3, "promotion", None), grant(2, "free", None)),
        *(grant(9, "purchase", None, 1), held(TURN_1, "3"), extended(TURN_1, SEARCH, "3")),
    )
    lines = (line(), ChargeLine(MESSAGE, 1, ncr("2.5"), "rc-1"))
    (event, _) = before.when(settled(TURN_1, *lines)).events
    assert [each.grant_id.int for each in event.slices] == [2, 3, 4, 5, 6, 7]
    assert event.slices[-1].amount_ncr == ncr("0.5")


def test_what_is_left_of_a_grant_expires_and_is_not_spent():
    before = given(opened, granted("5", GRANT_1, "promotion", NOON + HOUR), granted("2", GRANT_2))
    before.when(grants_expired(NOON + HOUR - timedelta(seconds=1))).then(available_ncr=ncr("7"))
    when = before.when(grants_expired(NOON + HOUR))
    when.then(Account.GrantExpired, available_ncr=ncr("2"))
    assert postings_of(when) == [{"available": -ncr("5"), "expired": ncr("5")}]
    before.when(held(TURN_1, "3", at=NOON + HOUR)).then_refused(InsufficientCredits, available_ncr=ncr("2"))


def test_what_running_work_has_set_aside_does_not_expire_under_it():
    before = given(opened, granted("5", GRANT_1, "promotion", NOON + HOUR), held(TURN_1, "3"))
    when = before.when(grants_expired(NOON + HOUR), settled(TURN_1, line()), grants_expired(NOON + HOUR))
    when.then(
        *(Account.GrantExpired, Account.CreditsSettled, Account.LowBalanceCrossed),
        available_ncr=0,
        held_ncr=0,
        grants=[],
    )


def test_what_running_work_gives_back_to_an_expired_grant_expires_then():
    before = given(opened, granted("5", GRANT_1, "promotion", NOON + HOUR), held(TURN_1, "3"))
    when = before.when(grants_expired(NOON + HOUR), settled(TURN_1), grants_expired(NOON + HOUR))
    assert [event.expired_ncr for event in when.events if isinstance(event, Account.GrantExpired)] == [
        ncr("2"),
        ncr("3"),
    ]
    assert when.root.posted_ncr == 0


# --- plans


def test_a_plans_limit_refuses_what_is_beyond_it():
    limits = {**UNLIMITED, MESSAGE: 2}
    before = given(
        opened,
        granted("50"),
        held(TURN_1, "3", limits=limits),
        held(TURN_2, "3", limits=limits),
        settled(TURN_1),
    )
    third = hold_of(UUID(int=13))
    before.when(held(third, "3", limits=limits)).then_refused(
        PlanLimitExceeded, meter=MESSAGE, limit=2, resets_in_s=12 * 3600 + 1
    )
    before.when(held(third, "1.5", "agent_create", limits=limits)).then(Account.CreditsHeld)
    assert before.root.remaining(MESSAGE, NOON, limits) == 0


def test_quotas_are_whole_again_at_midnight_utc():
    limits = {**UNLIMITED, MESSAGE: 1}
    before = given(opened, granted("50"), held(TURN_1, "3", limits=limits))
    last_moment = datetime(2026, 3, 1, 23, 59, 59, 999_999, tzinfo=UTC)
    before.when(held(TURN_2, "3", at=last_moment, limits=limits)).then_refused(
        PlanLimitExceeded, resets_in_s=1
    )
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    when = before.when(held(TURN_2, "3", at=midnight, limits=limits))
    when.then(Account.HoldExpired, Account.CreditsHeld, counts={MESSAGE: 1})
    assert before.root.remaining(MESSAGE, midnight, limits) == 1


def test_tool_calls_have_a_limit_of_their_own():
    limits = {**UNLIMITED, TOOL_CALL: 1}
    before = given(opened, granted("50"), held(TURN_1, "3"), extended(TURN_1, SEARCH, limits=limits))
    before.when(extended(TURN_1, OCR, limits=limits)).then_refused(
        PlanLimitExceeded, meter=TOOL_CALL, limit=1
    )
    before.when(extended(TURN_1, SEARCH, limits=limits)).then()


def test_storage_is_limited_by_bytes():
    limits = {**UNLIMITED, STORAGE_WRITE: 1_000}
    before = given(opened, granted("50"), held(TURN_1, "1", STORAGE_WRITE, limits=limits, quantity=600))
    before.when(held(TURN_2, "1", STORAGE_WRITE, limits=limits, quantity=401)).then_refused(PlanLimitExceeded)
    before.when(held(TURN_2, "1", STORAGE_WRITE, limits=limits, quantity=400)).then(Account.CreditsHeld)


def test_a_refused_hold_does_not_count():
    limits = {**UNLIMITED, MESSAGE: 1}
    refused = given(opened, granted("2")).when(held(TURN_1, "3", limits=limits))
    refused.then_refused(InsufficientCredits)
    assert refused.root.remaining(MESSAGE, NOON, limits) == 1


def test_the_limit_is_named_before_the_missing_credits():
    given(opened).when(held(TURN_1, "3", limits={MESSAGE: 0})).then_refused(PlanLimitExceeded)


def test_a_plan_without_limits_has_nothing_remaining_to_tell():
    assert given(opened).root.remaining(MESSAGE, NOON, DEFAULT_PLANS[PAYG]) is None


def test_changing_the_plan_leaves_balances_alone():
    before = given(opened, granted("50"))
    before.when(lambda account: account.change_plan(PAYG)).then(
        Account.PlanChanged, plan=PAYG, available_ncr=ncr("50")
    )
    before.when(lambda account: account.change_plan(FREE)).then()


# --- low balance


def test_a_low_balance_is_told_once_per_crossing():
    before = given(opened, granted("23"), held(TURN_1, "3"), held(TURN_2, "3"))
    first = before.when(settled(TURN_1, line()))
    first.then(Account.CreditsSettled, posted_ncr=LOW_BALANCE_NCR)
    both = before.when(settled(TURN_1, line()), settled(TURN_2, line()))
    both.then(Account.CreditsSettled, Account.CreditsSettled, Account.LowBalanceCrossed)
    third = hold_of(UUID(int=13))
    again = before.when(
        *(settled(TURN_1, line()), settled(TURN_2, line())), held(third, "3"), settled(third, line())
    )
    assert [type(event) for event in again.events].count(Account.LowBalanceCrossed) == 1


def test_credits_set_aside_are_not_a_low_balance():
    given(opened, granted("23")).when(held(TURN_1, "10")).then(Account.CreditsHeld)


def test_the_warning_is_armed_again_above_eleven_tenths_of_the_threshold():
    low = given(opened, granted("20"), held(TURN_1, "3"), settled(TURN_1, line()))
    low.when(granted("5", GRANT_2)).then(Account.CreditsGranted, low_balance_armed=False)
    low.when(granted("5.000000001", GRANT_2)).then(
        Account.CreditsGranted, Account.BalanceRecovered, low_balance_armed=True
    )


def test_a_small_first_grant_is_no_crossing():
    given(opened).when(granted("10", GRANT_1, "free")).then(Account.CreditsGranted, low_balance_armed=True)


# --- what every event proves


def test_postings_sum_to_zero_on_every_event():
    story = given(opened).when(
        *(granted("7", GRANT_1, "promotion", NOON + HOUR), granted("9", GRANT_2), held(TURN_1, "3")),
        *(extended(TURN_1, SEARCH), held(TURN_2, "3"), settled(TURN_1, line(), line(TOOL_CALL))),
        *(hold_expired(TURN_2), charged_late(TURN_2, line()), grants_expired(NOON + HOUR)),
        *(held(TURN_2, "3"), settled(TURN_2)),
    )
    assert story.refusal is None
    moved = [event for event in story.events if isinstance(event, Account.Moved)]
    assert {type(event) for event in moved} == set(Account.Moved.__subclasses__())
    for event in moved:
        assert sum(leg.amount_ncr for leg in event.postings) == 0
        assert event.available_after_ncr >= 0
        assert event.held_after_ncr >= 0


def test_grants_come_in_their_order_of_consumption_whatever_their_order_of_arrival():
    soon = Grant(GRANT_1, "purchase", 2, NOON, NOON + HOUR, 1)
    never = Grant(GRANT_2, "purchase", 2, NOON, None, 1)
    free = Grant(GRANT_3, "free", 0, NOON, None, 1)
    assert sorted([never, soon, free], key=lambda grant: grant.consumption_order) == [free, soon, never]
