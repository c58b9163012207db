"""The real program, `oshaani up`, in a process of its own on a database of the test's, driven over HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MASTER_KEY = base64.b64encode(b"k" * 32).decode()
START_S, STOP_S = 60.0, 12.0
# What would lead the server to services of this machine.
LEFT_OUT = ("OPENAI", "OLLAMA", "AWS", "DATABASE_URL", "OSHAANI", "KAFKA")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; `text` is its whole body, `headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(slots=True)
class RealServer:
    """A running server; `said` keeps every body it has answered with."""

    base_url: str
    process: subprocess.Popen[bytes]
    log: Path
    said: list[str] = field(default_factory=list)

    def send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request; `body` is sent as JSON unless it is bytes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        all_headers = {"Content-Type": "application/json", "Origin": self.base_url, **(headers or {})}
        request = urllib.request.Request(self.base_url + path, data, all_headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                answer = Answer(found.status, _lower(found.headers), found.read().decode())
        except urllib.error.HTTPError as error:
            answer = Answer(error.code, _lower(error.headers), error.read().decode())
        self.said.append(answer.text)
        return answer

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


@contextmanager
def real_server(
    database_url: str,
    folder: Path,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "oshaani", "up"),
    end: Callable[[RealServer], None] = lambda server: None,
) -> Iterator[RealServer]:
    """Run the server while the block runs; `program` may be another one that starts it.

    `end` is called before what is left of it is killed.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    environment |= {
        "DATABASE_URL": database_url,
        "OSHAANI_PORT": str(port),
        "OSHAANI_DATA_DIR": str(folder / "data"),
        "OSHAANI_MASTER_KEY": MASTER_KEY,
        "OLLAMA_HOST": f"http://127.0.0.1:{free_port()}",
        "PYTHONPATH": str(ROOT),
        **(settings or {}),
    }
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *program], cwd=folder, env=environment, stdout=output, stderr=output
        )
        server = RealServer(f"http://127.0.0.1:{environment['OSHAANI_PORT']}", process, log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            with suppress(OSError, subprocess.TimeoutExpired):
                end(server)
            process.kill()
            process.wait()


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports(count: int) -> int:
    """The first of `count` ports in a row on which nobody listens now."""
    while True:
        first = free_port()
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return first


def _lower(headers: Message) -> dict[str, str]:
    """Headers by lower-case name; cookies as a browser would send them back."""
    cookies = "; ".join(cookie.partition(";")[0] for cookie in headers.get_all("Set-Cookie") or ())
    return {name.lower(): value for name, value in headers.items()} | (
        {"set-cookie": cookies} if cookies else {}
    )


def _wait_until_ready(server: RealServer) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text()
        try:
            with urllib.request.urlopen(server.base_url + "/readyz", timeout=2):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(server.log.read_text())
