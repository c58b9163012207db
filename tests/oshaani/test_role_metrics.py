from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from commands.bus import Overloaded
from domain.turn import Turn
from oshaani import __version__
from oshaani.role_metrics import (
    ProcessorMetrics,
    ProjectionMetrics,
    watch_lease,
    watch_process,
    watch_processor,
    watch_relay,
)
from schemas.records import AnyRecord
from stream_processors.processor import Processor, Work
from tests.oshaani.test_metrics import records_of


@dataclass
class CarriedSoFar:
    """A relay as it may be found."""

    sent_count: int = 0
    rewound_count: int = 0
    session_count: int = 1
    missing_topics: tuple[str, ...] = ()
    in_flight_count: int = 0
    held_ranges: tuple[int, ...] = ()
    stuck: Mapping[int, str] = field(default_factory=dict)
    trouble: str = ""

    def lag(self, heads: Mapping[int, int]) -> Mapping[int, int]:
        return {number: heads.get(number, 0) for number in self.held_ranges}


@dataclass
class HostedSoFar:
    """A processor's host as it may be found."""

    partitions: tuple[int, ...] = ()
    pending: int = 0
    lag: int = 0
    parked: int = 0
    polled_s_ago: float = 0.0


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"oshaani_{name}", labels)


def test_a_process_says_what_it_is_and_when_it_started() -> None:
    registry = CollectorRegistry()
    watch_process(registry, "relay")
    assert value(registry, "build_info", version=__version__, role="relay") == 1
    assert registry.get_sample_value("process_start_time_seconds") > 0  # type: ignore[operator]


def test_a_lease_is_held_or_not() -> None:
    registry = CollectorRegistry()
    epochs: list[int | None] = [None]
    watch_lease(registry, "projector", lambda: epochs[-1])
    assert value(registry, "lease_held", lease="projector") == 0
    epochs.append(7)
    assert value(registry, "lease_held", lease="projector") == 1


def test_a_relay_is_read_whenever_somebody_looks() -> None:
    registry, relay = CollectorRegistry(), CarriedSoFar()
    watch_relay(registry, relay, lambda: {0: 5, 3: 40})
    assert value(registry, "relay_sent_records_total") == 0
    relay.sent_count, relay.held_ranges, relay.in_flight_count = 12, (0, 3), 4
    relay.stuck, relay.missing_topics, relay.trouble = {9: "too large"}, ("oshaani.log.v1",), "no broker"
    assert value(registry, "relay_sent_records_total") == 12
    assert value(registry, "relay_held_ranges") == 2
    assert value(registry, "relay_in_flight_records") == 4
    assert value(registry, "relay_lag_events", range="3") == 40
    assert value(registry, "relay_stuck_shards") == 1
    assert value(registry, "relay_missing_topics") == 1
    assert value(registry, "relay_waiting") == 1


def test_batches_of_the_read_models_are_counted_and_timed() -> None:
    registry = CollectorRegistry()
    metrics = ProjectionMetrics(registry)
    metrics.applied(100, 30, 0.02)
    metrics.applied(50, 5, 0.01)
    assert value(registry, "projection_records_total") == 150
    assert value(registry, "projection_rows_total") == 35
    assert value(registry, "projection_batch_seconds_count") == 2


async def test_every_attempt_of_a_processor_is_counted_by_how_it_ended() -> None:
    outcomes: list[Exception | None] = [None, Overloaded(), ValueError("no"), None]
    processor = Processor("agent_turns")

    @processor.on(Turn.Accepted)
    async def handle(record: AnyRecord, work: Work) -> Awaitable[None] | None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return None

    registry = CollectorRegistry()
    measured = ProcessorMetrics(registry, "agent_turns").measured(processor)
    assert (measured.name, measured.order) == (processor.name, processor.order)
    (record,) = records_of()
    work: Work = None  # type: ignore[assignment]  # the handler above does not look at it
    attempt = measured.handlers[Turn.Accepted]
    await attempt(record, work)
    with pytest.raises(Overloaded):
        await attempt(record, work)
    with pytest.raises(ValueError, match="no"):
        await attempt(record, work)
    await attempt(record, work)

    def count(outcome: str) -> float | None:
        return value(registry, "processor_records_total", processor="agent_turns", outcome=outcome)

    assert (count("handled"), count("postponed"), count("failed")) == (2, 1, 1)
    assert value(registry, "processor_record_seconds_count", processor="agent_turns") == 4


async def test_what_a_handler_leaves_to_be_waited_for_is_handed_on() -> None:
    processor, waited = Processor("public_topics"), []

    async def rest() -> None:
        waited.append(True)

    @processor.on(Turn.Accepted)
    async def handle(record: AnyRecord, work: Work) -> Awaitable[None]:
        return rest()

    measured = ProcessorMetrics(CollectorRegistry(), "public_topics").measured(processor)
    (record,) = records_of()
    later = await measured.handlers[Turn.Accepted](record, None)  # type: ignore[arg-type]
    assert later is not None
    await later
    assert waited == [True]


def test_a_processors_host_shows_what_it_has_in_hand() -> None:
    registry = CollectorRegistry()
    state = HostedSoFar((1, 5), pending=3, lag=9, parked=2, polled_s_ago=0.25)
    watch_processor(registry, "tool_calls", lambda: state)
    of = {"processor": "tool_calls"}
    assert value(registry, "processor_pending_records", **of) == 3
    assert value(registry, "processor_assigned_partitions", **of) == 2
    assert value(registry, "processor_known_parked_streams", **of) == 2
    assert value(registry, "processor_lag_records", **of) == 9
    assert value(registry, "processor_silent_seconds", **of) == 0.25


def test_all_of_them_fit_in_one_registry() -> None:
    registry = CollectorRegistry()
    watch_process(registry, "processor")
    watch_lease(registry, "projector", lambda: None)
    watch_relay(registry, CarriedSoFar())
    ProjectionMetrics(registry)
    ProcessorMetrics(registry, "agent_turns")
    watch_processor(registry, "agent_turns", HostedSoFar)
    assert b"oshaani_relay_sent_records_total 0.0" in generate_latest(registry)
