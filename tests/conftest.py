"""Servers and databases for the tests: one Postgres per run, a fresh database per test that asks for one.

Brokers are in `tests/peers/brokers.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from adapters.postgres.data_folder import EmbeddedPostgresFault, held_by_this_process
from adapters.postgres.embedded import PostgresServer
from tests.peers.brokers import broker as broker
from tests.peers.brokers import end_brokers, one_at_a_time
from tests.peers.brokers import own_broker as own_broker
from tests.peers.brokers import topics as topics

RUN_FOLDERS = "oshaani-tests-"
# A test loses nothing when the machine loses power.
SERVER_SETTINGS = {"fsync": "off", "max_connections": "500"}
_run_folder = pytest.StashKey[Path]()
_server = pytest.StashKey[PostgresServer]()


def pytest_configure(config: pytest.Config) -> None:
    """The first process of a run owns the run's folder; xdist's workers are told where it is."""
    if not hasattr(config, "workerinput"):
        remove_abandoned_runs()
        # Not below a private home: as root, the server runs under its own user.
        folder = Path(tempfile.mkdtemp(prefix=RUN_FOLDERS))
        folder.chmod(0o755)
        config.stash[_run_folder] = folder
        holder = held_by_this_process(folder)
        holder.__enter__()
        config.add_cleanup(lambda: holder.__exit__(None, None, None))
        config.add_cleanup(lambda: remove_run(folder))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    node.workerinput["oshaani_run_folder"] = str(node.config.stash[_run_folder])  # type: ignore[attr-defined]


def remove_run(folder: Path) -> None:
    """End the servers of a run, whichever process started them, and remove what they wrote."""
    end_brokers(folder)
    PostgresServer(folder).stop_left_over()
    shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned_runs() -> None:
    """A run that was killed leaves its server; the lock of its folder is free then."""
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_FOLDERS}*"):
        if not (folder / "lock").exists():
            continue
        try:
            with held_by_this_process(folder):
                remove_run(folder)
        except (EmbeddedPostgresFault, OSError):  # Still running, or of another user.
            continue


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of this run, shared by its workers; what runs in it is ended with the run."""
    worker = getattr(request.config, "workerinput", None)
    return request.config.stash[_run_folder] if worker is None else Path(worker["oshaani_run_folder"])


@pytest.fixture(scope="session")
def postgres_dsn(request: pytest.FixtureRequest, run_folder: Path) -> str:
    """A server for this run, shared by its workers; `TEST_DATABASE_URL` names another to use instead."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        return url
    # Kept for as long as the process lives: the first process of the run stops the server, not this fixture.
    server = request.config.stash.setdefault(_server, PostgresServer(run_folder, SERVER_SETTINGS))
    started = run_folder / "started"
    with one_at_a_time(run_folder / "starting"):
        if not started.exists():
            server.start()
            started.touch()
    return server.dsn


@pytest.fixture
def database_url(postgres_dsn: str) -> Iterator[str]:
    """An empty database of the test's own."""
    name = f"oshaani_test_{uuid4().hex}"
    identifier = sql.Identifier(name)
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        # Copies files; the default writes every page of the template to the log.
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 STRATEGY file_copy").format(identifier))
        yield urlunsplit(urlsplit(postgres_dsn)._replace(path=f"/{name}"))
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(identifier))
