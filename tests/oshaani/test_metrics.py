from __future__ import annotations

from uuid import UUID

from prometheus_client import CollectorRegistry

from domain.event_log import StoredEvent
from oshaani.metrics import QUEUES, PlatformMetrics
from schemas.codec import type_of
from schemas.records import AnyRecord, record_of
from tests.domain.spec import Step, given
from tests.domain.turns import accepted, answered, asked, said

SOMEBODY = UUID(int=1)


def records_of(*steps: Step) -> list[AnyRecord]:
    """What the log would hand over of a turn."""
    story = given(accepted(), *steps)
    return [
        record_of(
            event,
            StoredEvent(
                *(0, number, SOMEBODY, event.originator_id, number, type_of(type(event)).name, 1, b"{}"),
                *(None, None, SOMEBODY, SOMEBODY, None, "test", None, event.timestamp),
            ),
        )
        for number, event in enumerate(story.history, 1)
    ]


def test_every_series_is_there_before_anything_happened() -> None:
    registry = CollectorRegistry()
    PlatformMetrics(registry, lambda: dict.fromkeys(QUEUES, 0))
    assert registry.get_sample_value("oshaani_turns_ended_total", {"outcome": "timed_out"}) == 0
    assert registry.get_sample_value("oshaani_model_calls_total", {"outcome": "rate_limited"}) == 0
    assert registry.get_sample_value("oshaani_tool_calls_total", {"outcome": "unknown"}) == 0


def test_an_answered_turn_is_counted_once_with_its_call_and_tokens() -> None:
    registry = CollectorRegistry()
    metrics = PlatformMetrics(registry, lambda: dict.fromkeys(QUEUES, 0))
    metrics.observe(records_of(asked(), said("It is so."), answered()))
    assert registry.get_sample_value("oshaani_turns_accepted_total") == 1
    assert registry.get_sample_value("oshaani_turns_ended_total", {"outcome": "completed"}) == 1
    assert registry.get_sample_value("oshaani_model_calls_total", {"outcome": "ok"}) == 1
    assert registry.get_sample_value("oshaani_model_call_seconds_count") == 1
    assert registry.get_sample_value("oshaani_tokens_total", {"direction": "output"}) > 0  # type: ignore[operator]


def test_what_waits_is_asked_for_when_somebody_looks() -> None:
    registry, lengths = CollectorRegistry(), dict.fromkeys(QUEUES, 0)
    PlatformMetrics(registry, lambda: lengths)
    lengths["commands"] = 7
    assert registry.get_sample_value("oshaani_waiting", {"queue": "commands"}) == 7
