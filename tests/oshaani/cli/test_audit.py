from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from commands.agent import CreateAgent
from commands.turn import SendMessage
from commands.user import IssueUserKey, LogIn, RegisterUser
from domain.ids import TurnId, UserId, agent_of, derived, named_conversation
from domain.prices import MESSAGE
from oshaani.settings import read_settings
from oshaani.wiring import core_of, migrate
from tests.oshaani.cli.conftest import MASTER_KEY, Cli, Ran

ADA = UserId(UUID(int=7))


@pytest.fixture(scope="session")
def history(postgres_dsn: str, open_folder: Path) -> Iterator[str]:
    """A database with read models, and a person who has credits and a key; to be copied."""
    name = f"oshaani_history_{uuid4().hex}"
    url = urlunsplit(urlsplit(postgres_dsn)._replace(path=f"/{name}"))
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        asyncio.run(written(url, open_folder))
        yield name
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


async def written(url: str, folder: Path) -> None:
    environment = {"DATABASE_URL": url, "OSHAANI_MASTER_KEY": MASTER_KEY, "OSHAANI_DATA_DIR": str(folder)}
    await migrate(url)
    async with core_of(read_settings(environment), url) as core:
        running = asyncio.create_task(core.projector.run())
        assert await core.projector.ready(30)
        await core.bus.execute(RegisterUser(tenant_id=ADA, email="ada@example.com", name="Ada"), by="test")
        await core.bus.execute(LogIn(tenant_id=ADA), by="test")
        made = await core.bus.execute(CreateAgent(tenant_id=ADA, number=1, name="Guide"), by="test")
        assert made.result["number"] == 1
        for question in ("First?", "Second?"):
            await core.bus.execute(asked(question), by="test")
        issue = IssueUserKey(tenant_id=ADA, key_id="k", name="laptop", prefix="osh_user_k", digest="d")
        outcome = await core.bus.execute(issue, by="test")
        assert await core.projector.caught_up(outcome.shard, outcome.position, 20)
        running.cancel()
        await asyncio.wait([running])


def asked(question: str) -> SendMessage:
    """A message of one conversation; no worker is there to answer it."""
    return SendMessage(
        tenant_id=ADA,
        turn_id=TurnId(derived(question)),
        conversation_id=named_conversation(agent_of(1), "talk"),
        beginning="named",
        name="talk",
        agent_id=agent_of(1),
        content=question,
        channel="dashboard",
        mode="async",
        meter=MESSAGE,
        by_owner=True,
    )


# Events that no program of ours would write: `{}` are the type, the payload, and the turn's place in its conversation.
FORGED = """
    WITH turn AS (SELECT * FROM event WHERE type = 'Turn.Accepted' ORDER BY position OFFSET {2} LIMIT 1),
         moved AS (UPDATE shard SET head = head + 1 WHERE shard = (SELECT shard FROM turn) RETURNING head)
    INSERT INTO event
    SELECT t.shard, m.head, t.tenant_id, t.stream_id,
           1 + (SELECT max(stream_version) FROM event e WHERE e.stream_id = t.stream_id), '{0}', 1,
           convert_to('{1}', 'UTF8'), NULL, NULL, t.command_id, t.correlation_id, NULL, 'forger', NULL, clock_timestamp()
      FROM turn t, moved m
"""
ASKED_MODEL = ("Turn.ModelCallStarted", "{}")
WANTED = ("Turn.ToolCallRequested", '{"tool_call_id": "c", "tool": "pay", "effect": "unsafe"}')
RAN = ("Turn.ToolCallStarted", '{"tool_call_id": "c"}')


def forged(*events: tuple[str, str], turn: int = 0) -> str:
    return ";".join(FORGED.format(type, payload, turn) for type, payload in events)


@pytest.fixture
def copy_url(postgres_dsn: str, history: str) -> Iterator[str]:
    """A copy of that database, to be harmed."""
    name = f"oshaani_copy_{uuid4().hex}"
    copy = sql.Identifier(name)
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(copy, sql.Identifier(history)))
        yield urlunsplit(urlsplit(postgres_dsn)._replace(path=f"/{name}"))
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(copy))


@pytest.fixture
def on_copy(cli: Cli, copy_url: str) -> Cli:
    def run(*arguments: str, **environment: str) -> Ran:
        return cli(*arguments, DATABASE_URL=copy_url, OSHAANI_MASTER_KEY=MASTER_KEY, **environment)

    return run


def failing(ran: Ran) -> list[str]:
    return [line.removeprefix("fail ") for line in ran.out.splitlines() if line.startswith("fail ")]


def test_an_untouched_log_obeys_all_laws(on_copy: Cli) -> None:
    ran = on_copy("audit", "verify")
    assert (ran.code, failing(ran)) == (0, [])


@pytest.mark.parametrize(
    ("harm", "law"),
    [
        ("DELETE FROM event WHERE type = 'User.LoggedIn'", "positions are dense and heads equal counts"),
        ("DELETE FROM event WHERE type = 'User.LoggedIn'", "stream versions are dense"),
        ("DELETE FROM event WHERE type = 'User.ApiKeyIssued'", "every command's events are there"),
        ("DELETE FROM command WHERE type = 'LogIn'", "every event has its command"),
        (
            "UPDATE event SET tenant_id = gen_random_uuid() WHERE type = 'User.LoggedIn'",
            "a stream is one tenant's",
        ),
        (
            "UPDATE event SET recorded_at = recorded_at - interval '1 day' WHERE type = 'User.ApiKeyIssued'",
            "time does not run backwards within a shard",
        ),
        ("UPDATE credit_account SET available_ncr = available_ncr + 1", "credits obey their laws"),
        (
            "INSERT INTO parked VALUES ('users', gen_random_uuid(), 0, 1, 'KeyError')",
            "read models pass over no stream",
        ),
        (forged(("Turn.Failed", "{}"), ("Turn.Failed", "{}")), "a turn ends once"),
        (
            "UPDATE event SET payload = convert_to(regexp_replace(convert_from(payload, 'UTF8'),"
            """ '"deadline_at":"....', '"deadline_at":"2020'), 'UTF8') WHERE type = 'Turn.Accepted'""",
            "a turn ends within its deadline",
        ),
        ("DELETE FROM due", "somebody looks after every running turn"),
        (
            f"{forged(ASKED_MODEL)};{forged(ASKED_MODEL, turn=1)}",
            "one turn of a conversation works at a time",
        ),
        (forged(WANTED, RAN, RAN), "unsafe tool calls ran at most once"),
        ("UPDATE credit_hold SET turn_ended_at = now() - interval '1 hour'", "ended turns are settled"),
        ("UPDATE shard SET head = head + 1 WHERE head > 0", "read models are level with the log"),
    ],
)
def test_harm_is_found_and_named(on_copy: Cli, copy_url: str, harm: str, law: str) -> None:
    with psycopg.connect(copy_url, autocommit=True, options="-c search_path=oshaani") as connection:
        connection.execute(harm.encode())
    ran = on_copy("audit", "verify", "--wait", "0.2")
    assert ran.code == 1
    assert law in failing(ran)


def test_an_edited_balance_is_one_line_of_the_reconciliation(on_copy: Cli, copy_url: str) -> None:
    with psycopg.connect(copy_url, autocommit=True) as connection:
        connection.execute("UPDATE oshaani.credit_account SET available_ncr = available_ncr - 1")
    ran = on_copy("billing", "reconcile")
    assert ran.code == 1
    assert "row 192499999999 + 6000000000, events 192500000000 + 6000000000" in ran.out
    assert on_copy("billing", "reconcile", "--json").json["ok"] is False
