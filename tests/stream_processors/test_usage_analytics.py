"""When usage raises an alert, and that counting survives every repetition."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from adapters.memory.publisher import MemoryPublisher
from commands.turn import CancelTurn
from domain.ids import ToolCallId, derived
from domain.money import ncr
from domain.ports import ToolFailed
from domain.turn import Turn
from schemas.cloud_events import CloudEvents
from schemas.public_facts import SpendAnomaly, ToolFailing
from schemas.public_forms import public_forms
from schemas.records import AnyRecord
from stream_processors.publication import Publication
from stream_processors.usage_analytics import (
    HOUR_S,
    MINUTE_S,
    Alert,
    AlertRules,
    OpenCalls,
    SpendRule,
    ToolCalls,
    ToolRule,
    Usage,
    Use,
    alerts_of,
    called,
    id_of,
    noted,
    row_of,
    usage_analytics,
    usage_in,
    use_of_turn,
)
from tests.commands.write_side import AGENT_NCR, BY, TURN_NCR
from tests.stream_processors.conftest import Staged
from tests.stream_processors.stage import CountedTool, ScriptedModels, Stage, hangs, says, wants

NOON = datetime(2031, 2, 3, 12, tzinfo=UTC)
TENANT, AGENT = derived("tenant"), derived("agent")
FLOOR_NCR = ncr("10")
RULES = AlertRules(
    spend=(SpendRule(MINUTE_S, FLOOR_NCR, factor=3, memory=4), SpendRule(HOUR_S, 10**18, factor=3, memory=4)),
    tools=(ToolRule(MINUTE_S, 4, 50), ToolRule(HOUR_S, 10**9, 50)),
)


def spent(credits: str, minute: int = 0, second: int = 0) -> Use:
    return Use(NOON + timedelta(minutes=minute, seconds=second), spent_ncr=ncr(credits))


def ran(tool: str, calls: int, failures: int, minute: int = 0) -> Use:
    return Use(NOON + timedelta(minutes=minute), tools={tool: ToolCalls(calls, failures)})


class Watched:
    """An agent, and what it used, one use after the other."""

    def __init__(self, *uses: Use, agent_id: UUID | None = AGENT) -> None:
        self.usage, self.agent_id = Usage(), agent_id
        self.alerts: list[Alert] = []
        for use in uses:
            self.when(use)

    def when(self, *uses: Use) -> Watched:
        self.alerts = []
        for use in uses:
            usage = noted(self.usage, use, self.usage.position + 1, RULES)
            self.usage, alerts = alerts_of(usage, TENANT, self.agent_id, RULES)
            self.alerts += alerts
        return self

    def then(self, *expected: Alert) -> None:
        assert self.alerts == list(expected)


def anomaly(spent: str, average: str, threshold: str, minute: int = 0) -> SpendAnomaly:
    at = NOON + timedelta(minutes=minute)
    return SpendAnomaly(TENANT, AGENT, MINUTE_S, at, ncr(spent), ncr(average), ncr(threshold))


# --- spend


def test_spend_up_to_the_floor_is_nothing_to_speak_of() -> None:
    Watched().when(spent("4"), spent("6")).then()


def test_spend_above_the_floor_of_somebody_new_is_told() -> None:
    Watched(spent("4")).when(spent("6.01")).then(anomaly("10.01", "0", "10"))


def test_it_is_told_once_in_its_window() -> None:
    Watched(spent("11")).when(spent("50")).then()


def test_it_is_told_again_in_another_window() -> None:
    # The outburst counted as what was just tolerable: 10 credits, a quarter of which is the average.
    Watched(spent("11")).when(spent("11", minute=1)).then(anomaly("11", "2.5", "10", minute=1))


def test_what_is_usual_for_somebody_is_nothing_to_speak_of() -> None:
    habit = [spent("9", minute=minute) for minute in range(20)]
    Watched(*habit).when(spent("20", minute=20)).then()


def test_far_more_than_usual_is_told() -> None:
    habit = [spent("8", minute=minute) for minute in range(40)]
    told = Watched(*habit).when(spent("24", minute=40)).alerts
    (alert,) = told
    assert isinstance(alert, SpendAnomaly)
    assert alert.threshold_ncr == 3 * alert.baseline_ncr > 2 * FLOOR_NCR


def test_a_quiet_time_lets_the_usual_fade() -> None:
    habit = [spent("9", minute=minute) for minute in range(20)]
    watched = Watched(*habit).when(spent("20", minute=20 + 60))
    assert len(watched.alerts) == 1


def test_what_is_recorded_a_little_late_counts_to_the_open_window() -> None:
    Watched(spent("6", minute=1)).when(spent("5", minute=0, second=59)).then(
        anomaly("11", "0", "10", minute=1)
    )


# --- tools


def test_a_tool_that_fails_half_of_the_time_is_told() -> None:
    Watched().when(ran("ocr", 4, 2)).then(ToolFailing(TENANT, AGENT, "ocr", MINUTE_S, NOON, 4, 2))


def test_few_calls_or_few_failures_are_nothing_to_speak_of() -> None:
    Watched().when(ran("ocr", 3, 3)).then()
    Watched().when(ran("ocr", 100, 49)).then()


def test_each_failing_tool_is_told_once() -> None:
    watched = Watched().when(ran("ocr", 4, 4), ran("web_search", 4, 4), ran("ocr", 4, 4))
    assert [alert.tool for alert in watched.alerts if isinstance(alert, ToolFailing)] == ["ocr", "web_search"]


def test_a_tenant_as_a_whole_has_no_failing_tools() -> None:
    Watched(agent_id=None).when(ran("ocr", 4, 4)).then()


def test_calls_are_counted_when_their_turn_ends_and_refused_ones_never() -> None:
    calls = OpenCalls()
    ids = [ToolCallId(derived("call", n)) for n in range(4)]
    for id in ids:
        calls = called(calls, event_of(Turn.ToolCallRequested, tool_call_id=id, tool="ocr"))
    for id, outcome in zip(ids, ("succeeded", "failed", "refused", "timed_out"), strict=True):
        calls = called(calls, event_of(Turn.ToolCalled, tool_call_id=id, outcome=outcome))
    again = called(calls, event_of(Turn.ToolCalled, tool_call_id=ids[1], outcome="failed"))
    assert again == calls
    usage = type("Usage", (), {"input": 3, "output": 4})
    use = use_of_turn(event_of(Turn.Failed, usage=usage), calls, NOON)
    assert (use.turn_count, use.failed_turn_count, use.token_count) == (1, 1, 7)
    assert use.tools == {"ocr": ToolCalls(3, 2)}


def event_of(kind: type[Any], **facts: Any) -> Any:
    """An event with nothing but these facts."""
    event = object.__new__(kind)
    vars(event).update(facts)
    return event


# --- repetition


def test_an_alert_has_the_id_of_what_it_is_about() -> None:
    alert = anomaly("11", "0", "10")
    assert id_of(alert) == id_of(replace(alert, spent_ncr=ncr("99")))
    others = [
        replace(alert, agent_id=None),
        replace(alert, window_s=HOUR_S),
        replace(alert, window_start_at=NOON + timedelta(minutes=1)),
        ToolFailing(TENANT, AGENT, "ocr", MINUTE_S, NOON, 4, 2),
        ToolFailing(TENANT, AGENT, "web_search", MINUTE_S, NOON, 4, 2),
    ]
    assert len({id_of(alert), *map(id_of, others)}) == 6


uses = st.lists(
    st.builds(
        Use,
        st.integers(0, 10_000).map(lambda seconds: NOON + timedelta(seconds=seconds)),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 1_000),
        st.integers(0, ncr("30")),
        st.dictionaries(
            st.sampled_from(["ocr", "lookup"]), st.builds(ToolCalls, st.integers(0, 9), st.integers(0, 9))
        ),
    ),
    max_size=20,
)


@given(uses, st.lists(st.integers(0, 20), max_size=5))
def test_deliveries_that_begin_again_anywhere_change_neither_the_row_nor_the_alerts(
    stream: list[Use], restarts: list[int]
) -> None:
    numbered = list(enumerate(sorted(stream, key=lambda use: use.at), start=1))

    def told(deliveries: list[tuple[int, Use]]) -> tuple[Usage, list[Alert]]:
        usage, said = Usage(), list[Alert]()
        for position, use in deliveries:
            if position > usage.position:
                usage, alerts = alerts_of(noted(usage, use, position, RULES), TENANT, AGENT, RULES)
                said += alerts
        return usage, said

    repeated: list[tuple[int, Use]] = []
    for restart in restarts:
        repeated += numbered[:restart]
    once, again = told(numbered), told(repeated + numbered)
    assert once == again
    ids = [id_of(alert) for alert in once[1]]
    assert len(ids) == len(set(ids))


@given(uses)
def test_nothing_is_lost_between_windows(stream: list[Use]) -> None:
    ordered = sorted(stream, key=lambda use: use.at)
    closed_ncr, usage = 0, Usage()
    for position, use in enumerate(ordered, start=1):
        before = usage.windows.get(MINUTE_S)
        usage = noted(usage, use, position, RULES)
        if before is not None and usage.windows[MINUTE_S].start_s != before.start_s:
            closed_ncr += before.spent_ncr
    open_ncr = usage.windows[MINUTE_S].spent_ncr if usage.windows else 0
    assert closed_ncr + open_ncr == sum(use.spent_ncr for use in ordered)


# --- the processor


class MemoryRows:
    """A table that is gone with the test."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def put(self, shard: int, key: bytes, value: bytes | None) -> Awaitable[None]:
        if value is None:
            self.rows.pop(key, None)
        else:
            self.rows[key] = value
        return asyncio.sleep(0)


class Watcher:
    """Watches a stage as a worker would."""

    def __init__(self, stage: Stage) -> None:
        self.rows, self.publisher = MemoryRows(), MemoryPublisher()
        self.work = stage.workers[0].work
        self.work.usage_rows = self.rows
        self.work.publication = Publication(
            self.publisher,
            CloudEvents("https://agents.example"),
            stage.log,
            stage.records,
            lambda: datetime.now(UTC),
        )

    async def take(self, records: list[AnyRecord]) -> Watcher:
        for record in records:
            record.recorded_at = NOON  # no window ends while the test runs
            handler = usage_analytics.handlers.get(type(record.event))
            if handler is not None:
                later = await handler(record, self.work)
                assert later is not None
                await later
        return self


async def test_every_turn_is_counted_once_for_its_agent_and_its_tenant(staged: Staged) -> None:
    steps = [wants(("lookup", {"q": "x"}), ("lookup", {"q": "y"})), says("Found.")]
    stage = await staged(ScriptedModels(*steps, wait=[hangs]), CountedTool()).begin()
    await stage.ask()
    for _ in range(2):
        await stage.ask()
    cancelled = await stage.send("wait")
    tenant_id, agent_id = stage.owner.tenant_id, stage.owner.agent_id
    await stage.bus.execute(CancelTurn(tenant_id=tenant_id, turn_id=cancelled.turn_id), by=BY)
    await stage.end_of(cancelled.turn_id)
    await stage.idle()
    records = await stage.happened()
    watcher = await Watcher(stage).take(records)
    rows = dict(watcher.rows.rows)
    assert set(rows) == {row_of(tenant_id), row_of(tenant_id, agent_id)}
    window = usage_in(watcher.rows, row_of(tenant_id, agent_id)).windows[HOUR_S]
    assert (window.turn_count, window.failed_turn_count, window.token_count) == (4, 0, 60)
    assert window.spent_ncr == 3 * TURN_NCR + 2 * ncr("0.15") + AGENT_NCR
    assert window.tools == {"lookup": ToolCalls(2, 0)}
    assert usage_in(watcher.rows, row_of(tenant_id)).windows[HOUR_S] == window
    for begin in range(len(records)):
        await watcher.take(records[begin:])
        assert watcher.rows.rows == rows


async def test_failing_turns_and_tools_raise_alerts_that_are_valid_and_told_once(staged: Staged) -> None:
    async def broken(arguments: Any, context: Any) -> Any:
        raise ToolFailed("It does not work.")

    steps = [wants(*(("lookup", {"q": f"{round} {n}"}) for n in range(5))) for round in range(2)]
    stage = await staged(ScriptedModels(*steps, says("I give up.")), CountedTool(run_once=broken)).begin()
    await stage.ask()
    await stage.idle()
    records = await stage.happened()
    watcher = await Watcher(stage).take(records)
    await watcher.take(records)
    told = [json.loads(message.value or b"") for message in watcher.publisher.messages]
    assert [(each["tool"], each["call_count"], each["failure_count"]) for each in told] == [
        ("lookup", 10, 10)
    ]
    (message,) = watcher.publisher.messages
    headers = {name: value.decode() for name, value in message.headers}
    assert headers["ce_type"] == "usage.tool_failing.v1"
    Draft202012Validator(
        public_forms()["usage.tool_failing.v1"].schema(), format_checker=FormatChecker()
    ).validate(told[0])
