"""`oshaani up` with its own Postgres, and commands beside it and after it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from adapters.postgres.embedded import running_dsn
from tests.oshaani.cli.conftest import Cli, free_port, running_up


@pytest.mark.timeout(180)
def test_commands_use_the_database_of_a_running_server_and_start_it_when_none_runs(
    cli: Cli, open_folder: Path
) -> None:
    folder = open_folder / "embedded"
    folder.mkdir()
    with running_up(folder) as up:
        data_dir = Path(up.environment["OSHAANI_DATA_DIR"])
        assert running_dsn(data_dir) is not None
        started = cli("quickstart", "--json", **up.environment).json
        assert started["model"] == "offline:offline"
        assert cli("keys", "list", started["email"], **up.environment).code == 0
        elsewhere = {**up.environment, "OSHAANI_PORT": str(free_port())}
        second = cli("up", **elsewhere)
        assert second.code == 1
        assert f"is in use by process {up.process.pid}" in second.err
        assert second.err.count("\n") == 1
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(20) == 0
    assert running_dsn(data_dir) is None
    after = cli("turn", "show", started["request_id"], "--json", **up.environment).json
    assert after["status"] == "completed"
    doctor = cli("doctor", **up.environment)
    assert doctor.code == 0, doctor.out
    assert "none answers at" in doctor.out
    assert (data_dir / "master.key").stat().st_mode & 0o077 == 0
