"""What an examination finds: one line each, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from oshaani.cli import show

Status = Literal["ok", "warn", "fail"]
_STYLES: dict[Status, str | None] = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `fix` says what to do unless all is well."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", detail)


def warn(name: str, detail: str, fix: str) -> Finding:
    """It works, but."""
    return Finding(name, "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(name, "fail", detail, fix)


async def looked_at(name: str, look: Callable[[], Awaitable[Iterable[Finding]]]) -> Sequence[Finding]:
    """What a look found; one that fails is a finding itself, and the examination goes on."""
    try:
        return list(await look())
    except Exception as failure:
        return [fail(name, f"could not be examined: {failure!r}", "see the log of the server")]


def print_findings(found: Sequence[Finding]) -> None:
    """One line for each, and the fix below what is not well."""
    width = max((len(each.name) for each in found), default=0)
    console = show.console()
    for each in found:
        console.print(f"{each.status:<5}", style=_STYLES[each.status], end="")
        console.print(f"{each.name:<{width}}  {show.plain(each.detail)}")
        if each.fix:
            console.print(f"{'':<{width + 5}}  → {show.plain(each.fix)}")
