"""The Dockerfile, read far enough to see what each of its steps does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "Dockerfile"


@dataclass(frozen=True)
class Step:
    """One instruction; `stage` is the name of its stage, "" for the last one."""

    stage: str
    instruction: str
    arguments: str


def steps() -> list[Step]:
    """Every instruction in order, lines that go on joined, build arguments filled in."""
    text = re.sub(r"\\\n\s*", " ", FILE.read_text("utf-8"))
    found: list[Step] = []
    stage, given = "", {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        instruction, _, arguments = line.partition(" ")
        for name, value in given.items():
            arguments = arguments.replace(f"${{{name}}}", value)
        if instruction == "ARG":
            name, _, value = arguments.partition("=")
            given[name] = value
        if instruction == "FROM":
            stage = arguments.partition(" AS ")[2]
        found.append(Step(stage, instruction, arguments.strip()))
    return found


def of(instruction: str, stage: str | None = None) -> list[str]:
    """The arguments of each instruction of a kind."""
    return [
        step.arguments
        for step in steps()
        if step.instruction == instruction and (stage is None or step.stage == stage)
    ]


def settings_of_the_image() -> dict[str, str]:
    """The environment that the image gives its processes."""
    pairs = (pair.partition("=") for arguments in of("ENV", "") for pair in shlex.split(arguments))
    return {name: value for name, _, value in pairs}


def ignored_but(patterns: str) -> Iterator[str]:
    """What .dockerignore, which ignores everything first, lets in."""
    lines = [line for line in patterns.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is ignored first"
    yield from (line[1:] for line in lines if line.startswith("!"))
