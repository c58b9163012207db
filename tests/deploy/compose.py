"""docker-compose.yml as Compose would see it: variables filled in, merged, checked against the specification."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
EXAMPLE = ROOT / ".env.example"
OUR_IMAGE = "${OSHAANI_IMAGE:-oshaani:local}"
# What a user fills in.
FILLED_IN = {"POSTGRES_PASSWORD": "c2VjcmV0", "OSHAANI_METRICS_TOKEN": "b3BlbiBzZXNhbWU"}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Missing(Exception):
    """A variable that must be set is not; the message is the file's own."""


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """`text` with `${NAME}`, `${NAME:-default}` and `${NAME:?sentence}` filled in, also one inside another.

    Raises:
        Missing: a variable without a default is empty.
        ValueError: anything else that begins with a dollar sign and is not `$$`.
    """
    found, at = [], 0
    while (dollar := text.find("$", at)) >= 0:
        found.append(text[at:dollar])
        if text[dollar + 1 : dollar + 2] == "$":
            found.append("$")
            at = dollar + 2
            continue
        if text[dollar + 1 : dollar + 2] != "{":
            raise ValueError(f"a dollar sign that means nothing: {text[dollar : dollar + 20]!r}")
        end = _closing(text, dollar + 2)
        found.append(_value(text[dollar + 2 : end], variables))
        at = end + 1
    return "".join([*found, text[at:]])


def _closing(text: str, at: int) -> int:
    depth = 1
    while depth:
        if text.startswith("${", at):
            depth, at = depth + 1, at + 2
        else:
            depth, at = depth - (text[at] == "}"), at + 1
    return at - 1


def _value(expression: str, variables: Mapping[str, str]) -> str:
    match = _NAME.match(expression)
    assert match is not None, expression
    name, rest = match[0], expression[match.end() :]
    if value := variables.get(name, ""):
        return value
    if rest.startswith(":-"):
        return interpolated(rest[2:], variables)
    if rest.startswith(":?"):
        raise Missing(f"{name}: {rest[2:]}")
    assert not rest, expression
    return ""


def variables_of(text: str) -> dict[str, str]:
    """What a .env file sets."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def filled_in() -> dict[str, str]:
    """The variables of a user who followed .env.example."""
    return variables_of(EXAMPLE.read_text("utf-8")) | FILLED_IN


def raw() -> dict[str, Any]:
    """The file with its anchors merged and its variables as they are written."""
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
    return loaded


def project(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The whole file, filled in."""
    filled: dict[str, Any] = _filled(raw(), filled_in() if variables is None else variables)
    return filled


def services() -> dict[str, Any]:
    """The services, filled in."""
    found: dict[str, Any] = project()["services"]
    return found


def ours() -> dict[str, Any]:
    """The services that run the program."""
    names = {name for name, service in raw()["services"].items() if service["image"] == OUR_IMAGE}
    return {name: service for name, service in services().items() if name in names and name != "master-key"}


def workers() -> dict[str, Any]:
    """Those of them that keep running."""
    return {name: service for name, service in ours().items() if service["restart"] != "no"}


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return interpolated(value, variables)
    if isinstance(value, dict):
        return {key: _filled(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, variables) for each in value]
    return value
