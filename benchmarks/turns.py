"""A whole turn over HTTP against a model that answers at once, beside the floor that keeps nothing.

    python -m benchmarks.turns [--turns N] [--rounds R]

Prints p50 at one client, turns per second at 32 clients spread over 50 owners and on one, CPU per turn of ours, and
memory; medians over the rounds, floor and product alternating. Every accepted turn is checked to be settled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from benchmarks.load import Job, run_apart
from benchmarks.processes import (
    call,
    cpu_of_tree_s,
    cpu_s,
    free_port,
    machine_load,
    program,
    rss_mb,
    wait_for_port,
)

OWNERS = 50
BODY = json.dumps({"message": "What is the capital of France, and why? " * 3})
UNLIMITED = json.dumps({"free": {"message": None, "api_call": None, "tool_call": None, "agent_create": None}})


@dataclass(frozen=True, slots=True)
class Figures:
    """One measured load."""

    per_s: float
    p50_ms: float
    p99_ms: float
    ours_cpu_ms: float
    postgres_cpu_ms: float
    load: str
    statuses: dict[str, int]


def measure(
    port: int,
    heads: tuple[str, ...],
    count: int,
    clients: int,
    process: psutil.Process,
    settle: Callable[[], None],
) -> Figures:
    """Run one load and count the CPU until everything that follows from it is done."""
    before, children = cpu_s(process), cpu_of_tree_s(process)
    load = machine_load()
    result = run_apart(Job("127.0.0.1", port, heads, BODY, count, clients))
    settle()
    ours = (cpu_s(process) - before) / count * 1000
    postgres = (cpu_of_tree_s(process) - children) / count * 1000
    return Figures(
        result.per_s, result.p50_ms, result.p99_ms, round(ours, 3), round(postgres, 3), load, result.statuses
    )


def owners(base: str, count: int) -> tuple[str, ...]:
    """Agent keys of that many new users, each with a published agent."""
    keys = []
    for _ in range(count):
        email, password = f"bench-{uuid4().hex[:12]}@example.com", uuid4().hex
        registered = call(
            "POST", f"{base}/api/auth/register", {"email": email, "password": password, "name": "B"}
        )
        user_key = (
            registered["data"]["api_key"]
            if "api_key" in registered["data"]
            else _user_key(base, email, password)
        )
        user = {"Authorization": f"Bearer {user_key}"}
        agent = call("POST", f"{base}/api/agents/", {"name": "Bench"}, user)["data"]
        call("POST", f"{base}/api/agents/{agent['id']}/publish/", None, user)
        key = call("POST", f"{base}/api/agents/{agent['id']}/api-keys/", {"name": "bench"}, user)
        keys.append(key["data"]["key"])
    return tuple(keys)


def _user_key(base: str, email: str, password: str) -> str:
    from http.cookiejar import CookieJar
    from urllib.request import HTTPCookieProcessor, Request, build_opener

    jar = CookieJar()
    opener = build_opener(HTTPCookieProcessor(jar))

    def post(path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Origin": base}
        tokens = [cookie.value for cookie in jar if "csrf" in cookie.name.lower() and cookie.value]
        if tokens:
            headers["X-CSRF-Token"] = tokens[0]
        request = Request(base + path, json.dumps(body).encode(), headers, method="POST")  # noqa: S310
        return json.load(opener.open(request, timeout=30))

    post("/api/auth/login", {"email": email, "password": password})
    return str(post("/api/api-keys/", {"name": "bench"})["data"]["key"])


def settled(base: str) -> None:
    """Wait until the server has nothing left to do; a minute at most."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        checks = call("GET", f"{base}/readyz")
        if "0 events behind" in json.dumps(checks) and "0 records in work" in json.dumps(checks):
            return
        time.sleep(0.1)
    raise TimeoutError("the server is still busy a minute after the load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oshaani-bench-")))
        folder.chmod(0o755)
        model_port, floor_port, port = free_port(), free_port(), free_port()
        model = f"http://127.0.0.1:{model_port}/v1"
        arguments = ["-m", "tests.peers.fake_openai", "--port", str(model_port)]
        stack.enter_context(program(arguments, {}, folder / "model.log"))
        wait_for_port(model_port)
        floor = stack.enter_context(
            program(["-m", "benchmarks.floor", str(floor_port), model], {}, folder / "floor.log")
        )
        environment = {
            "OSHAANI_PORT": str(port),
            "OSHAANI_DATA_DIR": str(folder / "data"),
            "OPENAI_BASE_URL": model,
            "OPENAI_API_KEY": "bench",
            "FREE_CREDITS_AMOUNT": "100000000",
            "OSHAANI_PLAN_LIMITS": UNLIMITED,
            "OSHAANI_LOG_LEVEL": "warning",
        }
        product = stack.enter_context(program(["-m", "oshaani", "up"], environment, folder / "up.log"))
        wait_for_port(floor_port)
        wait_for_port(port)
        base = f"http://127.0.0.1:{port}"
        heads = tuple(
            f"POST /api/v1/chat HTTP/1.1\r\nAuthorization: ApiKey {key}" for key in owners(base, OWNERS)
        )
        floor_heads = ("POST /api/v1/chat HTTP/1.1",)
        start_mb = rss_mb(product)
        runs = (
            ("floor c=1", floor_port, floor_heads, options.turns // 5, 1, floor),
            ("turn c=1", port, heads, options.turns // 5, 1, product),
            ("floor c=32", floor_port, floor_heads, options.turns, 32, floor),
            ("turn c=32, 50 owners", port, heads, options.turns, 32, product),
            ("turn c=32, one owner", port, heads[:1], options.turns, 32, product),
        )
        for run_port, run_heads in ((floor_port, floor_heads), (port, heads)):
            run_apart(Job("127.0.0.1", run_port, run_heads, BODY, 300, 8))
        settled(base)
        for _ in range(options.rounds):
            for name, run_port, run_heads, count, clients, process in runs:
                wait = (lambda: None) if process is floor else (lambda: settled(base))
                figures = measure(run_port, run_heads, count, clients, process, wait)
                print(f"{name:24} {json.dumps(asdict(figures))}", flush=True)  # noqa: T201
                found.setdefault(name, []).append(figures)
        summary = {
            name: {
                key: round(statistics.median(getattr(figure, key) for figure in figures), 3)
                for key in ("per_s", "p50_ms", "p99_ms", "ours_cpu_ms", "postgres_cpu_ms")
            }
            for name, figures in found.items()
        }
        memory = {"start_mb": round(start_mb), "after_mb": round(rss_mb(product))}
        print(json.dumps({"medians": summary, "memory": memory, "load": machine_load()}, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
