from __future__ import annotations

from pathlib import Path

from adapters.postgres.embedded import running_dsn
from tests.oshaani.cli.conftest import MASTER_KEY, Cli


def test_commands_make_no_database_where_there_is_none(cli: Cli, tmp_path: Path) -> None:
    ran = cli("events", "tail")
    assert ran.code == 1
    assert "there is no database in" in ran.err
    assert "oshaani up" in ran.err
    assert not (tmp_path / "data").exists()


def test_an_unreachable_database_is_said_in_one_line(cli: Cli) -> None:
    ran = cli(
        "migrate", DATABASE_URL="postgresql://me:secret@127.0.0.1:9/oshaani", OSHAANI_MASTER_KEY=MASTER_KEY
    )
    assert ran.code == 1
    assert ran.err.startswith("oshaani: the database cannot be used: ")
    assert ran.err.count("\n") == 1
    assert "secret" not in ran.err


def test_a_database_without_tables_is_said_with_the_way_out(on_database: Cli) -> None:
    assert on_database("events", "tail").err == "oshaani: the database is not set up; run `oshaani migrate`\n"


def test_migrating_twice_is_harmless(on_database: Cli) -> None:
    assert on_database("migrate").code == 0
    assert on_database("migrate", "--json").json == {"migrated": True}
    assert on_database("events", "tail").code == 0


def test_proofs_need_read_models(on_database: Cli) -> None:
    on_database("migrate")
    assert "the read models are not built yet" in on_database("billing", "reconcile").err


def test_no_server_runs_on_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert running_dsn(tmp_path / "nothing") is None
