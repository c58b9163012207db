"""What operators see of turns, tools, credits and queues in Prometheus. Counted from the events as they are committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from domain.callback import Callback
from domain.credit_account import CreditAccount
from domain.ports import ModelErrorClass
from domain.turn import OUTCOMES, ToolOutcome, Turn
from schemas.records import AnyRecord

MODEL_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
QUEUES = ("commands", "processors", "read_models", "calls", "poisoned")
CALLBACK_OUTCOMES = ("delivered", "failed", "given_up")
Queues = Callable[[], Mapping[str, int]]


class PlatformMetrics:
    """Counts what this process commits; `queues` says how much waits, by queue, whenever somebody looks."""

    def __init__(self, registry: CollectorRegistry, queues: Queues) -> None:
        self._accepted = Counter("oshaani_turns_accepted", "Turns accepted.", registry=registry)
        self._ended = Counter(
            "oshaani_turns_ended", "Turns that came to an end, by how.", ("outcome",), registry=registry
        )
        self._model_calls = Counter(
            "oshaani_model_calls",
            "Model calls that came back, by error class or 'ok'.",
            ("outcome",),
            registry=registry,
        )
        self._model_seconds = Histogram(
            "oshaani_model_call_seconds",
            "Time a model took to answer, in seconds.",
            buckets=MODEL_BUCKETS_S,
            registry=registry,
        )
        self._tokens = Counter("oshaani_tokens", "Tokens by direction.", ("direction",), registry=registry)
        self._tool_calls = Counter(
            "oshaani_tool_calls", "Tool calls by how they ended.", ("outcome",), registry=registry
        )
        self._callbacks = Counter(
            "oshaani_callbacks",
            "Attempts to deliver callbacks, by how they ended.",
            ("outcome",),
            registry=registry,
        )
        self._charged = Counter("oshaani_charged_nanocredits", "Nano-credits charged.", registry=registry)
        waiting = Gauge(
            "oshaani_waiting",
            "What waits: commands to be decided, records in work, events the read models are behind, calls under way.",
            ("queue",),
            registry=registry,
        )
        for queue in queues():
            waiting.labels(queue).set_function(partial(_length, queues, queue))

        # Every series is there from the start, so that its first increase is seen; and looking one up costs more than
        # counting.
        self._ends = {event_type: self._ended.labels(outcome) for event_type, outcome in OUTCOMES.items()}
        self._answers = self._model_calls.labels("ok")
        self._failures = {each: self._model_calls.labels(each.value) for each in ModelErrorClass}
        self._input, self._output = (self._tokens.labels(each) for each in ("input", "output"))
        self._tools = {each: self._tool_calls.labels(each) for each in get_args(ToolOutcome)}
        delivered, failed, given_up = (self._callbacks.labels(each) for each in CALLBACK_OUTCOMES)
        self._counts: dict[type, Callable[[AnyRecord], None]] = {
            Turn.Accepted: lambda record: self._accepted.inc(),
            Turn.ModelCallCompleted: self._model_answered,
            Turn.ModelCallFailed: lambda record: self._failures[record.event.error_class].inc(),
            Turn.ToolCalled: lambda record: self._tools[record.event.outcome].inc(),
            Turn.ToolCallOutcomeUnknown: lambda record: self._tools["unknown"].inc(),
            Callback.Delivered: lambda record: delivered.inc(),
            Callback.AttemptFailed: lambda record: failed.inc(),
            Callback.GivenUp: lambda record: given_up.inc(),
            CreditAccount.CreditsSettled: lambda record: self._charged.inc(record.event.captured_ncr),
            **dict.fromkeys(
                (Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled),
                lambda record: self._ends[record.type].inc(),
            ),
        }

    def observe(self, records: Sequence[AnyRecord]) -> None:
        """Count what was committed."""
        for record in records:
            count = self._counts.get(type(record.event))
            if count is not None:
                count(record)

    def _model_answered(self, record: AnyRecord) -> None:
        self._answers.inc()
        self._model_seconds.observe(record.event.latency_ms / 1000)
        self._input.inc(record.event.usage.input)
        self._output.inc(record.event.usage.output)


def _length(queues: Queues, queue: str) -> float:
    return float(queues()[queue])
