from __future__ import annotations

from datetime import timedelta

import pytest

from domain.credit_account import ChargeLine
from domain.errors import Conflict, NotYours
from domain.ids import hold_of
from domain.money import ncr
from domain.ports import Effect, ModelErrorClass, TokenUsage
from domain.prices import API_CALL, MESSAGE, TOOL_CALL
from domain.turn import (
    ATTEMPTS_MAX,
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    NOTHING_SAID,
    OUTCOME_UNKNOWN,
    PASSING,
    SAME_CALLS_MAX,
    SILENCE,
    WORKERS_LOST_MAX,
    Answer,
    AskModel,
    Await,
    GiveUp,
    Over,
    RunTools,
    Turn,
    added,
    backoff_s,
    call_of,
    next_action,
    tool_call_of,
)
from tests.domain.spec import given
from tests.domain.turns import (
    CALL_ENDS,
    DEADLINE,
    NOON,
    OTHER_WORKER,
    SECOND,
    TURN,
    WORKER,
    Step,
    accepted,
    action_of,
    answered,
    asked,
    cancelled,
    gave_up,
    model_failed,
    ran,
    said,
    tool_ended,
    tool_retaken,
    tool_started,
    wants,
)

FIRST, SECOND_TOOL = tool_call_of(TURN, 1, 0), tool_call_of(TURN, 1, 1)
MESSAGE_LINE = ChargeLine(MESSAGE, 1, ncr("3"), "rc-1")
SEARCH_LINE = ChargeLine(TOOL_CALL, 1, ncr("0.15"), "rc-1", "web_search")
OCR_LINE = ChargeLine(TOOL_CALL, 1, ncr("0.15"), "rc-1", "ocr")
TIMED_OUT = GiveUp("timed_out", "turn_timeout", "The answer took longer than the time limit of a turn.")
WEEK_S = 7 * 24 * 3600.0


# --- what happens next


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param([], AskModel(1, 1, True, None), id="a new turn asks the model"),
        pytest.param([asked()], Await(CALL_ENDS), id="a model call under way is awaited"),
        pytest.param([asked(), said("42")], Answer("42", "answered"), id="a text is the answer"),
        pytest.param([asked(), said("")], Answer(NOTHING_SAID, "answered"), id="silence is said"),
        pytest.param(
            [asked(), said("Once", finish="length")], Answer("Once", "length"), id="cut off at its limit"
        ),
        pytest.param(
            [asked(), said("", finish="length")],
            Answer(SILENCE["length"], "length"),
            id="cut off before a word",
        ),
        pytest.param(
            [asked(), said("", finish="content_filter")],
            Answer(SILENCE["content_filter"], "content_filter"),
            id="withheld by the provider",
        ),
        pytest.param(
            [asked(), said("", wants(), wants("ocr"))], RunTools((FIRST, SECOND_TOOL)), id="tools run at once"
        ),
        pytest.param(
            [asked(), said("", wants(), wants("ocr")), tool_started()],
            RunTools((SECOND_TOOL,)),
            id="a tool that has not begun runs beside one that has",
        ),
        pytest.param(
            [
                *(asked(), said("", wants(), wants("ocr"))),
                *(tool_started(), tool_started(1, deadline_at=CALL_ENDS + SECOND)),
            ],
            Await(CALL_ENDS + SECOND),
            id="all tools under way are awaited",
        ),
        pytest.param(
            [asked(), said("", wants(), wants("ocr")), ran(), tool_started(1)],
            Await(CALL_ENDS),
            id="the last tool is awaited",
        ),
        pytest.param(
            [asked(), said("", wants()), ran()], AskModel(2, 1, True, None), id="results go back to the model"
        ),
        pytest.param(
            [asked(), said("", wants()), ran("failed")],
            AskModel(2, 1, True, None),
            id="a tool's failure goes back to the model too",
        ),
        pytest.param(
            [asked(), model_failed(ModelErrorClass.OVERLOADED)],
            AskModel(1, 2, True, NOON + timedelta(seconds=BACKOFF_FIRST_S)),
            id="an error that may pass is tried again",
        ),
        pytest.param(
            [asked(), model_failed(ModelErrorClass.UNAUTHORIZED)],
            GiveUp("failed", "model_unauthorized", "No reply."),
            id="an error that will not pass fails the turn",
        ),
        pytest.param([asked(), said("42"), answered()], Over(), id="an answered turn is over"),
        pytest.param([cancelled], Over(), id="a cancelled turn is over"),
        pytest.param([gave_up(TIMED_OUT)], Over(), id="a turn that gave up is over"),
    ],
)
def test_what_happens_next(steps: list[Step], expected: object) -> None:
    assert action_of(given(accepted(), *steps).root) == expected


@pytest.mark.parametrize(
    "steps",
    [
        *([], [asked()], [asked(), said("42")], [asked(), said("", wants())]),
        *([asked(), said("", wants()), tool_started()], [asked(), model_failed(ModelErrorClass.REFUSED)]),
        [asked(), model_failed(ModelErrorClass.TIMEOUT)],
    ],
)
def test_at_its_deadline_a_turn_times_out_whatever_it_waits_for(steps: list[Step]) -> None:
    turn = given(accepted(), *steps).root
    assert action_of(turn, DEADLINE - timedelta(microseconds=1)) != TIMED_OUT
    assert action_of(turn, DEADLINE) == TIMED_OUT


def test_after_its_deadline_an_ended_turn_is_over() -> None:
    assert action_of(given(accepted(), cancelled).root, DEADLINE + SECOND) == Over()


def test_an_invoked_tool_runs_and_ends_the_turn_without_a_model() -> None:
    def request(turn: Turn) -> None:
        turn.request_tool(1, 0, wants())

    before = given(accepted(iterations=1, tool_calls=1, invoked=True), request)
    assert action_of(before.root) == RunTools((FIRST,))
    assert action_of(given(before.history, tool_started()).root) == Await(CALL_ENDS)
    for outcome in ("succeeded", "failed"):
        assert action_of(given(before.history, ran(outcome)).root) == Answer("", "invoked")


# --- model calls


def test_a_model_call_is_claimed_by_one_worker() -> None:
    def claim(worker: str) -> Step:
        action = AskModel(1, 1, True, None)
        return lambda turn: turn.start_model_call(action, "offline", "extractive", worker, CALL_ENDS, NOON)

    when = given(accepted()).when(claim(WORKER))
    when.then(Turn.ModelCallStarted).then_returned(call_of(TURN, 1))
    assert when.root.open_call is not None
    assert when.root.open_call.worker == WORKER
    given(accepted(), claim(WORKER)).when(claim(OTHER_WORKER)).then_refused(NotYours)


def test_a_worker_that_decided_on_an_older_state_is_refused() -> None:
    stale = AskModel(1, 1, True, None)
    before = given(accepted(), asked(), model_failed(ModelErrorClass.TIMEOUT))
    before.when(
        lambda turn: turn.start_model_call(stale, "offline", "extractive", WORKER, CALL_ENDS, NOON)
    ).then_refused(NotYours)


def test_the_call_has_the_same_id_on_every_attempt() -> None:
    turn = given(accepted(), asked(), model_failed(ModelErrorClass.TIMEOUT), asked()).root
    assert turn.open_call is not None
    assert (turn.open_call.call_id, turn.open_call.attempt) == (call_of(TURN, 1), 2)


def test_a_reply_of_an_attempt_that_was_taken_over_is_refused() -> None:
    before = given(accepted(), asked(), model_failed(ModelErrorClass.WORKER_LOST), asked(OTHER_WORKER))
    for late in (
        lambda turn: turn.complete_model_call(
            call_of(TURN, 1), 1, "late", "stop", (), TokenUsage(1, 1), 1, None
        ),
        lambda turn: turn.fail_model_call(call_of(TURN, 1), 1, ModelErrorClass.TIMEOUT, "late", None, NOON),
        lambda turn: turn.complete_model_call(
            call_of(TURN, 2), 2, "late", "stop", (), TokenUsage(1, 1), 1, None
        ),
    ):
        before.when(late).then_refused(NotYours)


def test_a_reply_is_taken_once() -> None:
    given(accepted(), asked(), said("42")).when(
        lambda turn: turn.complete_model_call(
            call_of(TURN, 1), 1, "43", "stop", (), TokenUsage(1, 1), 1, None
        )
    ).then_refused(NotYours)


@pytest.mark.parametrize("error_class", list(ModelErrorClass))
def test_errors_that_may_pass_are_retried_and_others_are_not(error_class: ModelErrorClass) -> None:
    action = action_of(given(accepted(), asked(), model_failed(error_class)).root)
    if error_class in PASSING:
        assert isinstance(action, AskModel)
        assert action.attempt == 2
    else:
        assert action == GiveUp("failed", f"model_{error_class.value}", "No reply.")


def test_a_model_call_is_tried_so_often_and_waits_longer_each_time() -> None:
    steps: list[Step] = []
    waits = []
    for _ in range(ATTEMPTS_MAX - 1):
        steps += [asked(), model_failed(ModelErrorClass.RATE_LIMITED)]
        action = action_of(given(accepted(), *steps).root)
        assert isinstance(action, AskModel)
        assert action.not_before is not None
        waits.append((action.not_before - NOON).total_seconds())
    assert waits == [0.5, 1.0, 2.0]
    last = given(accepted(), *steps, asked(), model_failed(ModelErrorClass.RATE_LIMITED)).root
    assert action_of(last) == GiveUp("failed", "model_rate_limited", "No reply.")


def test_the_next_iteration_has_all_its_attempts() -> None:
    steps = [asked(), model_failed(ModelErrorClass.TIMEOUT)] * (ATTEMPTS_MAX - 1)
    turn = given(accepted(), *steps, asked(), said("", wants()), ran()).root
    assert action_of(turn) == AskModel(2, 1, True, None)
    again = given(accepted(), *steps, asked(), said("", wants()), ran(), *steps).root
    assert isinstance(action_of(again), AskModel)


def test_lost_workers_do_not_use_up_attempts_and_do_not_wait() -> None:
    lost = [asked(), model_failed(ModelErrorClass.WORKER_LOST)] * WORKERS_LOST_MAX
    turn = given(accepted(), *lost).root
    assert action_of(turn) == AskModel(1, WORKERS_LOST_MAX + 1, True, NOON)
    failing = [asked(), model_failed(ModelErrorClass.TIMEOUT)]
    once = action_of(given(accepted(), *lost, *failing).root)
    assert isinstance(once, AskModel)
    assert once.not_before == NOON + timedelta(seconds=BACKOFF_FIRST_S)
    assert isinstance(action_of(given(accepted(), *lost, *failing * (ATTEMPTS_MAX - 1)).root), AskModel)
    assert isinstance(action_of(given(accepted(), *lost, *failing * ATTEMPTS_MAX).root), GiveUp)


def test_a_call_that_kills_every_worker_is_given_up() -> None:
    lost = [asked(), model_failed(ModelErrorClass.WORKER_LOST)] * (WORKERS_LOST_MAX + 1)
    assert action_of(given(accepted(), *lost).root) == GiveUp("failed", "model_worker_lost", "No reply.")


def test_what_the_provider_says_about_waiting_is_kept() -> None:
    turn = given(accepted(), asked(), model_failed(ModelErrorClass.RATE_LIMITED, 12.5)).root
    assert action_of(turn) == AskModel(1, 2, True, NOON + timedelta(seconds=12.5))


@pytest.mark.parametrize("retry_after_s", [300.0, WEEK_S, 1e300, float("inf"), float("nan")])
def test_a_wait_beyond_the_deadline_fails_at_once(retry_after_s: float) -> None:
    turn = given(accepted(), asked(), model_failed(ModelErrorClass.RATE_LIMITED, retry_after_s)).root
    assert action_of(turn) == GiveUp("failed", "model_rate_limited", "No reply.")


def test_waits_double_up_to_a_limit() -> None:
    assert [backoff_s(attempt, None) for attempt in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, BACKOFF_MAX_S]
    assert backoff_s(20, 0.0) == 0.0


def test_tokens_add_up_and_stay_estimated() -> None:
    estimated = TokenUsage(1, 2, 3, 4, "estimated")
    steps = [
        asked(),
        said("", wants(), usage=estimated),
        ran(),
        asked(),
        said("42", usage=TokenUsage(10, 20, 30, 40)),
    ]
    assert given(accepted(), *steps).root.usage == TokenUsage(11, 22, 33, 44, "estimated")
    assert added(TokenUsage(1, 1), TokenUsage(1, 1)).source == "provider"


# --- tools


def test_a_wanted_tool_is_noted_with_its_price() -> None:
    when = given(accepted(), asked()).when(said("", wants()))
    when.then(Turn.ModelCallCompleted, Turn.ToolCallRequested)
    call = when.root.tool_calls[FIRST]
    assert (call.tool, call.price_ncr, call.status, call.arguments) == (
        "web_search",
        ncr("0.15"),
        "requested",
        {"query": "q"},
    )


def test_a_tool_that_cannot_run_is_answered_with_the_reason_and_the_others_run() -> None:
    sentence = "There is no tool 'teleport'."
    turn = given(accepted(), asked(), said("", wants("teleport", refusal=sentence), wants("ocr"))).root
    assert (turn.tool_calls[FIRST].outcome, turn.tool_calls[FIRST].result) == ("refused", sentence)
    assert action_of(turn) == RunTools((SECOND_TOOL,))
    alone = given(accepted(), asked(), said("", wants("teleport", refusal=sentence))).root
    assert action_of(alone) == AskModel(2, 1, True, None)


def test_the_same_call_again_and_again_is_a_loop_and_the_model_must_answer() -> None:
    steps: list[Step] = []
    for iteration in range(1, SAME_CALLS_MAX):
        steps += [asked(), said("", wants()), ran(iteration=iteration)]
        assert action_of(given(accepted(), *steps).root) == AskModel(iteration + 1, 1, True, None)
    steps += [asked(), said("", wants())]
    looping = given(accepted(), *steps).root
    assert looping.tool_calls[tool_call_of(TURN, SAME_CALLS_MAX, 0)].outcome == "refused"
    assert action_of(looping) == AskModel(SAME_CALLS_MAX + 1, 1, False, None)
    told = given(accepted(), *steps, asked(), said("so be it", wants("ocr"))).root
    assert action_of(told) == Answer("so be it", "tool_loop")
    assert action_of(given(accepted(), *steps, asked(), said("")).root) == Answer(
        SILENCE["tool_loop"], "tool_loop"
    )


def test_the_same_tool_with_other_arguments_is_no_loop() -> None:
    calls = [wants(query=str(n)) for n in range(SAME_CALLS_MAX + 1)]
    assert not given(accepted(), asked(), said("", *calls)).root.loop_found


def test_at_its_last_iteration_the_model_must_answer() -> None:
    steps = [
        asked(),
        said("", wants(query="1")),
        ran(),
        asked(),
        said("", wants(query="2")),
        ran(iteration=2),
    ]
    before = given(accepted(iterations=2), *steps)
    assert action_of(before.root) == AskModel(3, 1, False, None)
    insisting = given(accepted(iterations=2), *steps, asked(), said("", wants(query="3")))
    assert len(insisting.root.tool_calls) == 2
    assert action_of(insisting.root) == Answer(SILENCE["max_iterations"], "max_iterations")


def test_the_rule_that_a_model_must_answer_is_not_up_to_the_worker() -> None:
    wrong = AskModel(1, 1, True, None)
    turn = given(
        accepted(iterations=0),
        lambda turn: turn.start_model_call(wrong, "offline", "extractive", WORKER, CALL_ENDS, NOON),
        said("done", wants()),
    ).root
    assert turn.tool_calls == {}
    assert action_of(turn) == Answer("done", "answered")


def test_a_turn_runs_so_many_tools() -> None:
    calls = [wants(query=str(n)) for n in range(3)]
    turn = given(accepted(tool_calls=2), asked(), said("", *calls)).root
    assert [call.outcome for call in turn.tool_calls.values()] == [None, None, "refused"]


def test_a_tool_call_is_claimed_by_one_worker() -> None:
    before = given(accepted(), asked(), said("", wants()))
    before.when(tool_started()).then(Turn.ToolCallStarted).then_returned(1)
    before.when(tool_started(), tool_started(worker=OTHER_WORKER)).then_refused(NotYours)
    before.when(tool_started(5)).then_refused(NotYours)


def test_a_result_is_taken_once() -> None:
    before = given(accepted(), asked(), said("", wants()), tool_started())
    before.when(tool_ended()).then(Turn.ToolCalled)
    before.when(tool_ended(), tool_ended()).then_refused(NotYours)
    before.when(tool_ended(attempt=2)).then_refused(NotYours)
    given(accepted(), asked(), said("", wants())).when(tool_ended(attempt=0)).then_refused(NotYours)


@pytest.mark.parametrize("effect", [Effect.PURE, Effect.IDEMPOTENT])
def test_a_call_of_a_dead_worker_runs_again_when_that_does_no_harm(effect: Effect) -> None:
    before = given(accepted(), asked(), said("", wants(effect=effect)), tool_started())
    before.when(tool_retaken()).then(Turn.ToolCallStarted).then_returned(2)
    before.when(tool_retaken(), tool_ended(attempt=1)).then_refused(NotYours)
    before.when(tool_retaken(), tool_ended(attempt=2)).then(Turn.ToolCallStarted, Turn.ToolCalled)


def test_a_call_that_must_not_be_repeated_never_is() -> None:
    before = given(accepted(), asked(), said("", wants(effect=Effect.UNSAFE)), tool_started())
    when = before.when(tool_retaken())
    when.then(Turn.ToolCallOutcomeUnknown).then_returned(None)
    call = when.root.tool_calls[FIRST]
    assert (call.status, call.outcome, call.result) == ("ended", "unknown", OUTCOME_UNKNOWN)
    assert action_of(when.root) == AskModel(2, 1, True, None)
    for late in (tool_started(), tool_ended(), tool_retaken()):
        given(before.history, tool_retaken()).when(late).then_refused(NotYours)


def test_a_call_is_taken_from_the_worker_that_holds_it_only() -> None:
    before = given(accepted(), asked(), said("", wants()), tool_started())
    before.when(tool_retaken(lost_worker=OTHER_WORKER)).then_refused(NotYours)
    before.when(tool_retaken(), tool_retaken()).then_refused(NotYours)
    given(accepted(), asked(), said("", wants())).when(tool_retaken()).then_refused(NotYours)


def test_a_tool_that_cannot_be_paid_is_refused_and_the_turn_goes_on() -> None:
    when = given(accepted(), asked(), said("", wants())).when(
        lambda turn: turn.refuse_tool(FIRST, "There are not enough credits.", "insufficient_credits")
    )
    when.then(Turn.ToolCalled)
    assert action_of(when.root) == AskModel(2, 1, True, None)
    given(accepted(), asked(), said("", wants()), tool_started()).when(
        lambda turn: turn.refuse_tool(FIRST, "too late", "insufficient_credits")
    ).then_refused(NotYours)


# --- the end, and what it costs

TWO_TOOLS = (asked(), said("", wants(), wants("ocr")))


@pytest.mark.parametrize(
    ("steps", "end", "lines"),
    [
        pytest.param([asked(), said("42")], answered(), (MESSAGE_LINE,), id="answered"),
        pytest.param(
            [*TWO_TOOLS, ran(), ran(ordinal=1), asked(), said("42")],
            answered(),
            (MESSAGE_LINE, SEARCH_LINE, OCR_LINE),
            id="answered with tools",
        ),
        pytest.param(
            [*TWO_TOOLS, ran("failed"), ran(ordinal=1), asked(), said("42")],
            answered(),
            (MESSAGE_LINE, OCR_LINE),
            id="a failed tool is free",
        ),
        pytest.param(
            [*TWO_TOOLS, ran("timed_out"), ran("refused", 1), asked(), said("42")],
            answered(),
            (MESSAGE_LINE,),
            id="tools that timed out or were refused are free",
        ),
        pytest.param(
            [
                *(asked(), said("", wants(effect=Effect.UNSAFE))),
                *(tool_started(), tool_retaken(), asked(), said("42")),
            ],
            answered(),
            (MESSAGE_LINE,),
            id="a tool whose outcome is unknown is free",
        ),
        pytest.param(
            [*TWO_TOOLS, ran(), ran(ordinal=1)],
            gave_up(GiveUp("failed", "model_refused", "No reply.")),
            (),
            id="failed before an answer",
        ),
        pytest.param([*TWO_TOOLS, ran(), ran(ordinal=1)], gave_up(TIMED_OUT), (), id="timed out"),
        pytest.param([], cancelled, (), id="cancelled before start"),
        pytest.param(
            [*TWO_TOOLS, ran(), tool_started(1)],
            cancelled,
            (SEARCH_LINE,),
            id="cancelled: what ran is charged",
        ),
    ],
)
def test_what_a_turn_costs(steps: list[Step], end: Step, lines: tuple[ChargeLine, ...]) -> None:
    when = given(accepted(), *steps).when(end)
    ended = when.events[-1]
    assert isinstance(ended, Turn.Ended)
    assert sorted(ended.lines, key=str) == sorted(lines, key=str)
    assert ended.charged_ncr == when.root.charged_ncr == sum(line.amount_ncr for line in lines)
    assert (ended.owner_id, ended.hold_id) == (when.root.owner_id, hold_of(TURN))


def test_a_turn_of_the_query_route_costs_its_own_meter() -> None:
    when = given(accepted(meter=API_CALL), asked(), said("42")).when(answered())
    assert when.events[-1].lines == (ChargeLine(API_CALL, 1, 0, "rc-1"),)


def test_an_invoked_tool_costs_the_tool_alone() -> None:
    def request(turn: Turn) -> None:
        turn.request_tool(1, 0, wants())

    for outcome, lines in (("succeeded", (SEARCH_LINE,)), ("failed", ())):
        when = given(accepted(invoked=True), request, ran(outcome)).when(answered("invoked"))
        when.then(Turn.Completed, outcome="completed")
        assert when.events[-1].lines == lines


@pytest.mark.parametrize(
    ("end", "event_class", "outcome"),
    [
        (answered(), Turn.Completed, "completed"),
        (gave_up(GiveUp("failed", "model_refused", "No reply.")), Turn.Failed, "failed"),
        (gave_up(TIMED_OUT), Turn.TimedOut, "timed_out"),
    ],
)
def test_a_turn_ends_once(end: Step, event_class: type[Turn.Ended], outcome: str) -> None:
    given(accepted(), asked(), said("42")).when(end).then(event_class, outcome=outcome)
    ended = given(accepted(), asked(), said("42"), end)
    ended.when(cancelled).then_refused(Conflict, outcome=outcome)
    for again in (answered(), gave_up(TIMED_OUT)):
        ended.when(again).then_refused(NotYours)


def test_a_cancelled_turn_takes_no_more_results() -> None:
    given(accepted()).when(cancelled).then(Turn.CancellationRequested, Turn.Cancelled, outcome="cancelled")
    calling = given(accepted(), asked(), cancelled)
    calling.when(
        lambda turn: turn.complete_model_call(
            call_of(TURN, 1), 1, "42", "stop", (), TokenUsage(1, 1), 1, None
        )
    ).then_refused(NotYours)
    assert calling.root.open_call is None
    running = given(accepted(), *TWO_TOOLS, tool_started(), cancelled)
    for late in (tool_ended(), tool_started(1), tool_retaken(), answered(), gave_up(TIMED_OUT)):
        running.when(late).then_refused(NotYours)
    running.when(cancelled).then_refused(Conflict)


def test_what_happens_next_is_a_question_that_changes_nothing() -> None:
    before = given(accepted(), *TWO_TOOLS)
    before.when(lambda turn: next_action(turn, NOON)).then()


def test_the_end_tells_how_much_was_done() -> None:
    (ended,) = (
        given(accepted(), *TWO_TOOLS, ran(), ran(ordinal=1), asked(), said("42")).when(answered()).events
    )
    assert (ended.iterations, ended.tool_call_count, ended.usage) == (2, 2, TokenUsage(20, 10))
