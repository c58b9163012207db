"""How results reach people and programs: tables for the ones, JSON for the others."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


def console() -> Console:
    """Standard output: no markup, no guessing; colours only on a terminal and without NO_COLOR."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def line(text: str = "", style: str | None = None) -> None:
    """One line for people."""
    console().print(text, style=style)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows for people; a column whose name ends in `>` is set to the right. Piped, a row is a line, however long."""
    kept = [[plain(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_lines(columns, kept)
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.endswith(">") else "left"
        shown.add_column(column.rstrip(">"), justify=justify, overflow="fold")
    for row in kept:
        shown.add_row(*row)
    console().print(shown)


def _print_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    whole = [[column.rstrip(">") for column in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*whole, strict=True)]
    for row in whole:
        cells = [
            cell.rjust(width) if column.endswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def instant(at: datetime | None) -> str:
    """An instant for people, in UTC to the second; empty for none."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if at else ""


def document(value: Any) -> None:
    """One JSON document on one line, or indented on a terminal."""
    indent = orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0
    _write(orjson.dumps(value, str, indent | orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z))


def json_line(value: Any) -> None:
    """One of many JSON documents, each on its line, at once."""
    _write(orjson.dumps(value, str, orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z))


def plain(text: str, chars_max: int | None = None) -> str:
    """A text from outside on one line, without what would move the cursor or colour the screen."""
    kept = "".join(char if unicodedata.category(char) not in _UNSEEN else " " for char in text)
    kept = " ".join(kept.split())
    return kept if chars_max is None or len(kept) <= chars_max else f"{kept[: chars_max - 1]}…"


def tamed(text: str, keep_indent: bool = False) -> str:
    """A text from outside with its lines, without what would move the cursor or colour the screen."""
    lines = text.splitlines()
    indents = [len(each) - len(each.lstrip(" ")) if keep_indent else 0 for each in lines]
    return "\n".join(" " * indent + plain(each) for indent, each in zip(indents, lines, strict=True))


# Controls, surrogates, and the characters that change the direction of writing; joiners (Cf) of emoji are replaced too.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _write(encoded: bytes) -> None:
    sys.stdout.write(encoded.decode() + "\n")
    sys.stdout.flush()
