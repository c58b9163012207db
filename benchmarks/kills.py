"""How long a turn takes when the process that runs it is killed, under load and supervised.

    python -m benchmarks.kills [--kills K] [--clients C]

Kills the turns worker of the distributed layout with SIGKILL while C clients talk, once in each round; prints the longest
turn of each round, and beside it that of a round without a kill. Every accepted turn is checked to be settled.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.load import Job, Result, run_apart
from benchmarks.processes import machine_load
from benchmarks.turns import BODY, Product, product, settled

SLOT = "agent_turns-1"
UNDER_WAY_S = 0.5


def round_of(ours: Product, count: int, clients: int, kill: bool) -> Result:
    """One load, with a death in its midst or without."""
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(run_apart, Job("127.0.0.1", ours.port, ours.heads, BODY, count, clients))
        time.sleep(UNDER_WAY_S)
        if kill:
            os.kill(pid_of(ours.folder), signal.SIGKILL)
        result = load.result()
    settled(ours.database)
    return result


def pid_of(folder: Path) -> int:
    return int((folder / "data" / "run" / f"{SLOT}.pid").read_text().split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--turns", type=int, default=400, help="of each round")
    options = parser.parse_args()
    with product(kafka=True) as ours:
        round_of(ours, options.turns, options.clients, kill=False)
        undisturbed = round_of(ours, options.turns, options.clients, kill=False)
        longest_s, statuses = [], {}
        for _ in range(options.kills):
            result = round_of(ours, options.turns, options.clients, kill=True)
            longest_s.append(round(result.max_ms / 1000, 2))
            for status, count in result.statuses.items():
                statuses[status] = statuses.get(status, 0) + count
        figures = {
            "longest_s": longest_s,
            "median_s": statistics.median(longest_s),
            "undisturbed_s": round(undisturbed.max_ms / 1000, 2),
            "statuses": statuses,
            "load": machine_load(),
        }
        print(json.dumps(figures, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
