"""Pages whose shell blocks are run for real: what stands below a block is what it printed.

python -m tests.docs.shell_page      writes the outputs of the tutorial anew
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
START_S, RUN_S, STOP_S = 30.0, 90.0, 15.0
MARK = "--8<--"

_BLOCK = re.compile(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
# What differs from run to run, and what stands in its place when two outputs are compared.
_VARIES = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "UUID"),
    (re.compile(r"http://[\w.]+:\d+"), "BASE"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?"), "INSTANT"),
    (re.compile(r"\b[0-9a-f]{12,32}\b"), "HEX"),
    (re.compile(r"\+?\d+\.\d+ s\b"), "SECONDS"),
    (re.compile(r"\d+ ms\b"), "MS"),
    (re.compile(r"(agent|user)_key:\w+"), "KEY"),
    (re.compile(r"\(worker [^)]*\)"), "(worker)"),
    (re.compile(r"[ \t]+"), " "),
)


@dataclass(frozen=True, slots=True)
class Block:
    """Commands, and what the page says they print."""

    commands: str
    shown: str


def blocks_of(page: str) -> list[Block]:
    """The blocks that are run, in order; other fences (console) are for people only."""
    return [Block(match[1], match[2] or "") for match in _BLOCK.finditer(page)]


def steady(output: str) -> str:
    """An output without what differs from run to run."""
    for pattern, word in _VARIES:
        output = pattern.sub(word, output)
    return output.strip()


def run(blocks: list[Block], environment: Mapping[str, str], folder: Path) -> list[str]:
    """What the blocks print, run one after another by one shell.

    Raises:
        AssertionError: a block failed.
    """
    script = "set -eo pipefail\n" + "".join(
        f"{block.commands}\nprintf '%s\\n' '{MARK}'\n" for block in blocks
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**environment},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    outputs = done.stdout.split(f"{MARK}\n")
    failed = blocks[len(outputs) - 1].commands if len(outputs) <= len(blocks) else ""
    if done.returncode:
        files = [f"{file.name}: {file.read_text()}" for file in sorted(folder.glob("*.*"))]
        raise AssertionError("\n".join(("this failed:", failed, outputs[-1], done.stderr, *files)))
    return outputs[:-1]


def with_outputs(page: str, outputs: list[str]) -> str:
    """The page with these outputs below its blocks."""
    rest = iter(outputs)

    def shown(match: re.Match[str]) -> str:
        output = next(rest).strip("\n")
        return f"```sh\n{match[1]}```\n" + (f"\n```text\n{output}\n```\n" if output.strip() else "")

    return _BLOCK.sub(shown, page)


@contextmanager
def server(folder: Path, given: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A server as `oshaani up` runs it, while the block runs; gives the environment of a shell beside it."""
    port = given.get("OSHAANI_PORT") or str(_free_port())
    command = folder / "bin" / "oshaani"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m oshaani "$@"\n')
    command.chmod(0o755)
    environment = {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OSHAANI_PORT": port,
        "OSHAANI_BASE_URL": f"http://127.0.0.1:{port}",
        "OLLAMA_HOST": "http://127.0.0.1:9",  # the discard port: no model but the built-in one
        "AWS_EC2_METADATA_DISABLED": "true",
        **given,
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([command, "up"], cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_ready(environment["OSHAANI_BASE_URL"], process, folder / "server.log")
            yield environment
        finally:
            process.terminate()
            process.wait(STOP_S)


def _wait_until_ready(base_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{base_url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    page = TUTORIAL.read_text("utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # as root, Postgres runs under a user of its own
        given = {"OSHAANI_DATA_DIR": str(folder / "data"), "OSHAANI_PORT": "8080"}
        with server(folder, given) as environment:
            outputs = run(blocks_of(page), environment, folder)
    TUTORIAL.write_text(with_outputs(page, outputs), "utf-8")


if __name__ == "__main__":
    main()
