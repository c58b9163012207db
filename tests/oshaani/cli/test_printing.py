from __future__ import annotations

import logging

import pytest

from oshaani.cli import show
from oshaani.cli.logs import OneLine
from oshaani.cli.trouble import Failed, in_one_line


def test_texts_from_outside_cannot_move_the_cursor_or_turn_the_writing_round() -> None:
    assert show.plain("red \x1b[31m and \u202eback\r\nnew line\x07") == "red [31m and back new line"


def test_texts_are_cut_where_asked() -> None:
    assert show.plain("abcdef", 4) == "abc…"
    assert show.plain("abcd", 4) == "abcd"


def test_brackets_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(("name",), [("[bold]x[/bold]",)])
    assert "[bold]x[/bold]" in capsys.readouterr().out


def test_a_log_record_is_one_line_whatever_it_says() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as failure:
        info = (type(failure), failure, failure.__traceback__)
    record = logging.LogRecord("oshaani.x", logging.ERROR, "x.py", 1, "a\nb", None, info)
    line = OneLine().format(record)
    assert "\n" not in line
    assert "oshaani.x: a | b | Traceback" in line
    assert line.endswith("ValueError: first | second")


def test_only_expected_trouble_is_said_in_one_line() -> None:
    assert in_one_line(Failed("no such\nthing")) == "no such thing"
    assert in_one_line(KeyError("x")) is None
