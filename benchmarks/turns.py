"""A whole turn over HTTP against a model that answers at once, beside a floor that keeps nothing and a plain peer.

    python -m benchmarks.turns [--turns N] [--rounds R] [--kafka]

Prints p50 at one client, turns per second at 32 clients spread over 50 owners and on one, CPU per turn of ours, and
memory; medians over the rounds, floor, peer and product alternating. Every accepted turn is checked to be settled. With
--kafka the product is the distributed layout, one process a role.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg

from adapters.postgres.embedded import running_dsn
from benchmarks.load import Job, run_apart
from benchmarks.processes import (
    call,
    cpu_by_program,
    free_port,
    machine_load,
    program,
    rss_of_ours_mb,
    wait_for_port,
    wait_until_ready,
)

OWNERS = 50
_LEFT = """
    SELECT (SELECT count(*) FROM due), (SELECT count(*) FROM credit_hold),
           (SELECT max((SELECT sum(s.head - c.positions[s.shard + 1]) FROM shard s)) FROM checkpoint c)
"""
BODY = json.dumps({"message": "What is the capital of France, and why? " * 3})
UNLIMITED = json.dumps({"free": {"message": None, "api_call": None, "tool_call": None, "agent_create": None}})


@dataclass(frozen=True, slots=True)
class Figures:
    """One measured load. CPU is in milliseconds per turn."""

    per_s: float
    p50_ms: float
    p99_ms: float
    ours_cpu_ms: float
    postgres_cpu_ms: float
    kafka_cpu_ms: float
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
    before, load = cpu_by_program(process), machine_load()
    result = run_apart(Job("127.0.0.1", port, heads, BODY, count, clients))
    settle()
    cpu_ms = [
        round((after - used) / count * 1000, 3)
        for after, used in zip(cpu_by_program(process), before, strict=True)
    ]
    return Figures(result.per_s, result.p50_ms, result.p99_ms, *cpu_ms, load, result.statuses)


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


def settled(database: str) -> None:
    """Wait until nothing is left to do: no step due, nothing held, no event that a read model lacks; a minute at most."""
    until = time.monotonic() + 60
    with psycopg.connect(database, autocommit=True, options="-c search_path=oshaani") as connection:
        while time.monotonic() < until:
            row = connection.execute(_LEFT).fetchone()
            if row is not None and not any(row):
                return
            time.sleep(0.1)
    raise TimeoutError(f"the product is still busy a minute after the load: due, held, behind = {row}")


@dataclass(frozen=True, slots=True)
class Product:
    """A running product with a model that answers at once, and owners with keys."""

    process: psutil.Process
    port: int
    model: str
    heads: tuple[str, ...]
    database: str
    folder: Path


@contextmanager
def product(kafka: bool) -> Iterator[Product]:
    """The product while the block runs, in one process or around Kafka."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oshaani-bench-")))
        folder.chmod(0o755)
        model_port, port = free_port(), free_port()
        model = f"http://127.0.0.1:{model_port}/v1"
        arguments = ["-m", "tests.peers.fake_openai", "--port", str(model_port)]
        stack.enter_context(program(arguments, {}, folder / "model.log"))
        wait_for_port(model_port)
        environment = {
            "OSHAANI_PORT": str(port),
            "OSHAANI_DATA_DIR": str(folder / "data"),
            "OPENAI_BASE_URL": model,
            "OPENAI_API_KEY": "bench",
            "FREE_CREDITS_AMOUNT": "100000000",
            "OSHAANI_PLAN_LIMITS": UNLIMITED,
            "OSHAANI_LOG_LEVEL": "warning",
        }
        arguments = ["-m", "oshaani", "up", *(["--kafka"] if kafka else [])]
        process = stack.enter_context(program(arguments, environment, folder / "up.log"))
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base)
        database = running_dsn(folder / "data")
        assert database is not None, "the product runs its own Postgres"
        heads = tuple(
            f"POST /api/v1/chat HTTP/1.1\r\nAuthorization: ApiKey {key}" for key in owners(base, OWNERS)
        )
        yield Product(process, port, model, heads, database, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kafka", action="store_true", help="the distributed layout")
    options = parser.parse_args()
    found: dict[str, list[Figures]] = {}
    with product(options.kafka) as ours, ExitStack() as stack:
        floor_port, plain_port, port, heads = free_port(), free_port(), ours.port, ours.heads
        floor = stack.enter_context(
            program(["-m", "benchmarks.floor", str(floor_port), ours.model], {}, ours.folder / "floor.log")
        )
        arguments = ["-m", "benchmarks.plain", str(plain_port), ours.model, ours.database]
        plain = stack.enter_context(program(arguments, {}, ours.folder / "plain.log"))
        wait_for_port(floor_port)
        wait_for_port(plain_port)
        floor_heads = ("POST /api/v1/chat HTTP/1.1",)
        start_mb = rss_of_ours_mb(ours.process)
        few = options.turns // 5
        runs = (
            ("floor c=1", floor_port, floor_heads, few, 1, floor),
            ("plain c=1", plain_port, heads[:1], few, 1, plain),
            ("turn c=1", port, heads, few, 1, ours.process),
            ("floor c=32", floor_port, floor_heads, options.turns, 32, floor),
            ("plain c=32, 50 owners", plain_port, heads, options.turns, 32, plain),
            ("turn c=32, 50 owners", port, heads, options.turns, 32, ours.process),
            ("plain c=32, one owner", plain_port, heads[:1], options.turns, 32, plain),
            ("turn c=32, one owner", port, heads[:1], options.turns, 32, ours.process),
        )
        for run_port, run_heads in ((floor_port, floor_heads), (plain_port, heads), (port, heads)):
            run_apart(Job("127.0.0.1", run_port, run_heads, BODY, 300, 8))
        settled(ours.database)
        for _ in range(options.rounds):
            for name, run_port, run_heads, count, clients, process in runs:
                wait = (lambda: settled(ours.database)) if process is ours.process else (lambda: None)
                figures = measure(run_port, run_heads, count, clients, process, wait)
                print(f"{name:24} {json.dumps(asdict(figures))}", flush=True)  # noqa: T201
                found.setdefault(name, []).append(figures)
        summary = {
            name: {
                key: round(statistics.median(getattr(figure, key) for figure in figures), 3)
                for key in ("per_s", "p50_ms", "p99_ms", "ours_cpu_ms", "postgres_cpu_ms", "kafka_cpu_ms")
            }
            for name, figures in found.items()
        }
        memory = {"start_mb": round(start_mb), "after_mb": round(rss_of_ours_mb(ours.process))}
        print(json.dumps({"medians": summary, "memory": memory, "load": machine_load()}, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
