"""Read model: one row per turn as its user sees it. Texts are joined from the messages and tool calls, the only
places that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from domain.callback import Callback, CallbackStatus
from domain.conversation import Conversation
from domain.turn import Turn
from projections.projection import Insert, Projection, Update
from projections.read_side import After, ReadSide, page
from schemas.records import AnyRecord, Record

requests = Projection(
    "requests",
    version=2,
    tables="""
    CREATE TABLE request (
        request_id      uuid        PRIMARY KEY,   -- the turn
        tenant_id       uuid        NOT NULL,
        agent_id        uuid        NOT NULL,
        conversation_id uuid,                      -- NULL when a tool was invoked without a model
        mode            text        NOT NULL,      -- sync | async | stream
        status          text        NOT NULL,      -- pending | processing | completed | failed
        queued          boolean     NOT NULL,      -- waits for earlier turns of its conversation
        meter           text        NOT NULL,
        actor           text        NOT NULL,
        iterations      integer     NOT NULL,
        charged_ncr     bigint      NOT NULL,      -- nano-credits
        finish          text,                      -- why the model stopped, once completed
        code            text,                      -- why there is no answer, once failed
        error_message   text,
        created_at      timestamptz NOT NULL,
        started_at      timestamptz,
        ended_at        timestamptz,
        callback_status   text,                    -- waiting | pending | delivered | failed; NULL without a callback
        callback_attempts integer   NOT NULL,
        last_position   bigint      NOT NULL       -- of the last event that changed this row
    );""",
    indexes="""
    CREATE INDEX request_by_tenant ON request (tenant_id, created_at DESC, request_id DESC);
    CREATE INDEX request_by_agent ON request (agent_id, created_at DESC, request_id DESC);
    CREATE INDEX request_by_conversation ON request (conversation_id, created_at DESC, request_id DESC);
    """,
)

RequestStatus = Literal["pending", "processing", "completed", "failed"]


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A turn as its user sees it. Cancelled and timed out turns are "failed" with a `code` that says so.

    `question`, `response` and the contents of `tool_calls` are None when erased. `tool_calls`: objects with
    `tool_name`, `parameters`, `result`, in the order in which the model asked for them.
    """

    request_id: UUID
    tenant_id: UUID
    agent_id: UUID
    conversation_id: UUID | None
    conversation_name: str | None
    mode: str
    status: RequestStatus
    queued: bool
    meter: str
    actor: str
    question: str | None
    response: str | None
    tool_calls: list[dict[str, Any]]
    iterations: int
    charged_ncr: int
    finish: str | None
    code: str | None
    error_message: str | None
    model: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    callback_status: CallbackStatus | None
    callback_attempts: int
    last_position: int

    @property
    def after(self) -> After:
        return self.created_at, self.request_id


_SELECT = """
    SELECT r.request_id, r.tenant_id, r.agent_id, r.conversation_id, c.name AS conversation_name, r.mode, r.status,
           r.queued, r.meter, r.actor, q.content AS question, a.content AS response,
           coalesce(t.calls, '[]') AS tool_calls, r.iterations, r.charged_ncr, r.finish, r.code, r.error_message,
           m.model, r.created_at, r.started_at, r.ended_at, r.callback_status, r.callback_attempts,
           r.last_position
      FROM request r
      LEFT JOIN conversation c ON c.conversation_id = r.conversation_id
      LEFT JOIN turn m ON m.turn_id = r.request_id
      LEFT JOIN message q ON q.turn_id = r.request_id AND q.role = 'user'
      LEFT JOIN message a ON a.turn_id = r.request_id AND a.role = 'assistant'
      LEFT JOIN LATERAL (
           SELECT json_agg(json_build_object('tool_name', t.tool, 'parameters', t.args, 'result', t.result)
                           ORDER BY t.iteration, t.ordinal) AS calls
             FROM tool_call t WHERE t.turn_id = r.request_id) t ON true
"""


async def get_request(
    db: ReadSide, tenant_id: UUID, request_id: UUID, agent_id: UUID | None = None
) -> RequestRow | None:
    """A tenant's request; None when it was made to another agent than `agent_id`, if one is given."""
    return await db.one(
        RequestRow,
        f"""
        {_SELECT}
         WHERE r.request_id = %(request_id)s AND r.tenant_id = %(tenant_id)s
           AND (%(agent_id)s::uuid IS NULL OR r.agent_id = %(agent_id)s::uuid)
        """,
        {"tenant_id": tenant_id, "request_id": request_id, "agent_id": agent_id},
    )


async def list_requests(
    db: ReadSide,
    tenant_id: UUID,
    agent_id: UUID | None = None,
    conversation_id: UUID | None = None,
    limit: int = 50,
    after: After | None = None,
) -> list[RequestRow]:
    """A tenant's requests, newest first; of one agent or one conversation if given."""
    agent = "AND r.agent_id = %(agent_id)s" if agent_id else ""
    conversation = "AND r.conversation_id = %(conversation_id)s" if conversation_id else ""
    return await db.all(
        RequestRow,
        f"""
        {_SELECT}
         WHERE r.tenant_id = %(tenant_id)s {agent} {conversation}
           AND (r.created_at, r.request_id) < (%(after_at)s, %(after_id)s)
         ORDER BY r.created_at DESC, r.request_id DESC LIMIT %(limit)s
        """,
        {
            "tenant_id": tenant_id,
            "agent_id": agent_id,
            "conversation_id": conversation_id,
            **page(limit, after),
        },
    )


@requests.on(Turn.Accepted)
def accepted(record: Record[Turn.Accepted]) -> Insert:
    turn = record.event
    row = {
        "request_id": record.stream_id,
        "tenant_id": record.tenant_id,
        "agent_id": turn.agent_id,
        "conversation_id": turn.conversation_id,
        "mode": turn.mode,
        "status": "pending",
        "queued": turn.queued,
        "meter": turn.meter,
        "actor": turn.actor,
        "iterations": 0,
        "charged_ncr": 0,
        "callback_status": "waiting" if turn.callback else None,
        "callback_attempts": 0,
        "created_at": turn.accepted_at,
        "last_position": record.position,
    }
    return Insert("request", row)


@requests.on(Conversation.TurnActivated)
def activated(record: Record[Conversation.TurnActivated]) -> Update:
    columns = {"queued": False, "last_position": record.position}
    return Update("request", (record.event.turn_id,), columns)


@requests.on(Turn.ModelCallStarted)
def model_call_started(record: Record[Turn.ModelCallStarted]) -> Update | None:
    if (record.event.iteration, record.event.attempt) != (1, 1):
        return None
    return _update(record, status="processing", started_at=record.recorded_at)


@requests.on(Turn.ModelCallCompleted, personal=False)
def model_call_completed(record: Record[Turn.ModelCallCompleted]) -> Update:
    return _update(record, iterations=record.event.iteration)


@requests.on(Turn.ToolCallStarted)
def tool_call_started(record: Record[Turn.ToolCallStarted]) -> Update:
    return _update(record, status="processing")


@requests.on(Turn.Completed)
def completed(record: Record[Turn.Completed]) -> Update:
    return _ended(record, status="completed", finish=record.event.finish)


@requests.on(Turn.Failed, Turn.TimedOut, Turn.Cancelled)
def failed(record: Record[Turn.Failed | Turn.TimedOut | Turn.Cancelled]) -> Update:
    event = record.event
    return _ended(record, status="failed", code=event.error_code, error_message=event.sentence)


@requests.on(Callback.Queued)
def callback_queued(record: Record[Callback.Queued]) -> Update:
    return _told(record, callback_status="pending")


@requests.on(Callback.AttemptStarted)
def callback_started(record: Record[Callback.AttemptStarted]) -> Update:
    return _told(record, callback_attempts=record.event.attempt)


@requests.on(Callback.Delivered)
def callback_delivered(record: Record[Callback.Delivered]) -> Update:
    return _told(record, callback_status="delivered")


@requests.on(Callback.GivenUp)
def callback_given_up(record: Record[Callback.GivenUp]) -> Update:
    return _told(record, callback_status="failed")


def _told(record: AnyRecord, **columns: Any) -> Update:
    return Update("request", (record.event.turn_id,), {**columns, "last_position": record.position})


def _ended(
    record: Record[Turn.Completed | Turn.Failed | Turn.TimedOut | Turn.Cancelled], **columns: Any
) -> Update:
    event = record.event
    return _update(
        record,
        queued=False,
        iterations=event.iterations,
        charged_ncr=event.charged_ncr,
        ended_at=event.ended_at,
        **columns,
    )


def _update(record: AnyRecord, **columns: Any) -> Update:
    columns["last_position"] = record.position
    return Update("request", (record.stream_id,), columns)
