"""Read model: one row per turn as its operator sees it: which model, how many tokens, how long, by whom."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from domain.turn import OUTCOMES, Turn
from projections.projection import Change, Increment, Insert, Projection, Update
from projections.read_side import After, ReadSide, page
from schemas.records import Record

turns = Projection(
    "turns",
    version=1,
    tables="""
    CREATE TABLE turn (
        turn_id            uuid        PRIMARY KEY,
        tenant_id          uuid        NOT NULL,
        agent_id           uuid        NOT NULL,
        conversation_id    uuid,
        channel            text        NOT NULL,
        provider           text,
        model              text,
        worker             text,
        iterations         integer     NOT NULL,
        attempts           integer     NOT NULL,   -- of model calls
        tool_call_count    integer     NOT NULL,
        input_tokens       bigint      NOT NULL,
        output_tokens      bigint      NOT NULL,
        cache_read_tokens  bigint      NOT NULL,
        cache_write_tokens bigint      NOT NULL,
        usage_source       text,                   -- provider | estimated
        model_ms           bigint      NOT NULL,   -- spent in model calls that answered
        ttft_ms            integer,                -- of the first call, when it was streamed
        outcome            text,                   -- completed | failed | timed_out | cancelled
        error_code         text,
        accepted_at        timestamptz NOT NULL,
        ended_at           timestamptz
    );""",
    indexes="CREATE INDEX turn_by_tenant ON turn (tenant_id, accepted_at DESC, turn_id DESC);",
)


@dataclass(frozen=True, slots=True)
class TurnRow:
    """A turn's figures. `latency_ms` from acceptance to its end, `model_ms` of it in model calls that answered."""

    turn_id: UUID
    tenant_id: UUID
    agent_id: UUID
    conversation_id: UUID | None
    channel: str
    provider: str | None
    model: str | None
    worker: str | None
    iterations: int
    attempts: int
    tool_call_count: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    usage_source: str | None
    latency_ms: int | None
    model_ms: int
    ttft_ms: int | None
    outcome: str | None
    error_code: str | None
    accepted_at: datetime
    ended_at: datetime | None

    @property
    def after(self) -> After:
        return self.accepted_at, self.turn_id


_SELECT = """
    SELECT turn_id, tenant_id, agent_id, conversation_id, channel, provider, model, worker, iterations, attempts,
           tool_call_count, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, usage_source,
           (extract(epoch FROM ended_at - accepted_at) * 1000)::bigint AS latency_ms, model_ms, ttft_ms, outcome,
           error_code, accepted_at, ended_at
      FROM turn
"""


async def get_turn(db: ReadSide, tenant_id: UUID | None, turn_id: UUID) -> TurnRow | None:
    """A turn; of any tenant with None, for operators."""
    tenant = "AND tenant_id = %(tenant_id)s" if tenant_id else ""
    return await db.one(
        TurnRow,
        f"{_SELECT} WHERE turn_id = %(turn_id)s {tenant}",
        {"tenant_id": tenant_id, "turn_id": turn_id},
    )


async def list_turns(
    db: ReadSide, tenant_id: UUID, limit: int = 50, after: After | None = None
) -> list[TurnRow]:
    """A tenant's turns, newest first."""
    return await db.all(
        TurnRow,
        f"""
        {_SELECT}
         WHERE tenant_id = %(tenant_id)s AND (accepted_at, turn_id) < (%(after_at)s, %(after_id)s)
         ORDER BY accepted_at DESC, turn_id DESC LIMIT %(limit)s
        """,
        {"tenant_id": tenant_id, **page(limit, after)},
    )


@turns.on(Turn.Accepted)
def accepted(record: Record[Turn.Accepted]) -> Insert:
    turn = record.event
    row = {
        "turn_id": record.stream_id,
        "tenant_id": record.tenant_id,
        "agent_id": turn.agent_id,
        "conversation_id": turn.conversation_id,
        "channel": turn.channel,
        "iterations": 0,
        "attempts": 0,
        "tool_call_count": 0,
        "input_tokens": 0,
        "output_tokens": 0,
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "model_ms": 0,
        "accepted_at": turn.accepted_at,
    }
    return Insert("turn", row)


@turns.on(Turn.ModelCallStarted)
def model_call_started(record: Record[Turn.ModelCallStarted]) -> tuple[Change, ...]:
    call, key = record.event, (record.stream_id,)
    columns = {"provider": call.provider, "model": call.model, "worker": call.worker}
    return Update("turn", key, columns), Increment("turn", key, {"attempts": 1})


@turns.on(Turn.ModelCallCompleted, personal=False)
def model_call_completed(record: Record[Turn.ModelCallCompleted]) -> list[Change]:
    call, key = record.event, (record.stream_id,)
    found: list[Change] = [Increment("turn", key, {"iterations": 1, "model_ms": call.latency_ms})]
    if call.iteration == 1:
        found.append(Update("turn", key, {"ttft_ms": call.ttft_ms}))
    return found


@turns.on(Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled)
def ended(record: Record[Turn.Completed | Turn.Failed | Turn.TimedOut | Turn.Cancelled]) -> Update:
    event = record.event
    columns: dict[str, Any] = {
        "iterations": event.iterations,
        "tool_call_count": event.tool_call_count,
        "input_tokens": event.usage.input,
        "output_tokens": event.usage.output,
        "cache_read_tokens": event.usage.cache_read,
        "cache_write_tokens": event.usage.cache_write,
        "usage_source": event.usage.source,
        "outcome": OUTCOMES[record.type],
        "error_code": None if isinstance(event, Turn.Completed) else event.error_code,
        "ended_at": event.ended_at,
    }
    return Update("turn", (record.stream_id,), columns)
