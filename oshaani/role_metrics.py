"""What operators see of the processes of the distributed layout in Prometheus.

Each function or class adds its families to a registry. What a running object counts itself is read whenever somebody
looks; labels are names of ours (a projection, a processor, a topic), never ids.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from time import monotonic
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from commands.bus import Overloaded
from domain.event_log import EventLog, LogUnavailable
from oshaani import __version__
from schemas.records import AnyRecord
from stream_processors.processor import Handler, Processor, Work

log_of = logging.getLogger(__name__)

RECORD_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OUTCOMES = ("handled", "postponed", "failed")
POSTPONED = (LogUnavailable, Overloaded)  # not the record's fault
LOOK_S = 5.0
LOOK_LIMIT_S = 4.0


class Watched(Collector):
    """Families that are made anew whenever somebody looks."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()

    def describe(self) -> Iterable[Metric]:
        """None, so that registering looks at nothing."""
        return ()


# --- every process


def watch_process(registry: CollectorRegistry, role: str) -> None:
    """What the process is, when it started, and what it takes of the machine."""
    Info("oshaani_build", "The program's version and the process's role.", registry=registry).info(
        {"version": __version__, "role": role}
    )
    ProcessCollector(registry=registry)


def watch_lease(registry: CollectorRegistry, lease: str, epoch: Callable[[], int | None]) -> None:
    """Whether this process holds a lease; `epoch` is None while it does not."""
    held = Gauge(
        "oshaani_lease_held",
        "1 while this process holds the lease, 0 while it stands by.",
        ("lease",),
        registry=registry,
    )
    held.labels(lease).set_function(lambda: float(epoch() is not None))


# --- the relay


class Carrying(Protocol):
    """What is seen of a relay (`adapters.kafka.relay.Relay`)."""

    sent_count: int
    rewound_count: int
    session_count: int
    missing_topics: tuple[str, ...]

    @property
    def in_flight_count(self) -> int: ...

    @property
    def held_ranges(self) -> tuple[int, ...]: ...

    @property
    def stuck(self) -> Mapping[int, str]: ...

    @property
    def trouble(self) -> str: ...

    def lag(self, heads: Mapping[int, int]) -> Mapping[int, int]: ...


class LogHeads:
    """The heads of the log as of the last look; `run` looks until cancelled."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self.latest: Mapping[int, int] = {}

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(LOOK_LIMIT_S):
                    self.latest = await self._log.heads()
            except (LogUnavailable, TimeoutError) as failure:
                log_of.info("the heads of the log are not known: %r", failure)
            await asyncio.sleep(LOOK_S)


def watch_relay(
    registry: CollectorRegistry, relay: Carrying, heads: Callable[[], Mapping[int, int]] = dict
) -> None:
    """A relay's work; its lag is told by the latest `heads` of the log."""
    registry.register(Watched(lambda: _relay_families(relay, heads())))


def _relay_families(relay: Carrying, heads: Mapping[int, int]) -> Iterator[Metric]:
    yield _counted("relay_sent_records", "Records acknowledged by Kafka, on all topics.", relay.sent_count)
    yield _counted(
        "relay_sessions", "Connections to Kafka begun: one, and one after each failure.", relay.session_count
    )
    yield _counted(
        "relay_rewound_cursors",
        "Cursors set back because a topic had lost records, which were written again.",
        relay.rewound_count,
    )
    yield _now("relay_in_flight_records", "Records that wait for Kafka's answer.", relay.in_flight_count)
    yield _now("relay_held_ranges", "Ranges of shards that this relay serves.", len(relay.held_ranges))
    yield _now(
        "relay_stuck_shards",
        "Shards that stand still because an event is too large for a topic.",
        len(relay.stuck),
    )
    yield _now(
        "relay_missing_topics",
        "Topics that `oshaani topics apply` has yet to make.",
        len(relay.missing_topics),
    )
    yield _now("relay_waiting", "1 while the relay waits for Kafka or the log.", int(bool(relay.trouble)))
    lag = GaugeMetricFamily(
        "oshaani_relay_lag_events",
        "Events of the log that are not on every topic yet, by range of shards served here.",
        labels=("range",),
    )
    for number, event_count in relay.lag(heads).items():
        lag.add_metric((str(number),), event_count)
    yield lag


# --- the projector


class ProjectionMetrics:
    """What a `projections.runner.Runner` tells about its work."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._records = Counter(
            "oshaani_projection_records", "Records applied to the read models.", registry=registry
        )
        self._rows = Counter(
            "oshaani_projection_rows", "Rows of read models written or deleted.", registry=registry
        )
        self._seconds = Histogram(
            "oshaani_projection_batch_seconds",
            "Time one batch's transaction took, in seconds.",
            buckets=BATCH_BUCKETS_S,
            registry=registry,
        )

    def applied(self, record_count: int, row_count: int, seconds: float) -> None:
        """A batch is committed."""
        self._records.inc(record_count)
        self._rows.inc(row_count)
        self._seconds.observe(seconds)

    def lag(self, projection: str, event_count: int) -> None:
        """Nothing: `oshaani.store_metrics` sees it in the database, also while nobody applies anything."""


# --- processors


class ProcessorMetrics:
    """Counts what becomes of the records of one processor."""

    def __init__(self, registry: CollectorRegistry, processor: str) -> None:
        records = Counter(
            "oshaani_processor_records",
            "Attempts to handle a record: handled, postponed by an outage, or failed.",
            ("processor", "outcome"),
            registry=registry,
        )
        self._handled, self._postponed, self._failed = (records.labels(processor, each) for each in OUTCOMES)
        self._seconds = Histogram(
            "oshaani_processor_record_seconds",
            "Time until a record was secured, in seconds; what goes on in the background not included.",
            ("processor",),
            buckets=RECORD_BUCKETS_S,
            registry=registry,
        ).labels(processor)

    def measured(self, processor: Processor) -> Processor:
        """The same processor, whose handlers are counted and timed."""
        handlers = {
            event_class: self._measured(handler) for event_class, handler in processor.handlers.items()
        }
        return replace(processor, handlers=handlers)

    def _measured(self, handler: Handler) -> Handler:
        async def handle(record: AnyRecord, work: Work) -> Awaitable[None] | None:
            began_s = monotonic()
            try:
                later = await handler(record, work)
            except POSTPONED:
                self._postponed.inc()
                raise
            except Exception:
                self._failed.inc()
                raise
            finally:
                self._seconds.observe(monotonic() - began_s)
            self._handled.inc()
            return later

        return handle


class Hosted(Protocol):
    """How a processor's host is (`stream_processors.faust_app.HostState`)."""

    @property
    def partitions(self) -> Collection[int]: ...

    @property
    def pending(self) -> int: ...

    @property
    def lag(self) -> int: ...

    @property
    def parked(self) -> int: ...

    @property
    def polled_s_ago(self) -> float: ...


def watch_processor(registry: CollectorRegistry, processor: str, state: Callable[[], Hosted]) -> None:
    """What a processor's host has in hand."""
    registry.register(Watched(lambda: _host_families(processor, state())))


def _host_families(processor: str, state: Hosted) -> Iterator[Metric]:
    values = {
        "pending_records": ("Records taken and not finished yet.", state.pending),
        "lag_records": (
            "Records on this process's partitions of the work topic that are not finished.",
            state.lag,
        ),
        "assigned_partitions": (
            "Partitions of the work topic that are this process's.",
            len(state.partitions),
        ),
        "known_parked_streams": (
            "Streams that wait for an operator, as far as this process knows.",
            state.parked,
        ),
        "silent_seconds": ("Time since Kafka was last asked for records, in seconds.", state.polled_s_ago),
    }
    for name, (text, value) in values.items():
        family = GaugeMetricFamily(f"oshaani_processor_{name}", text, labels=("processor",))
        family.add_metric((processor,), value)
        yield family


def _counted(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"oshaani_{name}", text, value=value)


def _now(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"oshaani_{name}", text, value=value)
