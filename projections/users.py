"""Read model: people. Names and addresses are gone once their key is destroyed and the model is rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from domain.ids import AgentId, TurnId
from domain.user import User
from projections.projection import Insert, Projection, Update
from projections.read_side import ReadSide
from schemas.records import Record

users = Projection(
    "users",
    version=2,
    tables="""
    CREATE TABLE app_user (
        user_id        uuid        PRIMARY KEY,    -- also the tenant
        email          text,                       -- NULL when erased
        name           text,                       -- NULL when erased
        role           text        NOT NULL,       -- user | operator
        created_at     timestamptz NOT NULL,
        first_login_at timestamptz
    );""",
)


@dataclass(frozen=True, slots=True)
class UserRow:
    """A person; e-mail address and name are None when erased."""

    user_id: UUID
    email: str | None
    name: str | None
    role: str
    created_at: datetime
    first_login_at: datetime | None


async def get_user(db: ReadSide, user_id: UUID) -> UserRow | None:
    """The person of an id."""
    return await db.one(
        UserRow,
        "SELECT user_id, email, name, role, created_at, first_login_at FROM app_user WHERE user_id = %(user_id)s",
        {"user_id": user_id},
    )


@dataclass(frozen=True, slots=True)
class Belongings:
    """What a person has that goes on by itself: agents, and turns that are not over."""

    agent_ids: tuple[AgentId, ...]
    turn_ids: tuple[TurnId, ...]


async def belongings_of(db: ReadSide, user_id: UUID) -> Belongings:
    """What must end when the person is forgotten."""
    arguments = {"user_id": user_id}
    agents = await db.rows("SELECT agent_id FROM agent WHERE tenant_id = %(user_id)s", arguments)
    turns = await db.rows(
        """
        SELECT request_id FROM request
         WHERE tenant_id = %(user_id)s AND status IN ('pending', 'processing')
        """,
        arguments,
    )
    return Belongings(tuple(AgentId(id) for (id,) in agents), tuple(TurnId(id) for (id,) in turns))


@users.on(User.Registered)
def registered(record: Record[User.Registered]) -> Insert:
    user = record.event
    row = {
        "user_id": record.stream_id,
        "email": user.email,
        "name": user.name,
        "role": "user",
        "created_at": record.recorded_at,
    }
    return Insert("app_user", row)


@users.on(User.LoggedIn)
def logged_in(record: Record[User.LoggedIn]) -> Update:
    return Update("app_user", (record.stream_id,), {"first_login_at": record.recorded_at})


@users.on(User.Erased)
def erased(record: Record[User.Erased]) -> Update:
    return Update("app_user", (record.stream_id,), {"email": None, "name": None})


@users.on(User.Promoted)
def promoted(record: Record[User.Promoted]) -> Update:
    return Update("app_user", (record.stream_id,), {"role": record.event.role})
