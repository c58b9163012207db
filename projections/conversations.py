"""Read model: conversations and their messages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from domain.conversation import Conversation
from domain.user import User
from projections.projection import Forget, Increment, Insert, Projection, Update
from projections.read_side import NEWEST_POSITION, PAGE_MAX, After, ReadSide, page
from schemas.records import Record

SEARCHED_MAX = 20_000  # messages that one page of a search looks through

conversations = Projection(
    "conversations",
    version=3,
    tables="""
    CREATE TABLE conversation (
        conversation_id uuid        PRIMARY KEY,
        tenant_id       uuid        NOT NULL,
        agent_id        uuid        NOT NULL,
        channel         text        NOT NULL,
        name            text,                      -- what its caller calls it, if anything
        started_by      text        NOT NULL,
        message_count   integer     NOT NULL,
        last_message_at timestamptz,
        created_at      timestamptz NOT NULL
    );
    -- A turn has at most one question and one answer.
    CREATE TABLE message (
        turn_id         uuid        NOT NULL,
        role            text        NOT NULL,      -- user | assistant
        message_id      uuid        NOT NULL,
        conversation_id uuid        NOT NULL,
        tenant_id       uuid        NOT NULL,
        content         text,                      -- NULL when erased
        position        bigint      NOT NULL,      -- of its event in the tenant's shard
        created_at      timestamptz NOT NULL,
        PRIMARY KEY (turn_id, role)
    );""",
    indexes="""
    CREATE INDEX conversation_by_agent ON conversation (tenant_id, agent_id, created_at DESC, conversation_id DESC);
    CREATE INDEX message_by_conversation ON message (conversation_id, position DESC);
    CREATE INDEX message_by_tenant ON message (tenant_id, position DESC);
    """,
)


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A thread with an agent. `name` is what its caller calls it, if anything."""

    conversation_id: UUID
    tenant_id: UUID
    agent_id: UUID
    channel: str
    name: str | None
    started_by: str
    message_count: int
    last_message_at: datetime | None
    created_at: datetime

    @property
    def after(self) -> After:
        return self.created_at, self.conversation_id


@dataclass(frozen=True, slots=True)
class MessageRow:
    """A message; `content` is None when erased. `position` is the cursor."""

    message_id: UUID
    conversation_id: UUID
    turn_id: UUID
    role: Literal["user", "assistant"]
    content: str | None
    position: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class FoundMessage(MessageRow):
    """A message that was searched for; `conversation_name` is what the caller calls its conversation, if anything."""

    conversation_name: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gave. `seen_to`: the position to go on after, None when everything was looked through."""

    rows: list[FoundMessage]
    seen_to: int | None


_CONVERSATION = """
    c.conversation_id, c.tenant_id, c.agent_id, c.channel, c.name, c.started_by, c.message_count, c.last_message_at,
    c.created_at
"""
_MESSAGE = "m.message_id, m.conversation_id, m.turn_id, m.role, m.content, m.position, m.created_at"
# Newest first by index, as far as a page needs.
_SEARCH = f"""
    SELECT {_MESSAGE}, c.name AS conversation_name
      FROM (SELECT * FROM message
             WHERE tenant_id = %(tenant_id)s AND position < %(after)s
             ORDER BY position DESC LIMIT %(searched_max)s) m
      JOIN conversation c USING (conversation_id)
     WHERE c.agent_id = %(agent_id)s AND m.content ILIKE %(pattern)s
     ORDER BY m.position DESC LIMIT %(limit)s
"""
_SEARCHED_TO = """
    SELECT position FROM message WHERE tenant_id = %(tenant_id)s AND position < %(after)s
     ORDER BY position DESC OFFSET %(searched_max)s - 1 LIMIT 1
"""


async def get_conversation(
    db: ReadSide, tenant_id: UUID, agent_id: UUID | None, conversation_id: UUID
) -> ConversationRow | None:
    """A tenant's conversation; None when it is with another agent than `agent_id`, if one is given."""
    return await db.one(
        ConversationRow,
        f"""
        SELECT {_CONVERSATION} FROM conversation c
         WHERE c.conversation_id = %(conversation_id)s AND c.tenant_id = %(tenant_id)s
           AND (%(agent_id)s::uuid IS NULL OR c.agent_id = %(agent_id)s::uuid)
        """,
        {"tenant_id": tenant_id, "agent_id": agent_id, "conversation_id": conversation_id},
    )


async def list_conversations(
    db: ReadSide, tenant_id: UUID, agent_id: UUID, limit: int = 50, after: After | None = None
) -> list[ConversationRow]:
    """The conversations with an agent, newest first."""
    return await db.all(
        ConversationRow,
        f"""
        SELECT {_CONVERSATION} FROM conversation c
         WHERE c.tenant_id = %(tenant_id)s AND c.agent_id = %(agent_id)s
           AND (c.created_at, c.conversation_id) < (%(after_at)s, %(after_id)s)
         ORDER BY c.created_at DESC, c.conversation_id DESC LIMIT %(limit)s
        """,
        {"tenant_id": tenant_id, "agent_id": agent_id, **page(limit, after)},
    )


async def list_messages(
    db: ReadSide, tenant_id: UUID, conversation_id: UUID, limit: int = 50, after: int | None = None
) -> list[MessageRow]:
    """The messages of a tenant's conversation, newest first; `after` is the position of the last one seen."""
    return await db.all(
        MessageRow,
        f"""
        SELECT {_MESSAGE} FROM message m
         WHERE m.conversation_id = %(conversation_id)s AND m.tenant_id = %(tenant_id)s AND m.position < %(after)s
         ORDER BY m.position DESC LIMIT %(limit)s
        """,
        {
            "tenant_id": tenant_id,
            "conversation_id": conversation_id,
            "limit": max(1, min(limit, PAGE_MAX)),
            "after": NEWEST_POSITION if after is None else after,
        },
    )


async def search_messages(
    db: ReadSide,
    tenant_id: UUID,
    agent_id: UUID,
    text: str,
    limit: int = 50,
    after: int | None = None,
    searched_max: int = SEARCHED_MAX,
) -> Found:
    """Messages of an agent's conversations that contain `text`, whatever its case, newest first.

    A page looks through at most `searched_max` of the tenant's messages, and so may be short, or empty, although more
    can be found by going on after `seen_to`.
    """
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    arguments = {
        "tenant_id": tenant_id,
        "agent_id": agent_id,
        "pattern": f"%{escaped}%",
        "limit": max(1, min(limit, PAGE_MAX)),
        "after": NEWEST_POSITION if after is None else after,
        "searched_max": searched_max,
    }
    rows = await db.all(FoundMessage, _SEARCH, arguments)
    if len(rows) == arguments["limit"]:
        return Found(rows, rows[-1].position)
    last = await db.rows(_SEARCHED_TO, arguments)
    return Found(rows, last[0][0] if last else None)


@conversations.on(Conversation.Started)
def started(record: Record[Conversation.Started]) -> Insert:
    event = record.event
    row = {
        "conversation_id": record.stream_id,
        "tenant_id": record.tenant_id,
        "agent_id": event.agent_id,
        "channel": event.channel,
        "name": event.name,
        "started_by": event.started_by,
        "message_count": 0,
        "created_at": event.started_at,
    }
    return Insert("conversation", row)


@conversations.on(Conversation.MessageSent)
def message_sent(record: Record[Conversation.MessageSent]) -> tuple[Insert, Increment, Update]:
    return _message(record, "user", record.event.sent_at)


@conversations.on(Conversation.AssistantReplied)
def assistant_replied(record: Record[Conversation.AssistantReplied]) -> tuple[Insert, Increment, Update]:
    return _message(record, "assistant", record.event.replied_at)


@conversations.on(User.Erased)
def erased(record: Record[User.Erased]) -> Forget:
    return Forget("message", record.tenant_id, ("content",))


def _message(
    record: Record[Conversation.MessageSent] | Record[Conversation.AssistantReplied],
    role: Literal["user", "assistant"],
    at: datetime,
) -> tuple[Insert, Increment, Update]:
    event = record.event
    row = {
        "turn_id": event.turn_id,
        "role": role,
        "message_id": event.message_id,
        "conversation_id": record.stream_id,
        "tenant_id": record.tenant_id,
        "content": event.content,
        "position": record.position,
        "created_at": at,
    }
    conversation = (record.stream_id,)
    return (
        Insert("message", row),
        Increment("conversation", conversation, {"message_count": 1}),
        Update("conversation", conversation, {"last_message_at": at}),
    )
