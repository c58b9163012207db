"""Usage is watched as it happens: whoever spends far more than usual, and tools that keep failing, raise an alert.

Reads ended turns, their tool calls, and settlements; publishes alerts. What it knows is derived and can be built again:
rows of a Faust table, one for each tenant and each agent, with the open window of each length. A row remembers the
position up to which it has counted, so that what is delivered again changes nothing, and an alert has the id that
follows from whom and which window it is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import msgspec

from domain.credit_account import CreditAccount
from domain.ids import derived
from domain.money import ncr
from domain.turn import Turn
from schemas.public_facts import SpendAnomaly, ToolFailing
from schemas.records import AnyRecord
from stream_processors.processor import Processor, UsageRows, Work

MINUTE_S: Final = 60
HOUR_S: Final = 3600
TOOLS_MAX: Final = 100  # of one agent in one window; it has fewer
FAILURES = ("failed", "timed_out", "unknown")  # a refused call never ran

Alert = SpendAnomaly | ToolFailing


@dataclass(frozen=True, slots=True)
class SpendRule:
    """Alert when a window's spend is above the floor and above `factor` × the average of the `memory` windows before."""

    window_s: int
    floor_ncr: int
    factor: int
    memory: int


@dataclass(frozen=True, slots=True)
class ToolRule:
    """Alert when of at least `call_count_min` calls in a window `failure_percent` or more have failed."""

    window_s: int
    call_count_min: int
    failure_percent: int


@dataclass(frozen=True, slots=True)
class AlertRules:
    """What is out of the ordinary; one rule of each kind for each length of a window."""

    spend: tuple[SpendRule, ...] = (
        SpendRule(MINUTE_S, ncr("100"), factor=10, memory=60),
        SpendRule(HOUR_S, ncr("500"), factor=5, memory=24),
    )
    tools: tuple[ToolRule, ...] = (ToolRule(MINUTE_S, 5, 50), ToolRule(HOUR_S, 20, 50))


RULES = AlertRules()


# --- what is known ----------------------------------------------------------------------------------------------


class ToolCalls(msgspec.Struct, array_like=True, frozen=True):
    """Calls of a tool that have ended."""

    call_count: int = 0
    failure_count: int = 0


class Window(msgspec.Struct, array_like=True, frozen=True):
    """What was used since `start_s` (Unix time, a multiple of the length). `average_ncr`: the spend of those before."""

    start_s: int = 0
    turn_count: int = 0
    failed_turn_count: int = 0
    token_count: int = 0
    spent_ncr: int = 0
    tools: dict[str, ToolCalls] = {}
    average_ncr: int = 0
    alerted: tuple[str, ...] = ()


class Usage(msgspec.Struct, array_like=True, frozen=True):
    """A row: the open windows by their length in seconds, with everything up to `position` of its shard."""

    position: int = 0
    windows: dict[int, Window] = {}


class OpenCalls(msgspec.Struct, array_like=True, frozen=True):
    """A row: the tool calls of a turn that has not ended, by id: the tool, and whether it failed, None while it runs."""

    tools: dict[str, str] = {}
    failed: dict[str, bool] = {}


@dataclass(frozen=True, slots=True)
class Use:
    """What one record adds."""

    at: datetime
    turn_count: int = 0
    failed_turn_count: int = 0
    token_count: int = 0
    spent_ncr: int = 0
    tools: Mapping[str, ToolCalls] = field(default_factory=dict)


_encode = msgspec.msgpack.Encoder().encode
_usage = msgspec.msgpack.Decoder(Usage).decode
_open_calls = msgspec.msgpack.Decoder(OpenCalls).decode


# --- the fold and the rules: pure -------------------------------------------------------------------------------


def noted(usage: Usage, use: Use, position: int, rules: AlertRules = RULES) -> Usage:
    """The row with one more record; a record that it has already changes nothing."""
    if position <= usage.position:
        return usage
    windows = {
        rule.window_s: _added(_rolled(usage.windows.get(rule.window_s, Window()), use.at, rule), use)
        for rule in rules.spend
    }
    return Usage(position, windows)


def alerts_of(
    usage: Usage, tenant_id: UUID, agent_id: UUID | None, rules: AlertRules = RULES
) -> tuple[Usage, list[Alert]]:
    """What is out of the ordinary and was not said before in its window, and the row that remembers it as said."""
    found: list[Alert] = []
    windows = dict(usage.windows)
    for spend in rules.spend:
        window = windows[spend.window_s]
        threshold_ncr = _threshold_ncr(window, spend)
        if window.spent_ncr > threshold_ncr and "spend" not in window.alerted:
            found.append(
                SpendAnomaly(
                    tenant_id,
                    agent_id,
                    spend.window_s,
                    _instant(window),
                    window.spent_ncr,
                    window.average_ncr,
                    threshold_ncr,
                )
            )
            windows[spend.window_s] = _said(window, "spend")
    for each in rules.tools if agent_id is not None else ():
        assert agent_id is not None
        window = windows[each.window_s]
        for tool, calls in window.tools.items():
            if _is_failing(calls, each) and f"tool {tool}" not in window.alerted:
                found.append(_failing(tenant_id, agent_id, tool, window, each))
                windows[each.window_s] = window = _said(window, f"tool {tool}")
    return msgspec.structs.replace(usage, windows=windows), found


def id_of(alert: Alert) -> UUID:
    """The same for every alert about the same tenant, agent, tool and window."""
    about: tuple[object, ...]
    if isinstance(alert, ToolFailing):
        about = alert.tenant_id, alert.agent_id, "tool_failing", alert.tool
    else:
        about = alert.tenant_id, alert.agent_id or "", "spend_anomaly", ""
    return derived(*about, alert.window_s, int(alert.window_start_at.timestamp()))


def called(calls: OpenCalls, event: Turn.Event) -> OpenCalls:
    """A turn's calls after one more event about them; the same event again changes nothing."""
    if isinstance(event, Turn.ToolCallRequested):
        return OpenCalls(calls.tools | {str(event.tool_call_id): event.tool}, calls.failed)
    if isinstance(event, Turn.ToolCallOutcomeUnknown):
        return OpenCalls(calls.tools, calls.failed | {str(event.tool_call_id): True})
    if isinstance(event, Turn.ToolCalled) and event.outcome != "refused":
        return OpenCalls(calls.tools, calls.failed | {str(event.tool_call_id): event.outcome in FAILURES})
    return calls


def use_of_turn(event: Turn.Ended, calls: OpenCalls, at: datetime) -> Use:
    """What an ended turn adds: itself, its tokens, and its tool calls."""
    tools: dict[str, ToolCalls] = {}
    for id, is_failure in calls.failed.items():
        name = calls.tools.get(id)
        if name is not None:
            tools[name] = _sum(tools.get(name, ToolCalls()), ToolCalls(1, int(is_failure)))
    usage = event.usage
    return Use(
        at,
        turn_count=1,
        failed_turn_count=int(isinstance(event, Turn.Failed | Turn.TimedOut)),
        token_count=usage.input + usage.output,
        tools=tools,
    )


def _rolled(window: Window, at: datetime, rule: SpendRule) -> Window:
    """The window that is open at an instant; what is recorded a little late counts to the one that is open."""
    start_s = int(at.timestamp()) // rule.window_s * rule.window_s
    if start_s <= window.start_s:
        return window
    if window.start_s == 0:
        return Window(start_s)
    # One outburst is no new habit: it counts as what was just tolerable.
    spent_ncr = min(window.spent_ncr, _threshold_ncr(window, rule))
    average_ncr = (window.average_ncr * (rule.memory - 1) + spent_ncr) // rule.memory
    empty_count = (start_s - window.start_s) // rule.window_s - 1
    for _ in range(empty_count):
        if average_ncr == 0:
            break
        average_ncr = average_ncr * (rule.memory - 1) // rule.memory
    return Window(start_s, average_ncr=average_ncr)


def _added(window: Window, use: Use) -> Window:
    tools = dict(window.tools)
    for name, calls in use.tools.items():
        if name in tools or len(tools) < TOOLS_MAX:
            tools[name] = _sum(tools.get(name, ToolCalls()), calls)
    return msgspec.structs.replace(
        window,
        turn_count=window.turn_count + use.turn_count,
        failed_turn_count=window.failed_turn_count + use.failed_turn_count,
        token_count=window.token_count + use.token_count,
        spent_ncr=window.spent_ncr + use.spent_ncr,
        tools=tools,
    )


def _sum(one: ToolCalls, other: ToolCalls) -> ToolCalls:
    return ToolCalls(one.call_count + other.call_count, one.failure_count + other.failure_count)


def _threshold_ncr(window: Window, rule: SpendRule) -> int:
    return max(rule.floor_ncr, rule.factor * window.average_ncr)


def _is_failing(calls: ToolCalls, rule: ToolRule) -> bool:
    enough = calls.call_count >= rule.call_count_min
    return enough and calls.failure_count * 100 >= calls.call_count * rule.failure_percent


def _failing(tenant_id: UUID, agent_id: UUID, tool: str, window: Window, rule: ToolRule) -> ToolFailing:
    calls = window.tools[tool]
    return ToolFailing(
        tenant_id, agent_id, tool, rule.window_s, _instant(window), calls.call_count, calls.failure_count
    )


def _said(window: Window, what: str) -> Window:
    return msgspec.structs.replace(window, alerted=(*window.alerted, what))


def _instant(window: Window) -> datetime:
    return datetime.fromtimestamp(window.start_s, UTC)


# --- the processor ------------------------------------------------------------------------------------------------

usage_analytics = Processor("usage_analytics", order="tenant")


def row_of(tenant_id: UUID, agent_id: UUID | None = None) -> bytes:
    """The key of a tenant's row, or of the row of one of its agents."""
    return tenant_id.bytes + (agent_id.bytes if agent_id is not None else b"")


def usage_in(rows: UsageRows, key: bytes) -> Usage:
    """What a row says; nothing yet when there is none."""
    known = rows.get(key)
    return Usage() if known is None else _usage(known)


@usage_analytics.on(Turn.ToolCallRequested, Turn.ToolCalled, Turn.ToolCallOutcomeUnknown)
async def note_tool_call(record: AnyRecord, work: Work) -> Awaitable[None]:
    """Remember the call until its turn ends, which says whose it is."""
    rows = _rows(work)
    key = _calls_of(record.stream_id)
    return _all([rows.put(record.shard, key, _encode(called(_calls_in(rows, key), record.event)))])


@usage_analytics.on(Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled)
async def note_turn(record: AnyRecord, work: Work) -> Awaitable[None]:
    """Count the turn, its tokens and its tool calls."""
    rows = _rows(work)
    key = _calls_of(record.stream_id)
    use = use_of_turn(record.event, _calls_in(rows, key), record.recorded_at)
    kept = await _note(record, work, record.event.agent_id, use)
    if rows.get(key) is not None:
        kept.append(rows.put(record.shard, key, None))
    return _all(kept)


@usage_analytics.on(CreditAccount.CreditsSettled, CreditAccount.LateCharge)
async def note_charge(record: AnyRecord, work: Work) -> Awaitable[None]:
    """Count what was charged."""
    event = record.event
    spent_ncr = sum(line.amount_ncr for line in event.lines)
    return _all(
        await _note(record, work, event.origin.agent_id, Use(record.recorded_at, spent_ncr=spent_ncr))
    )


async def _note(record: AnyRecord, work: Work, agent_id: UUID | None, use: Use) -> list[Awaitable[None]]:
    rows, kept = _rows(work), []
    for whose in (None, agent_id) if agent_id is not None else (None,):
        key = row_of(record.tenant_id, whose)
        before = usage_in(rows, key)
        usage, alerts = before, list[Alert]()
        if record.position > before.position:
            usage, alerts = alerts_of(noted(before, use, record.position), record.tenant_id, whose)
        if alerts:
            # First: a row that says it was told must not be kept of an alert that nobody was told.
            await _tell(alerts, record, work)
        # Also what it has already: perhaps it was not kept.
        kept.append(rows.put(record.shard, key, _encode(usage)))
    return kept


async def _tell(alerts: Sequence[Alert], record: AnyRecord, work: Work) -> None:
    publication = work.publication
    assert publication is not None, "this worker was given nothing to publish with"
    messages = [
        publication.events.of_alert(alert, id_of(alert), record.tenant_id, record.recorded_at)
        for alert in alerts
    ]
    await (await publication.publisher.send(messages))


def _rows(work: Work) -> UsageRows:
    assert work.usage_rows is not None, "this worker was given no table"
    return work.usage_rows


def _calls_of(turn_id: UUID) -> bytes:
    return b"calls" + turn_id.bytes


def _calls_in(rows: UsageRows, key: bytes) -> OpenCalls:
    known = rows.get(key)
    return OpenCalls() if known is None else _open_calls(known)


async def _all(kept: Sequence[Awaitable[None]]) -> None:
    for each in set(kept):  # rows that are written together are waited for as one
        await asyncio.shield(each)  # others wait for them, too
