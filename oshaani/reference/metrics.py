"""The page of metrics, from the catalogue that makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from api.metrics import HttpMetrics
from oshaani import role_metrics
from oshaani.metrics import QUEUES, PlatformMetrics
from oshaani.reference.markdown import code, page, table
from oshaani.store_metrics import StoreMetrics

_INTRODUCTION = """
`GET /metrics` answers this machine; with `OSHAANI_METRICS_TOKEN` set, whoever sends it as a bearer token. The format is
Prometheus' text format; units are part of the names. Labels never hold ids: `route` is the path's template. A sum over
all processes counts everything once, but for what the database is asked for: there, `max` is meant. On Linux every
process also shows the usual `process_…` families.
"""


@dataclass
class _IdleRelay:
    """A relay with one range to show."""

    sent_count: int = 0
    rewound_count: int = 0
    session_count: int = 1
    missing_topics: tuple[str, ...] = ()
    in_flight_count: int = 0
    held_ranges: tuple[int, ...] = (0,)
    trouble: str = ""

    @property
    def stuck(self) -> Mapping[int, str]:
        return {}

    def lag(self, heads: Mapping[int, int]) -> Mapping[int, int]:
        return {0: 0}


@dataclass
class _IdleHost:
    """A processor's host with nothing in hand."""

    partitions: tuple[int, ...] = ()
    pending: int = 0
    lag: int = 0
    parked: int = 0
    polled_s_ago: float = 0.0


def catalogue() -> dict[str, list[Metric]]:
    """Every family that some process shows, each with a sample, by what shows it."""
    return {
        "Every process": _families(lambda r: role_metrics.watch_process(r, "api")),
        "HTTP: `up` and `api`": _families(_http),
        "Turns, tools, credits: `up`, `api` and processors, each what it commits": _families(_platform),
        "The relay": _families(lambda r: role_metrics.watch_relay(r, _IdleRelay())),
        "The projector": _families(_projector),
        "The database, as a projector sees it": _families(_store),
        "Processors": _families(_processor),
    }


def metrics_page() -> str:
    """The whole page."""
    parts: list[str] = []
    for title, families in catalogue().items():
        # What a process takes of the machine is counted on Linux only.
        rows = [_row(family) for family in families if family.name.startswith("oshaani_")]
        parts += [f"## {title}", table(("name", "type", "labels", ""), rows)]
    return page("Metrics", _INTRODUCTION, *parts)


def _families(watch: Callable[[CollectorRegistry], object]) -> list[Metric]:
    registry = CollectorRegistry()
    watch(registry)
    return list(registry.collect())


def _http(registry: CollectorRegistry) -> None:
    # A family names its labels with its first sample.
    HttpMetrics(registry).count("/api/v1/chat", "POST", 200, 0.1)


def _platform(registry: CollectorRegistry) -> None:
    PlatformMetrics(registry, lambda: dict.fromkeys(QUEUES, 0))


def _projector(registry: CollectorRegistry) -> None:
    role_metrics.watch_lease(registry, "projector", lambda: None)
    role_metrics.ProjectionMetrics(registry)


def _store(registry: CollectorRegistry) -> None:
    metrics = StoreMetrics(registry)
    metrics.topic_lag.labels("")
    metrics.projection_lag.labels("")


def _processor(registry: CollectorRegistry) -> None:
    role_metrics.ProcessorMetrics(registry, "agent_turns")
    role_metrics.watch_processor(registry, "agent_turns", _IdleHost)


def _row(family: Metric) -> tuple[str, str, str, str]:
    labels = [label for label in family.samples[0].labels if label != "le"]
    return code(shown_name(family)), family.type, ", ".join(map(code, labels)), family.documentation


def shown_name(family: Metric) -> str:
    """The name a family is asked for by."""
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
