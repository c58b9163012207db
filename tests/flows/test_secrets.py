"""No secret is ever kept or shown outside the vault: canaries are planted everywhere and looked for everywhere."""

from __future__ import annotations

import base64
import urllib.request
from pathlib import Path

import psycopg

from tests.flows.people import Person
from tests.flows.real_server import MASTER_KEY, RealServer, free_port, real_server

PASSWORD, WRONG_PASSWORD = "canary-password-9f2c", "canary-wrong-password-77"
HEADER, OTHER_HEADER = "canary-header-5e1d8a", "canary-other-header-0b4c"
OPENAI_KEY, TAVILY_KEY = "canary-openai-key-3a7f", "canary-tavily-key-6d21"
IN_THE_OPEN = "canary-message-in-the-open"
WRONG_KEY = "osh_agent_aaaaaaaaaaaaaaaa_" + "C" * 43


def test_no_planted_secret_is_found_in_tables_logs_metrics_objects_or_answers(
    database_url: str, tmp_path: Path
) -> None:
    settings = {
        "OPENAI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1",
        "OPENAI_API_KEY": OPENAI_KEY,
        "OSHAANI_SEARCH_TAVILY_API_KEY": TAVILY_KEY,
        "OSHAANI_LOG_LEVEL": "debug",
        "OSHAANI_DEFAULT_MODEL": "offline:offline",
    }
    with real_server(database_url, tmp_path, settings) as server:
        person = Person.register(server, PASSWORD)
        server.said.clear()  # keys are shown once, to whoever made them
        _use_everything(server, person)
        _get_everything_wrong(server, person)
        metrics = urllib.request.urlopen(server.base_url + "/metrics", timeout=10).read().decode()
        assert server.stop() == 0
        secrets = [
            PASSWORD,
            WRONG_PASSWORD,
            HEADER,
            OTHER_HEADER,
            OPENAI_KEY,
            TAVILY_KEY,
            WRONG_KEY,
            MASTER_KEY,
        ]
        # The part of a key before its last underscore is its public name.
        secrets += [secret.rpartition("_")[2] for secret in person.secrets]
        places = {
            "tables": "\n".join(_rows(database_url)),
            "log": server.log.read_text(),
            "metrics": metrics,
            "objects": "\n".join(
                path.read_bytes().hex() for path in (tmp_path / "data").rglob("*") if path.is_file()
            ),
            "answers": "\n".join(server.said),
        }
        found = {
            (place, secret)
            for place, text in places.items()
            for secret in secrets
            for form in _forms(secret)
            if form in text
        }
        assert not found
        assert IN_THE_OPEN in places["tables"]  # the search does find what is there


def _use_everything(server: RealServer, person: Person) -> None:
    tool = {
        "name": "weather",
        "description": "The weather",
        "method": "GET",
        "url": "http://127.0.0.1:9/weather",
        "headers": {"X-Api-Key": HEADER},
    }
    path = f"/api/agents/{person.agent_id}/custom-tools/"
    assert server.send("POST", path, tool, person.user).status == 201
    changed = {**tool, "headers": {"X-Api-Key": OTHER_HEADER}}
    assert server.send("PUT", path + "weather/", changed, person.user).status == 200
    server.send("GET", path, headers=person.user)
    invoke = f"/api/agents/{person.agent_id}/invoke/"
    server.send("POST", invoke, {"action": "weather", "parameters": {}}, person.agent)
    assert person.chat(IN_THE_OPEN).status == 200
    assert person.chat("/tool weather {}").status == 200
    assert server.send("GET", "/api/requests/", headers=person.user).status == 200
    server.send("DELETE", path + "weather/", headers=person.user)


def _get_everything_wrong(server: RealServer, person: Person) -> None:
    email = "nobody@example.com"
    assert server.send("POST", "/api/auth/login", {"email": email, "password": WRONG_PASSWORD}).status == 401
    assert server.send("POST", "/api/v1/chat", {"message": "x"}, {"X-API-Key": WRONG_KEY}).status == 401
    misspelt = {"email": email, "pasword": PASSWORD, "name": "x"}
    assert server.send("POST", "/api/auth/register", misspelt).status == 400
    broken = f'{{"name": "t", "headers": {{"X": "{HEADER}"'.encode()
    path = f"/api/agents/{person.agent_id}/custom-tools/"
    assert server.send("POST", path, broken, person.user).status == 400
    wrong = {
        "name": "Bad Name!",
        "description": "x",
        "method": "GET",
        "url": "nowhere",
        "headers": {"X": HEADER},
    }
    assert server.send("POST", path, wrong, person.user).status == 400


def _rows(database_url: str) -> list[str]:
    """Every row of every table, as text; bytes appear in hexadecimal."""
    with psycopg.connect(database_url) as connection:
        tables = connection.execute(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        assert len(tables) > 15
        rows = [row for (table,) in tables for row in connection.execute(f"SELECT t::text FROM {table} t")]  # type: ignore[arg-type]
        assert len(rows) > 30
        return [str(row[0]) for row in rows]


def _forms(secret: str) -> tuple[str, ...]:
    """A secret as it stands, in hexadecimal, and in base64."""
    return secret, secret.encode().hex(), base64.b64encode(secret.encode()).decode().rstrip("=")
