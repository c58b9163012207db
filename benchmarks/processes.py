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
from contextlib import contextmanager, suppress
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


def wait_until_ready(base_url: str, seconds: float = START_S) -> None:
    """Return when the server at `base_url` says that it can serve.

    Raises:
        TimeoutError: it does not in that time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(f"{base_url}/readyz", timeout=5):  # noqa: S310
            return
        time.sleep(0.05)
    raise TimeoutError(f"{base_url} is not ready after {seconds} s")


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds a process has used, user and system."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_by_program(process: psutil.Process) -> tuple[float, float, float]:
    """CPU seconds used by what a process started and itself: (our own programs, Postgres, Kafka).

    What its children have waited for counts with them, so that a server's short-lived processes are in it.
    """
    ours = cpu_s(process)
    postgres = kafka = 0.0
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times, name = child.cpu_times(), child.name()
            used = float(times.user + times.system)
            if name.startswith("python"):
                ours += used
            elif name.startswith("java"):
                kafka += used
            else:
                postgres += used + float(times.children_user + times.children_system)
    return ours, postgres, kafka


def rss_of_ours_mb(process: psutil.Process) -> float:
    """Resident memory of a process and of those of ours that it started, 10⁶ bytes."""
    children = process.children(recursive=True)
    ours = [process, *(child for child in children if child.name().startswith("python"))]
    return sum(float(each.memory_info().rss) for each in ours) / 1e6


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
