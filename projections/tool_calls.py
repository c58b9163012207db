"""Read model: one row per tool call."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from domain.turn import OUTCOME_UNKNOWN, Turn
from domain.user import User
from projections.projection import Forget, Insert, Projection, Update
from projections.read_side import ReadSide
from schemas.records import Record

tool_calls = Projection(
    "tool_calls",
    version=2,
    tables="""
    CREATE TABLE tool_call (
        turn_id      uuid        NOT NULL,
        tool_call_id uuid        NOT NULL,
        tenant_id    uuid        NOT NULL,
        iteration    integer     NOT NULL,
        ordinal      integer     NOT NULL,         -- among those of its iteration
        tool         text        NOT NULL,
        kind         text        NOT NULL,         -- builtin | custom | mcp | connector
        effect       text        NOT NULL,         -- pure | idempotent | unsafe
        args         json,                         -- NULL when erased
        price_ncr    bigint      NOT NULL,         -- nano-credits, charged when it succeeds
        outcome      text,                         -- succeeded | failed | timed_out | refused | unknown, NULL until then
        result       text,                         -- NULL when erased
        attempts     integer     NOT NULL,
        latency_ms   integer,
        error_class  text,
        worker       text,
        requested_at timestamptz NOT NULL,
        ended_at     timestamptz,
        PRIMARY KEY (turn_id, tool_call_id)
    );""",
    indexes="""
    CREATE INDEX tool_call_by_tenant ON tool_call (tenant_id);
    """,
)


@dataclass(frozen=True, slots=True)
class ToolCallRow:
    """A tool call. `args` and `result` are None when erased; `outcome` is None until it has ended."""

    turn_id: UUID
    tool_call_id: UUID
    iteration: int
    ordinal: int
    tool: str
    kind: str
    effect: str
    args: dict[str, Any] | None
    price_ncr: int
    outcome: str | None
    result: str | None
    attempts: int
    latency_ms: int | None
    error_class: str | None
    requested_at: datetime
    ended_at: datetime | None


async def list_tool_calls(db: ReadSide, tenant_id: UUID, turn_id: UUID) -> list[ToolCallRow]:
    """The tool calls of a tenant's turn, in the order in which the model asked for them."""
    return await db.all(
        ToolCallRow,
        """
        SELECT turn_id, tool_call_id, iteration, ordinal, tool, kind, effect, args, price_ncr, outcome, result,
               attempts, latency_ms, error_class, requested_at, ended_at
          FROM tool_call WHERE turn_id = %(turn_id)s AND tenant_id = %(tenant_id)s
         ORDER BY iteration, ordinal
        """,
        {"tenant_id": tenant_id, "turn_id": turn_id},
    )


@tool_calls.on(Turn.ToolCallRequested)
def requested(record: Record[Turn.ToolCallRequested]) -> Insert:
    call = record.event
    row = {
        "turn_id": record.stream_id,
        "tool_call_id": call.tool_call_id,
        "tenant_id": record.tenant_id,
        "iteration": call.iteration,
        "ordinal": call.ordinal,
        "tool": call.tool,
        "kind": call.kind,
        "effect": call.effect.value,
        "args": call.args,
        "price_ncr": call.price_ncr,
        "attempts": 0,
        "requested_at": record.recorded_at,
    }
    return Insert("tool_call", row)


@tool_calls.on(Turn.ToolCallStarted)
def started(record: Record[Turn.ToolCallStarted]) -> Update:
    call = record.event
    columns = {"attempts": call.attempt, "worker": call.worker}
    return Update("tool_call", (record.stream_id, call.tool_call_id), columns)


@tool_calls.on(Turn.ToolCalled)
def called(record: Record[Turn.ToolCalled]) -> Update:
    call = record.event
    columns = {
        "outcome": call.outcome,
        "result": call.result,
        "latency_ms": call.latency_ms,
        "error_class": call.error_class,
        "ended_at": record.recorded_at,
    }
    return Update("tool_call", (record.stream_id, call.tool_call_id), columns)


@tool_calls.on(Turn.ToolCallOutcomeUnknown)
def outcome_unknown(record: Record[Turn.ToolCallOutcomeUnknown]) -> Update:
    columns = {"outcome": "unknown", "result": OUTCOME_UNKNOWN, "ended_at": record.recorded_at}
    return Update("tool_call", (record.stream_id, record.event.tool_call_id), columns)


@tool_calls.on(User.Erased)
def erased(record: Record[User.Erased]) -> tuple[Forget, Forget]:
    # What stands for an unknown outcome is our own text.
    ours = "outcome IS DISTINCT FROM 'unknown'"
    tenant_id = record.tenant_id
    return Forget("tool_call", tenant_id, ("args",)), Forget("tool_call", tenant_id, ("result",), ours)
