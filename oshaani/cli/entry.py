"""From the process to a command and back: arguments in, exit code out, and what is said when it fails."""

from __future__ import annotations

import logging
import sys

import typer

from oshaani.cli import (
    about,
    audit,
    doctor,
    events,
    parked,
    people,
    quickstart,
    read_models,
    roles,
    serve,
    topics,
    turns,
)
from oshaani.cli.trouble import in_one_line

log_of = logging.getLogger(__name__)

app = typer.Typer(
    name="oshaani",
    help="AI agents on an event log.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for family in (
    serve,
    roles,
    quickstart,
    people,
    about,
    doctor,
    events,
    turns,
    read_models,
    parked,
    topics,
    audit,
):
    app.add_typer(family.app)


def main() -> None:
    """Run the command that the process was started with; ends the process."""
    try:
        app()
    except Exception as failure:
        sentence = in_one_line(failure)
        if sentence is None:
            log_of.critical("unexpected: %r", failure, exc_info=failure)
            sentence = (
                f"this should not have happened: {failure!r}; the log above says where, please report it"
            )
        sys.stderr.write(f"oshaani: {sentence}\n")
        sys.exit(1)
