"""Programs under measurement: started, waited for, their CPU and memory read, stopped by id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
START_S, STOP_S = 60.0, 15.0


@contextmanager
def program(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[psutil.Process]:
    """Run `python arguments…` while the block runs; its output goes to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
        try:
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, seconds: float = START_S) -> None:
    """Return when somebody listens.

    Raises:
        TimeoutError: nobody does in that time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on port {port} after {seconds} s")


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds a process has used, user and system."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_of_tree_s(process: psutil.Process) -> float:
    """CPU seconds of a process's living descendants, and of those it has waited for."""
    own = process.cpu_times()
    return float(own.children_user + own.children_system) + sum(
        cpu_s(child) for child in process.children(recursive=True)
    )


def rss_mb(process: psutil.Process) -> float:
    """Resident memory, 10⁶ bytes."""
    return float(process.memory_info().rss / 1e6)


def call(method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """One JSON call, for setting things up."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310  (loopback only)
        url, data, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return json.load(answer)


def machine_load() -> str:
    """The load average, as every figure is printed beside."""
    return Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "?"
