"""The page of settings, from the table that reads them."""

from __future__ import annotations

from oshaani.reference.markdown import code, page, table
from oshaani.settings import TABLE, Setting

_INTRODUCTION = """
The environment first, then the file `oshaani.toml` (in the folder the program is started in, or named by
`OSHAANI_CONFIG`), then the defaults. The file's keys are the variables' names: `OSHAANI_PORT = 8080`. All are read once,
at the start, and all faults are reported together, each with its fix. `oshaani settings` shows what is in force and
where each value came from, secrets masked.
"""


def settings_page() -> str:
    """The whole page."""
    rows = [_row(setting) for setting in TABLE]
    return page(
        "Settings", _INTRODUCTION, table(("setting", "default", "what for", "form, for example"), rows)
    )


def _row(setting: Setting) -> tuple[str, str, str, str]:
    names = " or ".join(code(name) for name in setting.names)
    description = setting.description + (" Secret." if setting.is_secret else "")
    form = f"{setting.shape.text}: {code(setting.shape.example)}"
    return names, code(setting.default or "") or "–", description, form
