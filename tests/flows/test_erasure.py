"""People are forgotten when they ask: nobody acts for them, and nobody reads what they said."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg

from tests.flows.people import Person
from tests.flows.real_server import RealServer, real_server
from tests.flows.test_master_key import OLD, command
from tests.flows.world import until

SAID, SECRET = "The lighthouse is at the north end.", "canary-of-a-header"


def user_of(person: Person) -> Any:
    return person.server.send("GET", "/api/auth/me", headers=person.user).json["data"]


def use(person: Person) -> None:
    """Talk, and keep a secret."""
    assert person.chat(SAID).status == 200
    tool = {
        "name": "weather",
        "description": "The weather",
        "method": "GET",
        "url": "http://127.0.0.1:9/weather",
        "headers": {"X-Api-Key": SECRET},
    }
    path = f"/api/agents/{person.agent_id}/custom-tools/"
    assert person.server.send("POST", path, tool, person.user).status == 201


def events_of(database_url: str, user_id: str) -> list[str]:
    with psycopg.connect(database_url, options="-c search_path=oshaani") as connection:
        rows = connection.execute("SELECT type FROM event WHERE tenant_id = %s ORDER BY position", [user_id])
        return [name for (name,) in rows.fetchall()]


def left_of(database_url: str, user_id: str) -> dict[str, int]:
    """What is still there of a person, by kind."""
    queries = {
        "keys": "SELECT count(*) FROM data_key WHERE subject_id = %s AND wrapped IS NOT NULL",
        "secrets": "SELECT count(*) FROM vault_secret WHERE tenant_id = %s",
        "secret keys": "SELECT count(*) FROM vault_key WHERE tenant_id = %s",
        "logins": "SELECT count(*) FROM login WHERE user_id = %s",
        "sessions": "SELECT count(*) FROM session WHERE user_id = %s",
        "texts": "SELECT count(*) FROM message WHERE tenant_id = %s AND content IS NOT NULL",
        "names": "SELECT count(*) FROM app_user WHERE user_id = %s AND email IS NOT NULL",
    }
    with psycopg.connect(database_url, options="-c search_path=oshaani") as connection:
        found = {kind: connection.execute(query, [user_id]).fetchone() for kind, query in queries.items()}
        return {kind: row[0] for kind, row in found.items() if row and row[0]}


def check_forgotten(server: RealServer, database_url: str, person: Person, user: Any) -> None:
    until(lambda: events_of(database_url, user["id"])[-1] == "User.Erased", "the erasure")
    until(lambda: not left_of(database_url, user["id"]), "the read models to follow")
    for headers in (person.user, person.agent):
        assert server.send("GET", "/api/requests/", headers=headers).status == 401
    body = {"email": user["email"], "password": "correct horse battery"}
    assert server.send("POST", "/api/auth/login", body).status == 401


def test_who_asks_to_be_forgotten_is_and_nobody_else(database_url: str, tmp_path: Path) -> None:
    with real_server(database_url, tmp_path) as server:
        ada, bob = Person.register(server), Person.register(server)
        for person in (ada, bob):
            use(person)
        user = user_of(ada)
        for body in ({"email": user_of(bob)["email"]}, {"email": ""}, {}, None):
            assert server.send("DELETE", "/api/auth/me", body, ada.user).status == 400
        address = {"email": user["email"].upper()}
        assert server.send("DELETE", "/api/auth/me", address, ada.agent).status == 403
        asked = server.send("DELETE", "/api/auth/me", address, ada.user)
        assert asked.status == 202, asked.text
        check_forgotten(server, database_url, ada, user)
        # What is counted stays, and the address is free.
        types = events_of(database_url, user["id"])
        assert {"CreditAccount.CreditsSettled", "Conversation.MessageSent", "Agent.Deleted"} <= set(types)
        again = {"email": user["email"], "password": "another password"}
        entered = server.send("POST", "/api/auth/register", again)
        assert entered.status == 201
        assert entered.json["data"]["id"] != user["id"]
        assert bob.chat("Are you there?").status == 200
        found = server.send("POST", "/api/find_conversation", {"query": "lighthouse"}, bob.agent)
        assert found.json["data"]["messages"]
        assert Decimal(bob.balance()["posted"]) > 0


def test_an_operator_forgets_a_person_beside_a_running_server(database_url: str, tmp_path: Path) -> None:
    with real_server(database_url, tmp_path) as server:
        ada = Person.register(server)
        use(ada)
        user = user_of(ada)
        refused = command(database_url, tmp_path, OLD, "user", "erase", "nobody@example.com", "--yes")
        assert (refused.returncode, "nobody is registered" in refused.stderr) == (1, True)
        erased = command(database_url, tmp_path, OLD, "user", "erase", user["email"], "--yes", "--json")
        assert erased.returncode == 0, erased.stderr
        assert json.loads(erased.stdout) == {"user_id": user["id"], "erased": True}
        check_forgotten(server, database_url, ada, user)
        rebuilt = command(database_url, tmp_path, OLD, "projections", "rebuild", "conversations")
        assert rebuilt.returncode == 0, rebuilt.stderr
        assert not left_of(database_url, user["id"])
