"""Without any network the product installs nothing, calls nobody, and still answers honestly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.flows.people import Person
from tests.flows.real_server import ROOT, real_server

PROGRAM = str(ROOT / "tests" / "programs" / "offline_server.py")


def test_a_server_without_a_network_answers_and_never_tries_to_leave_the_machine(
    database_url: str, tmp_path: Path
) -> None:
    with real_server(database_url, tmp_path, program=(PROGRAM,)) as server:
        person = Person.register(server)
        answer = person.chat("Hello, how can you help me?")
        assert answer.status == 200
        assert "offline" in answer.json["response"]
        models = server.send("GET", "/api/models/", headers=person.user).json["data"]
        assert [model["provider"] for model in models] == ["offline"]
        said = person.chat('/tool svg_diagram {"title": "House", "rooms": []}')
        assert said.status == 200
        assert server.stop() == 0
        assert "LEFT THE MACHINE" not in server.log.read_text()


def test_the_guard_of_the_test_above_bites() -> None:
    ran = subprocess.run(
        [sys.executable, PROGRAM, "--try"], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert ran.returncode == 86
    assert b"LEFT THE MACHINE" in ran.stderr
