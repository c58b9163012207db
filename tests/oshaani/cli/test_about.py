from __future__ import annotations

import json

from oshaani import __version__
from tests.oshaani.cli.conftest import Cli


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("version").out == f"oshaani {__version__}\n"


def test_the_version_as_json_is_one_document(cli: Cli) -> None:
    assert cli("version", "--json").json["version"] == __version__


def test_settings_show_where_each_value_comes_from_and_hide_secrets(cli: Cli) -> None:
    ran = cli("settings", OPENAI_API_KEY="sk-very-secret", OSHAANI_PORT="8099")
    line = next(line for line in ran.out.splitlines() if line.startswith("OSHAANI_PORT"))
    assert line.split()[1:3] == ["8099", "environment"]
    assert "sk-very-secret" not in ran.out
    assert "********" in ran.out


def test_settings_as_json_name_every_setting(cli: Cli) -> None:
    found = {line["name"]: line for line in cli("settings", "--json").json}
    assert found["OSHAANI_PORT"] == {
        "name": "OSHAANI_PORT",
        "value": "8080",
        "source": "default",
        "description": "Port the API listens on.",
    }
    assert found["DATABASE_URL"]["value"] is None


def test_settings_stand_whole_on_their_lines_when_piped(cli: Cli) -> None:
    ran = cli("settings")
    assert "\x1b" not in ran.out
    assert len(ran.out.splitlines()) == len(cli("settings", "--json").json) + 1


def test_a_wrong_setting_is_said_in_one_line(cli: Cli) -> None:
    ran = cli("settings", OSHAANI_PORT="eighty")
    assert ran.code == 1
    assert "OSHAANI_PORT 'eighty'" in ran.err
    assert "Traceback" not in ran.err


def test_a_wrong_option_is_wrong_usage(cli: Cli) -> None:
    assert cli("version", "--nope").code == 2
    assert cli("nope").code == 2
    assert cli("events", "tail", "-n", "-1").code == 2


def test_without_a_command_the_commands_are_listed(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    for command in ("up", "quickstart", "doctor", "events", "turn", "audit"):
        assert f"  {command} " in ran.out


def test_json_of_a_failure_is_not_half_a_document(cli: Cli) -> None:
    ran = cli("events", "tail", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1


def test_colours_need_a_terminal(cli: Cli) -> None:
    assert "\x1b" not in cli("doctor").out
    assert json.loads(cli("doctor", "--json").out)["findings"]
