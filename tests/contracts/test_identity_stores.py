"""What every store of logins, sessions and uses of keys keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest

from adapters.memory.identity import MemoryKeyUses, MemoryLogins, MemorySessions
from adapters.postgres import identity
from adapters.postgres.identity import PostgresKeyUses, PostgresLogins, PostgresSessions
from adapters.postgres.pool import SCHEMA, open_pool
from domain.event_log import LogUnavailable
from domain.ports import KeyUses, Login, Logins, Session, Sessions

ADDRESS_KEY = bytes(range(32))
EMAIL = "Ada@Example.com"
NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Stores:
    logins: Logins
    sessions: Sessions
    key_uses: KeyUses


@pytest.fixture(params=["memory", "postgres"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    if request.param == "memory":
        yield Stores(MemoryLogins(), MemorySessions(), MemoryKeyUses())
        return
    url = request.getfixturevalue("database_url")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(f"CREATE SCHEMA {SCHEMA}")
        await connection.execute(f"SET search_path TO {SCHEMA}")
        await connection.execute(identity.TABLES)
    async with open_pool(url, 8) as pool:
        yield Stores(PostgresLogins(pool, ADDRESS_KEY), PostgresSessions(pool), PostgresKeyUses(pool))


async def test_a_login_is_found_by_its_address_however_it_is_written(stores: Stores) -> None:
    login = Login(uuid4(), "hash")
    assert await stores.logins.reserve(EMAIL, login) == login
    for spelling in (EMAIL, EMAIL.upper(), f" {EMAIL.lower()} "):
        assert await stores.logins.find(spelling) == login
    assert await stores.logins.find("bob@example.com") is None
    assert await stores.logins.find("") is None


async def test_of_many_who_want_one_address_one_gets_it(stores: Stores) -> None:
    wanted = [Login(uuid4(), f"hash {n}") for n in range(10)]
    holders = await asyncio.gather(*(stores.logins.reserve(EMAIL, login) for login in wanted))
    assert len({holder.user_id for holder in holders}) == 1
    assert holders[0] in wanted


async def test_a_changed_password_replaces_the_old_one(stores: Stores) -> None:
    login = await stores.logins.reserve(EMAIL, Login(uuid4(), "old"))
    await stores.logins.change_password(login.user_id, "new")
    assert await stores.logins.find(EMAIL) == Login(login.user_id, "new")


async def test_a_forgotten_address_is_free_again(stores: Stores) -> None:
    login = await stores.logins.reserve(EMAIL, Login(uuid4(), "hash"))
    await stores.logins.forget(login.user_id)
    assert await stores.logins.find(EMAIL) is None
    other = Login(uuid4(), "hash")
    assert await stores.logins.reserve(EMAIL, other) == other


async def test_a_session_is_found_until_it_expires_or_is_ended(stores: Stores) -> None:
    session = Session(b"d" * 32, uuid4(), NOW + HOUR)
    await stores.sessions.begin(session)
    assert await stores.sessions.find(session.digest, NOW) == session
    assert await stores.sessions.find(session.digest, NOW + HOUR) is None
    assert await stores.sessions.find(b"e" * 32, NOW) is None
    await stores.sessions.end(session.digest)
    await stores.sessions.end(session.digest)
    assert await stores.sessions.find(session.digest, NOW) is None


async def test_all_sessions_of_a_person_end_together_and_nobody_elses(stores: Stores) -> None:
    person, other = uuid4(), uuid4()
    for number, user_id in enumerate((person, person, other)):
        await stores.sessions.begin(Session(bytes([number]) * 32, user_id, NOW + HOUR))
    await stores.sessions.end_all(person)
    found = [await stores.sessions.find(bytes([number]) * 32, NOW) for number in range(3)]
    assert [session is not None for session in found] == [False, False, True]


async def test_the_last_use_of_a_key_never_goes_back(stores: Stores) -> None:
    await stores.key_uses.note({"a": NOW, "b": NOW})
    await stores.key_uses.note({"a": NOW + HOUR, "b": NOW - HOUR})
    assert await stores.key_uses.last(["a", "b", "c"]) == {"a": NOW + HOUR, "b": NOW}


async def test_no_row_shows_an_address(database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(f"CREATE SCHEMA {SCHEMA}")
        await connection.execute(f"SET search_path TO {SCHEMA}")
        await connection.execute(identity.TABLES)
        async with open_pool(database_url, 2) as pool:
            await PostgresLogins(pool, ADDRESS_KEY).reserve(EMAIL, Login(uuid4(), "hash"))
        cursor = await connection.execute("SELECT login::text FROM login")
        assert all("ada" not in str(row).lower() for row in await cursor.fetchall())


async def test_a_database_that_is_gone_is_said_to_be_unavailable() -> None:
    async with open_pool("postgresql://127.0.0.1:1/none", 1) as pool:
        with pytest.raises(LogUnavailable):
            await PostgresLogins(pool, ADDRESS_KEY).find(EMAIL)
