"""Read model: people. Names and addresses are gone once their key is destroyed and the model is rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from domain.user import User
from projections.projection import Insert, Projection, Update
from projections.read_side import ReadSide
from schemas.records import Record

users = Projection(
    "users",
    version=1,
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


@users.on(User.Promoted)
def promoted(record: Record[User.Promoted]) -> Update:
    return Update("app_user", (record.stream_id,), {"role": record.event.role})
