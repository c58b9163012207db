"""The master key is replaced: API keys, logins, texts and secrets stay, and the old key is of no use."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from adapters.crypto import UnknownMasterKey, derive
from adapters.postgres.key_ring import Pool, PostgresKeyRing
from adapters.postgres.server_secret import server_secret
from tests.flows.people import Person
from tests.flows.real_server import LEFT_OUT, MASTER_KEY, ROOT, RealServer, real_server
from tests.peers.secret_tables import tables

__all__ = ["tables"]

NEW_KEY = base64.b64encode(b"n" * 32).decode()
COMMAND_S = 60.0
OLD, BOTH, NEW = (
    {"OSHAANI_MASTER_KEY": MASTER_KEY},
    {"OSHAANI_MASTER_KEY": NEW_KEY, "OSHAANI_PREVIOUS_MASTER_KEYS": MASTER_KEY},
    {"OSHAANI_MASTER_KEY": NEW_KEY},
)


def command(database_url: str, folder: Path, settings: Mapping[str, str], *words: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    environment |= {
        "DATABASE_URL": database_url,
        "OSHAANI_DATA_DIR": str(folder / "data"),
        "PYTHONPATH": str(ROOT),
        **settings,
    }
    return subprocess.run(
        [sys.executable, "-m", "oshaani", *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


def check_all_is_there(server: RealServer, person: Person, said: str) -> None:
    person = Person(server, person.user, person.agent, person.agent_id, person.secrets)
    found = server.send("POST", "/api/find_conversation", {"query": said}, person.agent)
    assert [message["content"] for message in found.json["data"]["messages"]][-1] == said
    assert server.send("GET", "/api/auth/me", headers=person.user).status == 200
    assert person.chat("Are you there?").status == 200


def test_keys_logins_and_texts_outlive_the_master_key(database_url: str, tmp_path: Path) -> None:
    said = "Remember the lighthouse."
    with real_server(database_url, tmp_path, OLD) as server:
        person = Person.register(server)
        assert person.chat(said).status == 200
        mail = server.send("GET", "/api/auth/me", headers=person.user).json["data"]["email"]
        assert server.stop() == 0
    with real_server(database_url, tmp_path, BOTH) as server:
        check_all_is_there(server, person, said)
        rotated = command(database_url, tmp_path, BOTH, "master-key", "rotate", "--json")
        assert rotated.returncode == 0, rotated.stderr
        document = json.loads(rotated.stdout)
        assert document["wrapped_by_others"] == 0
        assert {name for name, count in document["rewrapped"].items() if count} >= {
            "data_key",
            "server_secret",
        }
        check_all_is_there(server, person, said)
        assert server.stop() == 0
    with real_server(database_url, tmp_path, NEW) as server:
        check_all_is_there(server, person, said)
        body = {"email": mail, "password": "correct horse battery"}
        assert server.send("POST", "/api/auth/login", body).status == 200
        assert server.stop() == 0
    refused = command(database_url, tmp_path, OLD, "keys", "list", mail)
    assert refused.returncode == 1
    assert "OSHAANI_PREVIOUS_MASTER_KEYS" in refused.stderr


async def test_a_database_from_before_keeps_its_keys(tables: Pool) -> None:
    old, new, wrong = b"o" * 32, b"n" * 32, b"w" * 32
    await PostgresKeyRing(tables, old).ensure([uuid4()])
    with pytest.raises(UnknownMasterKey):
        await server_secret(tables, wrong)
    assert await server_secret(tables, new, [old]) == old
    assert derive(await server_secret(tables, new), "api keys") == derive(old, "api keys")


async def test_a_new_database_has_a_secret_of_its_own_that_all_processes_agree_on(tables: Pool) -> None:
    key = b"k" * 32
    first = await server_secret(tables, key)
    assert first == await server_secret(tables, key) != key
    with pytest.raises(UnknownMasterKey):
        await server_secret(tables, b"x" * 32)
