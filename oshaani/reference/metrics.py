"""The page of metrics, from the catalogue that makes them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from api.metrics import HttpMetrics
from oshaani.metrics import QUEUES, PlatformMetrics
from oshaani.reference.markdown import code, page, table

_INTRODUCTION = """
`GET /metrics` answers this machine; with `OSHAANI_METRICS_TOKEN` set, whoever sends it as a bearer token. The format is
Prometheus' text format; units are part of the names. Labels never hold ids: `route` is the path's template.
"""


def metrics_page() -> str:
    """The whole page."""
    registry = CollectorRegistry()
    HttpMetrics(registry).count(
        "/api/v1/chat", "POST", 200, 0.1
    )  # a family names its labels with its first sample
    PlatformMetrics(registry, lambda: dict.fromkeys(QUEUES, 0))
    rows = [_row(family) for family in registry.collect()]
    return page("Metrics", _INTRODUCTION, table(("name", "type", "labels", ""), rows))


def _row(family: Metric) -> tuple[str, str, str, str]:
    labels = [label for label in family.samples[0].labels if label != "le"]
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return code(name), family.type, ", ".join(map(code, labels)), family.documentation
