"""Stories of turns that go wrong, told from events made by the domain itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from domain.callback import Callback
from domain.credit_account import ChargeLine, CreditAccount, Origin
from domain.ids import AgentId, UserId, hold_of
from domain.money import ncr
from domain.plans import UNLIMITED
from domain.ports import Effect, ModelErrorClass
from domain.prices import MESSAGE
from domain.turn import Turn
from oshaani.cli.turn_story import Teller
from schemas.codec import type_of
from schemas.records import AnyRecord, Record
from tests.domain import turns
from tests.domain.turns import DEADLINE, NOON, SECOND, TURN

HOLD = hold_of(TURN)


def told(*steps: Callable[[Turn], object], personal: bool = False) -> Teller:
    turn = turns.accepted()()
    for step in steps:
        step(turn)
    return Teller(TURN, personal).tell(records_of(turn))


def records_of(root: Any) -> list[AnyRecord]:
    """The events of an aggregate as the log would have them, a second apart."""
    nobody = UUID(int=9)
    return [
        Record(
            event, type_of(type(event)).name, 0, at, event.originator_id, event.originator_version,
            nobody, nobody, nobody, None, "test", None, NOON + at * SECOND,
        )
        for at, event in enumerate(root.pending_events)
    ]  # fmt: skip


def funded() -> CreditAccount:
    account = CreditAccount.open(UserId(UUID(int=3)))
    account.grant(UUID(int=1), "free", ncr("10"), NOON)
    account.hold(HOLD, ncr("3"), MESSAGE, NOON, timedelta(hours=1), UNLIMITED)
    return account


def test_a_dead_worker_is_named_as_the_reason_of_a_second_attempt() -> None:
    story = told(
        turns.asked(), turns.model_failed(ModelErrorClass.WORKER_LOST), turns.asked(turns.OTHER_WORKER)
    )
    texts = "\n".join(step.text for step in story.steps)
    assert "its worker died and another took over" in texts
    assert f"model call 1, attempt 2 asked extractive (worker {turns.OTHER_WORKER})" in texts
    assert story.notes == ["model call 1 failed (worker_lost); tried again after 0.0 s"]


def test_a_tool_taken_over_is_odd() -> None:
    story = told(turns.asked(), turns.said("", turns.wants()), turns.tool_started(), turns.tool_retaken())
    assert story.notes == ["tool web_search 1.1 was taken over from a dead worker and run again"]


def test_an_unsafe_tool_of_a_dead_worker_has_an_unknown_outcome() -> None:
    unsafe = turns.wants(effect=Effect.UNSAFE)
    story = told(turns.asked(), turns.said("", unsafe), turns.tool_started(), turns.tool_retaken())
    assert story.notes[0].startswith("whether tool web_search 1.1 took effect is unknown")


def test_a_cancelled_turn_names_who_cancelled_it_and_cuts_the_reason() -> None:
    story = told(turns.asked(), turns.cancelled)
    assert story.status == "cancelled"
    assert "cancelled by user:3" in story.notes


def test_a_turn_past_its_deadline_is_said_to_be_abandoned() -> None:
    late = told(turns.asked()).conclude(DEADLINE + SECOND)
    assert late.status == "running"
    assert "no worker looks after it" in late.notes[-1]
    early = told(turns.asked()).conclude(NOON)
    assert "still running" in early.notes[-1]


def test_an_ended_turn_without_its_settlement_is_said_to_be_unsettled() -> None:
    story = told(turns.asked(), turns.said("Yes."), turns.answered()).conclude(NOON)
    assert "it has ended and its hold is not settled yet" in story.notes


def test_a_late_charge_says_what_could_not_be_collected() -> None:
    account = funded()
    account.expire_hold(HOLD, NOON + timedelta(hours=2))
    line = ChargeLine(MESSAGE, 1, ncr("30"), "rc-1")
    account.charge_late(HOLD, [line], Origin(turn_id=TURN))
    story = told(turns.asked()).tell(records_of(account))
    assert (story.money.end, story.money.uncollected_ncr) == ("charged late", ncr("20"))
    assert "charged after its hold had expired; 20.00 credits could not be collected" in story.notes
    assert "its hold expired before it was settled" in story.notes


def test_the_callback_shows_each_attempt_and_no_token() -> None:
    url = "https://example.com/done?token=hidden"
    callback = Callback.request(TURN, UserId(UUID(int=3)), AgentId(UUID(int=5)), url, "agent_key:k", NOON)
    callback.queue(NOON)
    for attempt, status in ((1, 503), (2, 410)):
        callback.start(turns.WORKER, "", DEADLINE, NOON + attempt * SECOND)
        callback.fail(attempt, f"http_{status}", status, 7, 0.0, NOON)
    story = told(turns.asked()).tell(records_of(callback))
    texts = [step.text for step in story.steps if step.type.startswith("Callback.")]
    assert texts == [
        "the end is to be told to example.com",
        f"callback attempt 1 by {turns.WORKER}",
        "callback attempt 1 failed (http_503) after 7 ms; again at 2026-03-01 12:00:00Z",
        f"callback attempt 2 by {turns.WORKER}",
        "callback attempt 2 failed (http_410) after 7 ms",
        "callback given up after 2 attempts (http_410)",
    ]
    assert story.notes[-1] == "its caller was never told of the end: http_410"


def test_money_of_other_turns_is_passed_over() -> None:
    account = funded()
    account.hold(hold_of(UUID(int=77)), ncr("1"), MESSAGE, NOON, timedelta(hours=1), UNLIMITED)
    story = told().tell(records_of(account))
    assert story.money.held_ncr == ncr("3")


def test_erased_text_is_said_to_be_erased() -> None:
    story = Teller(TURN, personal=True)
    assert story.excerpt(None) == "(erased)"
    assert story.excerpt("a\x1b[2Jb") == "a [2Jb"
