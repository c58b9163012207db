"""A closed-loop HTTP client that costs little itself: C connections, each sends the next request when it has its answer.

Run as a program it reads one JSON job from standard input and prints one JSON result, so that its CPU is not ours.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, cast

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Job:
    """`request_count` requests over `clients` connections; request n is `heads[n % len(heads)]` with `body`."""

    host: str
    port: int
    heads: tuple[str, ...]
    body: str
    request_count: int
    clients: int


@dataclass(frozen=True, slots=True)
class Result:
    """Latencies in milliseconds, throughput per second, answers by status."""

    per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    statuses: dict[str, int]
    client_cpu_s: float


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._buffer = b""
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.WriteTransport, but they write.
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed by the server"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        length = int(head[head.index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
        if len(self._buffer) >= end + 4 + length:
            self._buffer = b""
            assert self._answer is not None
            self._answer.set_result(int(head[9:12]))

    def post(self, request: bytes) -> asyncio.Future[int]:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer


async def run(job: Job) -> Result:
    """Send everything; returns when the last answer is there."""
    requests = cycle([_request(job, head) for head in job.heads])
    left, latencies, statuses = job.request_count, [], {}
    loop = asyncio.get_running_loop()

    async def client() -> None:
        nonlocal left
        _, connection = await loop.create_connection(_Connection, job.host, job.port)
        while left > 0:
            left -= 1
            began = time.perf_counter()
            status = str(await connection.post(next(requests)))
            latencies.append((time.perf_counter() - began) * 1000)
            statuses[status] = statuses.get(status, 0) + 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(job.clients)))
    seconds = time.perf_counter() - began
    latencies.sort()
    p50, p95, p99 = (round(latencies[int(q * (len(latencies) - 1))], 2) for q in (0.5, 0.95, 0.99))
    longest, cpu_s = round(latencies[-1], 2), round(time.process_time(), 2)
    return Result(round(len(latencies) / seconds, 1), p50, p95, p99, longest, statuses, cpu_s)


def run_apart(job: Job) -> Result:
    """`run` in a process of its own."""
    with Popen([sys.executable, "-m", "benchmarks.load"], cwd=ROOT, stdin=PIPE, stdout=PIPE) as process:
        output, _ = process.communicate(json.dumps(asdict(job)).encode(), timeout=600)
    if process.returncode:
        raise RuntimeError(f"the load client ended with {process.returncode}")
    return Result(**json.loads(output))


def _request(job: Job, head: str) -> bytes:
    body = job.body.encode()
    lines = (head, f"Host: {job.host}", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def main() -> None:
    found: dict[str, Any] = json.load(sys.stdin)
    import uvloop

    result = uvloop.run(run(Job(**{**found, "heads": tuple(found["heads"])})))
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
