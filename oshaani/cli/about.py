"""`oshaani version`, `settings` and `master-key`: what this is, and how it is set up."""

from __future__ import annotations

import platform
import sys

import typer

from oshaani import __version__
from oshaani.cli import master_key, show
from oshaani.cli.session import quiet_settings
from oshaani.cli.show import AsJson
from oshaani.settings import UNSET, describe

app = typer.Typer()
app.add_typer(master_key.app, name="master-key")


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version of this program."""
    if as_json:
        python = platform.python_version()
        show.document({"version": __version__, "python": python, "platform": sys.platform})
    else:
        show.line(f"oshaani {__version__}")


@app.command()
def settings(as_json: AsJson = False) -> None:
    """Print every setting, where its value comes from, and what it is for; secrets are masked."""
    lines = describe(quiet_settings())
    if as_json:
        show.document(
            [
                {
                    "name": line.name,
                    "value": line.value_masked if line.source != UNSET or line.value_masked else None,
                    "source": line.source,
                    "description": line.description,
                }
                for line in lines
            ]
        )
    else:
        rows = [(line.name, line.value_masked or "-", line.source, line.description) for line in lines]
        show.table(("setting", "value", "from", "what for"), rows)
