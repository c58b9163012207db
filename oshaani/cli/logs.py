"""Logs on standard error: one line for each record, ours at the level asked for, libraries only when something is wrong."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

OURS = (
    "adapters",
    "api",
    "commands",
    "domain",
    "oshaani",
    "projections",
    "schemas",
    "stream_processors",
)
LINE_BREAK = " | "


class OneLine(logging.Formatter):
    """Time in UTC, level, logger, message; a traceback follows on the same line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - its name
        at = datetime.fromtimestamp(record.created, UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return LINE_BREAK.join(line.strip() for line in lines if line.strip())


def set_up(level: str) -> None:
    """Log to standard error from here on; a second call changes the level."""
    number = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.setLevel(max(number, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(number)
    if not any(isinstance(handler.formatter, OneLine) for handler in root.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine())
        root.addHandler(handler)
