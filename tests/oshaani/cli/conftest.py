"""The command line against databases and servers of its own."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from oshaani.cli import main
from oshaani.cli.logs import OneLine

ROOT = Path(__file__).parents[3]
MASTER_KEY = base64.b64encode(bytes(range(32))).decode()
STARTED_S = 40.0
# What would lead a test to services of this machine, or colour its output.
LEFT_OUT = (
    "OPENAI",
    "OLLAMA",
    "AWS",
    "DATABASE_URL",
    "OSHAANI",
    "KAFKA",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
)


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0 or self.out, self.err
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    """Run a command in this process, with nothing of this machine in its environment."""
    for name in list(os.environ):
        if name.startswith(LEFT_OUT):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OSHAANI_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **environment: str) -> Ran:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.setattr(sys, "argv", ["oshaani", *arguments])
            capsys.readouterr()
            with without_log_handlers(), pytest.raises(SystemExit) as ended:
                main()
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    yield run


@contextmanager
def without_log_handlers() -> Iterator[None]:
    """Take away what a command adds to the log of this process."""
    root = logging.getLogger()
    level = root.level
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in [each for each in root.handlers if isinstance(each.formatter, OneLine)]:
            root.removeHandler(handler)


@pytest.fixture
def on_database(cli: Cli, database_url: str) -> Cli:
    """Run commands on an empty database of the test's own."""

    def run(*arguments: str, **environment: str) -> Ran:
        return cli(*arguments, DATABASE_URL=database_url, OSHAANI_MASTER_KEY=MASTER_KEY, **environment)

    return run


@dataclass(frozen=True, slots=True)
class Up:
    """A running `oshaani up`."""

    process: subprocess.Popen[str]
    environment: Mapping[str, str]
    log: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.environment['OSHAANI_PORT']}"

    @property
    def output(self) -> str:
        return self.log.read_text()


@contextmanager
def running_up(folder: Path, **environment: str) -> Iterator[Up]:
    """`oshaani up` in a process of its own, ready to serve."""
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    own = {"OSHAANI_PORT": str(port), "OSHAANI_DATA_DIR": str(folder / "data"), **environment}
    log = folder / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "oshaani", "up"],
            cwd=ROOT,
            env={**inherited, "OLLAMA_HOST": "127.0.0.1:9", "PYTHONUNBUFFERED": "1", **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        wait_until(lambda: "stop   Ctrl-C" in log.read_text() or process.poll() is not None, STARTED_S)
        assert process.poll() is None, log.read_text()
        yield Up(process, own, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def wait_until(reached: Callable[[], object], limit_s: float) -> None:
    until_s = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < until_s, "it did not come to pass in time"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder that the user of an embedded Postgres may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="oshaani-cli-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model_url() -> Iterator[str]:
    """An OpenAI-compatible upstream that does what a message's directives say."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.peers.fake_openai"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(5)
    process.stdout.close()


@pytest.fixture(scope="session")
def server(postgres_dsn: str, open_folder: Path, model_url: str) -> Iterator[Up]:
    """A server with a scripted model, on a database of its own, for all tests of a worker."""
    name = f"oshaani_cli_{uuid4().hex}"
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        folder = open_folder / "server"
        folder.mkdir()
        url = urlunsplit(urlsplit(postgres_dsn)._replace(path=f"/{name}"))
        with running_up(
            folder,
            DATABASE_URL=url,
            OSHAANI_MASTER_KEY=MASTER_KEY,
            OPENAI_BASE_URL=model_url,
            OPENAI_API_KEY="sk-test",
        ) as up:
            yield up
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def on_server(cli: Cli, server: Up) -> Cli:
    """Run commands with the settings of the running server."""

    def run(*arguments: str, **environment: str) -> Ran:
        return cli(*arguments, **{**server.environment, "OLLAMA_HOST": "127.0.0.1:9", **environment})

    return run
