"""What operators see of turns, tools, credits and queues in Prometheus. Counted from the events as they are committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from domain.credit_account import CreditAccount
from domain.ports import ModelErrorClass
from domain.turn import OUTCOMES, ToolOutcome, Turn
from schemas.records import AnyRecord

MODEL_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
QUEUES = ("commands", "processors", "read_models", "calls", "poisoned")
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
        self._charged = Counter("oshaani_charged_nanocredits", "Nano-credits charged.", registry=registry)
        waiting = Gauge(
            "oshaani_waiting",
            "What waits: commands to be decided, records in work, events the read models are behind, calls under way.",
            ("queue",),
            registry=registry,
        )
        for queue in QUEUES:
            waiting.labels(queue).set_function(partial(_length, queues, queue))

        # Every series is there from the start, so that its first increase is seen.
        for outcome in OUTCOMES.values():
            self._ended.labels(outcome)
        for error_class in ("ok", *ModelErrorClass):
            self._model_calls.labels(str(error_class))
        for direction in ("input", "output"):
            self._tokens.labels(direction)
        for tool_outcome in get_args(ToolOutcome):
            self._tool_calls.labels(tool_outcome)

    def observe(self, records: Sequence[AnyRecord]) -> None:
        """Count what was committed."""
        for record in records:
            match record.event:
                case Turn.Accepted():
                    self._accepted.inc()
                case Turn.ModelCallCompleted() as call:
                    self._model_calls.labels("ok").inc()
                    self._model_seconds.observe(call.latency_ms / 1000)
                    self._tokens.labels("input").inc(call.usage.input)
                    self._tokens.labels("output").inc(call.usage.output)
                case Turn.ModelCallFailed(error_class=error_class):
                    self._model_calls.labels(error_class.value).inc()
                case Turn.ToolCalled(outcome=outcome):
                    self._tool_calls.labels(outcome).inc()
                case Turn.ToolCallOutcomeUnknown():
                    self._tool_calls.labels("unknown").inc()
                case Turn.Ended():
                    self._ended.labels(OUTCOMES[record.type]).inc()
                case CreditAccount.CreditsSettled(captured_ncr=charged_ncr):
                    self._charged.inc(charged_ncr)
                case _:
                    pass


def _length(queues: Queues, queue: str) -> float:
    return float(queues()[queue])
