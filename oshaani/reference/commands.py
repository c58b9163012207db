"""The page of the command line, from the command line itself."""

from __future__ import annotations

from collections.abc import Iterator

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from oshaani.cli.entry import app
from oshaani.reference.markdown import code, page, table

_INTRODUCTION = """
`oshaani COMMAND --help` says the same. With `--json` a command prints JSON for programs: one document, or one a line
where it follows something. Exit codes: 0 fine, 1 failed (one line on standard error says why and what to do), 2 wrong
usage.
"""


def commands_page() -> str:
    """The whole page."""
    whole = get_command(app)
    assert isinstance(whole, TyperGroup)
    found = list(_commands(whole, "oshaani"))
    overview = table(
        ("command", ""), [(f"[{code(name)}](#{_anchor(name)})", _first_line(each)) for name, each in found]
    )
    return page("Command line", _INTRODUCTION, overview, *(_described(name, each) for name, each in found))


def _commands(group: TyperGroup, name: str) -> Iterator[tuple[str, TyperCommand]]:
    for word, each in group.commands.items():
        if isinstance(each, TyperGroup):
            yield from _commands(each, f"{name} {word}")
        elif isinstance(each, TyperCommand):
            yield f"{name} {word}", each


def _described(name: str, command: TyperCommand) -> str:
    rows = [
        (code(_shown(parameter)), _help_of(parameter))
        for parameter in command.params
        if isinstance(parameter, TyperArgument | TyperOption)
    ]
    parameters = table(("parameter", ""), rows) if rows else ""
    return f"## {name}\n\n{command.help or ''}\n\n{parameters}"


def _shown(parameter: TyperArgument | TyperOption) -> str:
    if isinstance(parameter, TyperArgument):
        word = (parameter.metavar or parameter.name or "").upper()
        return word if parameter.required else f"[{word}]"
    names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} {(parameter.metavar or parameter.name or '').upper()}"


def _help_of(parameter: TyperArgument | TyperOption) -> str:
    said = (parameter.help or "").splitlines()
    default = parameter.default
    shown = default is not None and not callable(default) and default not in ("", False)
    return " ".join([*said, *([f"Default: `{default}`."] if shown else [])])


def _first_line(command: TyperCommand) -> str:
    return (command.help or "").strip().partition("\n")[0]


def _anchor(name: str) -> str:
    return name.replace(" ", "-")
