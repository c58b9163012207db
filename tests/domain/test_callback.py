"""A callback: one message, tried until it is confirmed or a day has passed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from domain.callback import ATTEMPTS_MAX, GIVES_UP_AFTER, PAUSES_S, Callback, check_url
from domain.errors import InvalidValue, NotYours
from domain.ids import AgentId, TurnId, UserId
from tests.domain.spec import given

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
WORKER, OTHER = "a/1", "b/1"
Step = Callable[[Callback], object]


def requested() -> Callback:
    return Callback.request(
        TurnId(UUID(int=1)),
        UserId(UUID(int=2)),
        AgentId(UUID(int=3)),
        "https://example.com/done?token=1",
        "agent_key:k",
        NOON,
    )


def queued(callback: Callback) -> None:
    callback.queue(NOON)


def started(worker: str = WORKER, lost: str = "", now: datetime = NOON) -> Step:
    return lambda callback: callback.start(worker, lost, now + timedelta(seconds=15), now)


def failed(
    attempt: int = 1, status: int | None = 503, retry_after_s: float | None = None, now: datetime = NOON
) -> Step:
    return lambda callback: callback.fail(attempt, f"http_{status}", status, 5, retry_after_s, now)


def delivered(attempt: int = 1) -> Step:
    return lambda callback: callback.deliver(attempt, 204, 5, NOON)


def test_nothing_is_sent_before_the_turn_has_ended():
    given(requested).when(started()).then_refused(NotYours)
    given(requested).when(queued, started()).then(Callback.Queued, Callback.AttemptStarted, status="pending")


def test_a_turn_that_ends_twice_queues_one_message():
    given(requested, queued).when(queued).then()


def test_of_two_workers_one_makes_the_attempt():
    given(requested, queued, started()).when(started(OTHER)).then_refused(NotYours)


def test_an_attempt_of_a_lost_worker_is_made_again():
    lost = given(requested, queued, started())
    lost.when(started(OTHER, WORKER)).then(Callback.AttemptStarted, attempts=2, worker=OTHER)
    lost.when(started(OTHER, WORKER), delivered(1)).then_refused(NotYours)


def test_what_is_confirmed_is_over():
    over = given(requested, queued, started()).when(delivered())
    over.then(Callback.Delivered, status="delivered", failure=None)
    given(requested, queued, started(), delivered()).when(started()).then_refused(NotYours)


def test_it_is_tried_again_after_a_growing_pause():
    first = given(requested, queued, started(), failed())
    first.when(started(now=NOON + timedelta(seconds=PAUSES_S[0] - 1))).then_refused(NotYours)
    first.when(started(now=NOON + timedelta(seconds=PAUSES_S[0]))).then(Callback.AttemptStarted, attempts=2)
    assert sorted(PAUSES_S) == list(PAUSES_S)
    assert timedelta(hours=23) < timedelta(seconds=sum(PAUSES_S)) < GIVES_UP_AFTER


@pytest.mark.parametrize("wait_s", [0.0, 90.0])
def test_the_receiver_may_say_when_to_come_back(wait_s: float):
    given(requested, queued, started()).when(failed(retry_after_s=wait_s)).then(
        Callback.AttemptFailed, retry_at=NOON + timedelta(seconds=wait_s)
    )


@pytest.mark.parametrize("wait_s", [86_401.0, 1e300])
def test_a_wait_beyond_a_day_ends_it(wait_s: float):
    given(requested, queued, started()).when(failed(retry_after_s=wait_s)).then(
        Callback.AttemptFailed, Callback.GivenUp, status="failed"
    )


def test_a_receiver_that_is_gone_is_not_asked_again():
    given(requested, queued, started()).when(failed(status=410)).then(
        Callback.AttemptFailed, Callback.GivenUp, failure="http_410"
    )


def test_after_so_many_attempts_it_is_given_up():
    steps: list[Step] = []
    for attempt in range(1, ATTEMPTS_MAX):
        steps += [started(), failed(attempt, retry_after_s=0.0)]
    last = given(requested, queued, *steps)
    assert last.root.attempts == ATTEMPTS_MAX - 1
    last.when(started(), failed(ATTEMPTS_MAX, retry_after_s=0.0)).then(
        Callback.AttemptStarted, Callback.AttemptFailed, Callback.GivenUp, attempts=ATTEMPTS_MAX
    )
    last.when(started(), started(OTHER, WORKER)).then(
        Callback.AttemptStarted, Callback.GivenUp
    ).then_returned(None)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "example.com/path",
        "https://",
        "https://user:pass@example.com/",
        "https://example.com/#part",
        "https://example.com/a b",
        "https://example.com/\n",
        "https://example.com:99999/",
        "https://[::1/",
        "https://example.com/" + "x" * 2_000,
    ],
)
def test_what_cannot_be_told_is_refused_by_its_field(url: str):
    with pytest.raises(InvalidValue) as refused:
        check_url(url)
    assert refused.value.facts["pointer"] == "/callback_url"


@pytest.mark.parametrize("url", ["https://example.com", "http://example.com:8080/a?b=c", "http://[::1]/x"])
def test_other_urls_are_taken(url: str):
    check_url(url)
