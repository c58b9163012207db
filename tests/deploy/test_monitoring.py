from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml

from adapters.kafka.relay import RelayOptions
from oshaani.reference.metrics import catalogue, shown_name
from schemas.topics import PROCESSORS
from tests.deploy.compose import ROOT, services, workers

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RUNBOOK = ROOT / "docs" / "how-to" / "runbook.md"
SEVERITIES = {"critical", "warning", "info"}
OF_EVERY_TARGET = {"up"}
LABELS_OF_TARGETS = {"job", "instance"}
# Grafana puts a duration in its place.
RATE_INTERVAL = "$__rate_interval"


def read(path: str) -> Any:
    return yaml.safe_load((PROMETHEUS / path).read_text("utf-8"))


def alerts() -> list[dict[str, Any]]:
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((GRAFANA / "dashboards" / "oshaani.json").read_text("utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every expression by where it stands."""
    asked = {alert["alert"]: alert["expr"] for alert in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            asked[f"{panel['title']} {target['refId']}"] = target["expr"].replace(RATE_INTERVAL, "1m")
    return asked


def series() -> dict[str, list[dict[str, str]]]:
    """The series that some process of ours shows: by name, the labels of each sample."""
    found: dict[str, list[dict[str, str]]] = {}
    for families in catalogue().values():
        for family in families:
            for sample in family.samples:
                found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


SERIES = series()
QUERIES = queries()


def selectors(expression: object) -> Iterator[promql.VectorSelector]:
    """The selectors in a parsed expression."""
    if isinstance(expression, promql.MatrixSelector):
        yield expression.vector_selector
    elif isinstance(expression, promql.VectorSelector):
        yield expression
    elif isinstance(expression, promql.Call):
        for argument in expression.args:
            yield from selectors(argument)
    else:
        for part in ("lhs", "rhs", "expr"):
            if (inner := getattr(expression, part, None)) is not None:
                yield from selectors(inner)


@pytest.mark.parametrize("name", QUERIES)
def test_every_series_that_is_asked_for_is_shown_by_some_process(name: str) -> None:
    found = list(selectors(promql.parse(QUERIES[name])))
    assert found
    for selector in found:
        assert selector.name in SERIES.keys() | OF_EVERY_TARGET, selector.name
        samples = SERIES.get(selector.name, [{}])
        for matcher in selector.matchers.matchers:
            if matcher.name in LABELS_OF_TARGETS:
                continue
            values = {sample[matcher.name] for sample in samples if matcher.name in sample}
            assert values, f"{selector.name} has no label {matcher.name!r}"


@pytest.mark.parametrize("name", QUERIES)
def test_every_label_that_is_grouped_by_is_one_of_the_series(name: str) -> None:
    expression = promql.parse(QUERIES[name])
    known = {
        label
        for selector in selectors(expression)
        for each in SERIES.get(selector.name, [])
        for label in each
    }
    grouped = {
        label.strip()
        for group in re.findall(r"\bby \(([^)]*)\)", QUERIES[name])
        for label in group.split(",")
    }
    assert grouped <= known | LABELS_OF_TARGETS


def test_outcomes_that_are_asked_for_can_happen() -> None:
    for query in QUERIES.values():
        for selector in selectors(promql.parse(query)):
            outcomes = {each["outcome"] for each in SERIES.get(selector.name, []) if "outcome" in each}
            for matcher in selector.matchers.matchers:
                if matcher.name == "outcome":
                    assert set(matcher.value.split("|")) <= outcomes, (query, matcher.value)


def test_a_sum_is_never_taken_of_what_each_projector_sees() -> None:
    seen = {shown_name(each) for each in catalogue()["The database, as a projector sees it"]}
    for name, query in QUERIES.items():
        for metric in seen & set(re.findall(r"oshaani_\w+", query)):
            assert not re.search(rf"\b(sum|avg|count)( by \([^)]*\))? \({metric}", query), name
            assert not re.search(rf"\b(sum|avg|count)\({metric}", query), name


def test_a_counter_is_only_asked_for_how_it_changes() -> None:
    for name, query in QUERIES.items():
        for counter in re.findall(r"(?:\w+\()?oshaani_\w+_(?:total|bucket|count)", query):
            assert counter.startswith(("rate(", "increase(")), (name, counter)


# --- alerts


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"Oshaani[A-Z]\w+", alert["alert"])
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in SEVERITIES
    assert re.fullmatch(r"\d+[smh]", alert.get("for", "0s"))
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["runbook"] == f"docs/how-to/runbook.md#{alert['alert'].lower()}"


def test_every_alert_has_its_section_in_the_runbook_and_the_other_way_round() -> None:
    sections = re.findall(r"^### (Oshaani\w+)$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]


def test_a_missing_role_is_noticed_whichever_it_is() -> None:
    (expression,) = [alert["expr"] for alert in alerts() if alert["alert"] == "OshaaniRoleMissing"]
    roles = re.findall(r'absent\(oshaani_build_info\{role="(\w+)"\}\)', expression)
    assert roles == ["api", "relay", "projector", *PROCESSORS]


def test_the_relays_ranges_are_as_many_as_there_are() -> None:
    (expression,) = [alert["expr"] for alert in alerts() if alert["alert"] == "OshaaniRangesUnserved"]
    assert expression.endswith(f"< {RelayOptions().ranges}")


# --- who is asked


def test_every_process_of_the_layout_is_scraped_at_its_port() -> None:
    ports = {
        name: found["port"]
        for job in read("prometheus.yml")["scrape_configs"]
        for found in job.get("dns_sd_configs", [])
        for name in found["names"]
    }
    assert ports.keys() == workers().keys()
    assert {port for name, port in ports.items() if name != "api"} == {9464}
    assert ports["api"] == 8080


def test_prometheus_shows_the_token_that_the_processes_want() -> None:
    prometheus = services()["prometheus"]
    for job in read("prometheus.yml")["scrape_configs"]:
        if "dns_sd_configs" in job:
            file = job["authorization"]["credentials_file"]
            assert file.removeprefix("/run/secrets/") in [each["source"] for each in prometheus["secrets"]]
    assert "./deploy/prometheus:/etc/prometheus:ro" in prometheus["volumes"]
    assert read("prometheus.yml")["rule_files"] == ["alerts.yml"]


# --- the dashboard


def test_a_panel_is_where_no_other_is_and_says_what_it_shows() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        taken |= cells
    identifiers = [panel["id"] for panel in panels()]
    assert len(identifiers) == len(set(identifiers))


def test_grafana_finds_the_source_and_the_dashboard() -> None:
    provisioning = GRAFANA / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))[
        "datasources"
    ][0]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    provider = yaml.safe_load((provisioning / "dashboards" / "oshaani.yml").read_text("utf-8"))["providers"][
        0
    ]
    mounted = dict(volume.split(":")[:2] for volume in services()["grafana"]["volumes"])
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/oshaani.json"


def test_the_figures_that_tell_whether_it_is_well_are_on_the_dashboard() -> None:
    text = " ".join(QUERIES[name] for name in QUERIES if not name.startswith("Oshaani"))
    everything = {shown_name(family) for families in catalogue().values() for family in families}
    left_out = {name for name in everything if name.startswith("oshaani_") and name not in text}
    assert left_out == {
        "oshaani_build_info",
        "oshaani_callbacks_total",
        "oshaani_leases",
        "oshaani_processor_known_parked_streams",
        "oshaani_processor_silent_seconds",
        "oshaani_relay_missing_topics",
        "oshaani_relay_rewound_cursors_total",
        "oshaani_relay_sessions_total",
        "oshaani_relay_waiting",
        "oshaani_store_looked_timestamp_seconds",
    }
