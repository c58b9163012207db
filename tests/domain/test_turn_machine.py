"""Whatever workers, models, tools and people do in whatever order, a turn keeps its promises."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from domain.errors import Conflict, NotYours
from domain.money import ncr
from domain.ports import Effect, ModelErrorClass, TokenUsage
from domain.turn import Answer, AskModel, Await, GiveUp, Over, RunTools, Turn, call_of, next_action
from tests.domain.spec import state_of
from tests.domain.turns import ANSWER_ID, NOON, accepted, wants

WORKERS = st.sampled_from(["turns-1/a", "turns-2/a"])
ASKED = st.lists(
    st.builds(
        wants,
        tool=st.sampled_from(["web_search", "ocr"]),
        query=st.sampled_from("abc"),
        effect=st.sampled_from(Effect),
        refusal=st.sampled_from([None, None, None, "There is no such tool."]),
    ),
    max_size=3,
)
ATTEMPTS = st.integers(0, 3)
STEP = timedelta(seconds=20)
STEPS_TO_END_MAX = 400  # ten iterations of a few attempts and tools each


class TurnMachine(RuleBasedStateMachine):
    """One turn; what is refused changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = accepted(iterations=3, tool_calls=5)()
        self.replica: Any = None
        self.now = NOON
        self.open_calls = 0
        self.ends: list[Turn.Ended] = []
        self.successes: Counter[UUID] = Counter()
        self.starts: Counter[UUID] = Counter()
        for event in self.turn.collect_events():
            self.replica = event.mutate(self.replica)

    def ask(self, name: str, *arguments: object) -> bool:
        """Decide on a fork, and keep it unless it refuses."""
        before, fork = state_of(self.turn), self.turn.fork()
        fork._pending_events = []
        try:
            getattr(fork, name)(*arguments)
        except (NotYours, Conflict):
            assert state_of(self.turn) == before
            return False
        for event in fork.collect_events():
            self.record(event)
        self.turn = fork
        return True

    def record(self, event: Any) -> None:
        assert not self.ends, "something happened after the end"
        self.replica = event.mutate(self.replica)
        match event:
            case Turn.ModelCallStarted():
                self.open_calls += 1
                assert event.call_id == call_of(self.turn.id, event.iteration)
            case Turn.ModelCallCompleted() | Turn.ModelCallFailed():
                self.open_calls -= 1
            case Turn.ToolCallStarted():
                self.starts[event.tool_call_id] += 1
                effect = self.turn.tool_calls[event.tool_call_id].effect
                assert effect is not Effect.UNSAFE or self.starts[event.tool_call_id] == 1
            case Turn.ToolCalled():
                self.successes[event.tool_call_id] += event.outcome == "succeeded"
            case Turn.Ended():
                self.ends.append(event)

    # --- workers

    @rule(worker=WORKERS)
    def start_model_call(self, worker: str) -> None:
        action = next_action(self.turn, self.now)
        if isinstance(action, AskModel):
            assert self.ask("start_model_call", action, "offline", "m", worker, self.now + STEP, self.now)

    @rule(iteration=st.integers(0, 4), attempt=ATTEMPTS, worker=WORKERS)
    def start_model_call_on_an_old_decision(self, iteration: int, attempt: int, worker: str) -> None:
        action = AskModel(iteration, attempt, True, None)
        self.ask("start_model_call", action, "offline", "m", worker, self.now + STEP, self.now)

    @precondition(lambda self: self.turn.open_call is not None)
    @rule(text=st.sampled_from(["", "42"]), asked=ASKED)
    def complete_model_call(self, text: str, asked: list[Any]) -> None:
        call = self.turn.open_call
        assert call is not None
        usage = TokenUsage(1, 1)
        assert self.ask(
            "complete_model_call", call.call_id, call.attempt, text, "stop", asked, usage, 1, None
        )

    @precondition(lambda self: self.turn.open_call is not None)
    @rule(
        error_class=st.sampled_from(ModelErrorClass), retry_after_s=st.sampled_from([None, 0.0, 30.0, 1e12])
    )
    def fail_model_call(self, error_class: ModelErrorClass, retry_after_s: float | None) -> None:
        call = self.turn.open_call
        assert call is not None
        arguments = (call.call_id, call.attempt, error_class, "No reply.", retry_after_s, self.now)
        assert self.ask("fail_model_call", *arguments)

    @rule(iteration=st.integers(0, 4), attempt=ATTEMPTS)
    def complete_an_old_call(self, iteration: int, attempt: int) -> None:
        call_id = call_of(self.turn.id, iteration)
        call = self.turn.open_call
        if call is None or (call.call_id, call.attempt) != (call_id, attempt):
            usage = TokenUsage(1, 1)
            assert not self.ask("complete_model_call", call_id, attempt, "old", "stop", [], usage, 1, None)

    @precondition(lambda self: self.turn.tool_calls)
    @rule(data=st.data(), worker=WORKERS)
    def start_tool(self, data: st.DataObject, worker: str) -> None:
        self.ask("start_tool", self.some_tool(data), worker, self.now + STEP)

    @precondition(lambda self: self.turn.tool_calls)
    @rule(data=st.data(), lost=WORKERS, worker=WORKERS)
    def retake_tool(self, data: st.DataObject, lost: str, worker: str) -> None:
        self.ask("retake_tool", self.some_tool(data), lost, worker, self.now + STEP)

    @precondition(lambda self: self.turn.tool_calls)
    @rule(data=st.data(), attempt=ATTEMPTS, outcome=st.sampled_from(["succeeded", "failed", "timed_out"]))
    def end_tool(self, data: st.DataObject, attempt: int, outcome: str) -> None:
        self.ask("end_tool", self.some_tool(data), attempt, outcome, "result", 1, {}, None)

    @precondition(lambda self: self.turn.tool_calls)
    @rule(data=st.data())
    def refuse_tool(self, data: st.DataObject) -> None:
        self.ask("refuse_tool", self.some_tool(data), "There are not enough credits.", "insufficient_credits")

    @rule()
    def finish(self) -> None:
        match next_action(self.turn, self.now):
            case Answer(finish=finish):
                assert self.ask("answer", ANSWER_ID, finish, self.now)
            case GiveUp() as why:
                assert self.ask("give_up", why, self.now)

    # --- people and time

    @precondition(lambda self: self.turn.said)
    @rule()
    def cancel(self) -> None:
        was_over = bool(self.ends)
        assert self.ask("cancel", "user:3", "", self.now) is not was_over

    @rule()
    def wait(self) -> None:
        self.now += STEP

    def some_tool(self, data: st.DataObject) -> Any:
        return data.draw(st.sampled_from(list(self.turn.tool_calls)))

    # --- what is always true

    @invariant()
    def at_most_one_model_call_is_open(self) -> None:
        assert self.open_calls in (0, 1)
        if not self.ends:
            assert self.open_calls == (self.turn.open_call is not None)

    @invariant()
    def no_tool_call_succeeds_twice(self) -> None:
        assert max(self.successes.values(), default=0) <= 1

    @invariant()
    def limits_hold(self) -> None:
        assert len(self.turn.said) <= self.turn.limits.iterations + 1
        ran = [tool_call_id for tool_call_id, starts in self.starts.items() if starts]
        assert len(ran) <= self.turn.limits.tool_calls

    @invariant()
    def only_what_succeeded_is_charged_and_the_message_only_when_answered(self) -> None:
        for end in self.ends:
            answered = isinstance(end, Turn.Completed)
            paid = answered or isinstance(end, Turn.Cancelled)
            tools = sum(self.successes.values()) if paid else 0
            assert end.charged_ncr == ncr("3") * answered + ncr("0.15") * tools
            assert end.charged_ncr == sum(line.amount_ncr for line in end.lines)

    @invariant()
    def replay_gives_the_same_turn(self) -> None:
        assert state_of(self.replica) == state_of(self.turn)

    @invariant()
    def somebody_always_has_something_to_do_or_to_wait_for(self) -> None:
        action = next_action(self.turn, self.now)
        assert isinstance(action, Over) == bool(self.ends)
        if isinstance(action, RunTools):
            assert action.tool_call_ids
        if isinstance(action, Await):
            assert self.turn.open_call is not None or any(
                call.status == "started" for call in self.turn.tool_calls.values()
            )

    def teardown(self) -> None:
        """From wherever it is, the turn ends: by working on, and at its deadline whatever happens."""
        late = self.turn.fork()
        late._pending_events = []
        if not self.ends:
            why = next_action(late, late.limits.deadline_at)
            assert isinstance(why, GiveUp)
            late.give_up(why, late.limits.deadline_at)
            assert next_action(late, late.limits.deadline_at) == Over()
        for _ in range(STEPS_TO_END_MAX):
            if self.ends:
                break
            self.work_on()
        assert len(self.ends) == 1

    def work_on(self) -> None:
        match next_action(self.turn, self.now):
            case AskModel():
                self.start_model_call("turns-1/a")
            case RunTools(tool_call_ids):
                self.ask("start_tool", tool_call_ids[0], "turns-1/a", self.now + STEP)
            case Await():
                if (call := self.turn.open_call) is not None:
                    usage, asked = TokenUsage(1, 1), [wants(query=str(len(self.turn.said)))]
                    self.ask(
                        *(
                            "complete_model_call",
                            call.call_id,
                            call.attempt,
                            "",
                            "tool_calls",
                            asked,
                            usage,
                            1,
                            None,
                        )
                    )
                for tool in list(self.turn.tool_calls.values()):
                    if tool.status == "started":
                        self.ask("end_tool", tool.tool_call_id, tool.attempt, "succeeded", "", 1, {}, None)
            case _:
                self.finish()


TestTurnMachine = TurnMachine.TestCase
TestTurnMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
