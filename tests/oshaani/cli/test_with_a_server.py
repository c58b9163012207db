"""What operators see of a running server: the whole way from `quickstart` to the proof of its credits."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from domain.ports import ModelCard
from oshaani.cli.serve import is_given_away
from tests.oshaani.cli.conftest import ROOT, Cli, Up, free_port, wait_until

STARTED = ("base_url", "email", "password", "user_api_key", "agent_id", "agent_api_key", "conversation_id")
ANSWERED = ("message", "response", "model", "charged_credits", "balance_credits")
DRAWN = '[[tool svg_diagram {"nodes": [{"id": "log", "label": "Log"}]}]]'
NOT_DRAWN = '[[tool svg_diagram {"title": "Nothing"}]]'


@pytest.fixture
def started(on_server: Cli) -> dict[str, Any]:
    """A user of the test's own with an agent that has answered once."""
    found: dict[str, Any] = on_server("quickstart", "--json").json
    return found


def asked(started: dict[str, Any], message: str, path: str = "/api/v1/chat") -> dict[str, Any]:
    """What the agent answers, whatever the status."""
    request = urllib.request.Request(
        started["base_url"] + path,
        json.dumps({"message": message}).encode(),
        {"Authorization": f"ApiKey {started['agent_api_key']}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as failed:
        found = json.load(failed)
        failed.close()
    return found


def settled_story(on_server: Cli, request_id: str, *options: str) -> dict[str, Any]:
    """A turn's story once its charge is in it."""
    found: dict[str, Any] = {}

    def is_settled() -> bool:
        found.update(on_server("turn", "show", request_id, "--json", *options).json)
        return found["credits"]["end"] is not None

    wait_until(is_settled, 10)
    return found


# --- up -------------------------------------------------------------------------------------------------------------


def test_starting_says_where_what_and_what_next(server: Up) -> None:
    banner = server.output
    assert f"is ready at {server.base_url}" in banner
    assert server.environment["OSHAANI_DATA_DIR"] in banner
    assert "model  openai:" in banner
    assert f"quickstart --url {server.base_url}" in banner


def test_free_calls_to_a_model_that_costs_money_are_warned_of() -> None:
    card = ModelCard("openai:gpt", "openai", "GPT", True, False, None, "paid")
    assert is_given_away(card)
    assert not is_given_away(replace(card, price_class="local"))


def test_a_taken_port_is_said_in_one_line(on_server: Cli, server: Up) -> None:
    ran = on_server("up")
    assert ran.code == 1
    assert ran.err == (
        f"oshaani: cannot listen on 127.0.0.1:{server.environment['OSHAANI_PORT']} (Address already in use); "
        "stop what uses it or set OSHAANI_PORT to another port\n"
    )


# --- quickstart -----------------------------------------------------------------------------------------------------


def test_quickstart_as_json_is_one_object_with_everything_made(started: dict[str, Any], server: Up) -> None:
    assert [name for name in (*STARTED, *ANSWERED) if not started[name]] == []
    assert started["base_url"] == server.base_url
    assert isinstance(started["agent_id"], int)
    assert (started["charged_credits"], started["balance_credits"]) == ("1.50", "198.50")
    assert started["model"].startswith("openai:")


def test_a_second_quickstart_makes_a_second_user(on_server: Cli, started: dict[str, Any]) -> None:
    again = on_server("quickstart", "--json").json
    assert again["email"] != started["email"]
    assert again["agent_id"] != started["agent_id"]


def test_quickstart_prints_a_command_that_works_when_pasted(on_server: Cli) -> None:
    ran = on_server("quickstart")
    (line,) = [line for line in ran.out.splitlines() if line.startswith("curl ")]
    words = shlex.split(line)
    headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    request = urllib.request.Request(words[2], words[words.index("-d") + 1].encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["response"]


def test_quickstart_without_a_server_says_how_to_start_one(cli: Cli) -> None:
    ran = cli("quickstart", "--json", "--url", f"http://127.0.0.1:{free_port()}")
    assert (ran.code, ran.out) == (1, "")
    assert "no server answers at" in ran.err
    assert "oshaani up" in ran.err
    assert ran.err.count("\n") == 1


def test_quickstart_with_a_taken_address_says_so(on_server: Cli, started: dict[str, Any]) -> None:
    ran = on_server("quickstart", "--email", started["email"])
    assert ran.code == 1
    assert "There is already an account" in ran.err


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_a_running_server_well(on_server: Cli, started: dict[str, Any]) -> None:
    ran = on_server("doctor", "--json", OPENAI_BASE_URL="", OPENAI_API_KEY="")
    found = {each["name"]: each["status"] for each in ran.json["findings"]}
    for name in ("python", "settings", "database", "clock", "log", "workers", "due work", "server", "egress"):
        assert found[name] == "ok", ran.json
    assert ran.code == 0


def test_the_doctor_warns_of_openings_and_of_free_calls(on_server: Cli, server: Up) -> None:
    ran = on_server("doctor", OSHAANI_EGRESS_ALLOW="10.0.0.0/8", OSHAANI_DEFAULT_MODEL="openai:gone")
    assert ran.code == 1
    assert "agents also reach networks 10.0.0.0/8" in ran.out
    assert "openai:gone (OSHAANI_DEFAULT_MODEL) is not offered by its provider" in ran.out
    assert "cost 0 credits while openai:gone costs money" in ran.out


def test_the_doctor_finds_a_master_key_that_is_not_the_one_in_use(
    on_server: Cli, started: dict[str, Any]
) -> None:
    other = base64.b64encode(bytes(32)).decode()
    ran = on_server("doctor", OSHAANI_MASTER_KEY=other)
    assert ran.code == 1
    assert "are wrapped by another master key" in ran.out
    ran = on_server("events", "tail", "--personal", OSHAANI_MASTER_KEY=other)
    assert ran.err.startswith("oshaani: what is stored was sealed under another master key")


def test_the_doctor_names_a_foreign_server_on_our_port(on_server: Cli, server: Up, model_url: str) -> None:
    port = model_url.rstrip("/").rpartition(":")[2].partition("/")[0]
    ran = on_server("doctor", OSHAANI_PORT=port)
    assert ran.code == 1
    assert "something else answers at" in ran.out


def test_the_doctor_fails_when_a_configured_model_is_silent(on_server: Cli) -> None:
    ran = on_server("doctor", OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}")
    assert ran.code == 1
    assert "does not answer, or refuses the key" in ran.out


# --- the log --------------------------------------------------------------------------------------------------------


def test_events_of_a_turn_are_found_in_every_stream(on_server: Cli, started: dict[str, Any]) -> None:
    settled_story(on_server, started["request_id"])
    ran = on_server("events", "tail", "--turn", started["request_id"], "-n", "100", "--json")
    types = [json.loads(line)["type"] for line in ran.out.splitlines()]
    for type in ("Conversation.MessageSent", "CreditAccount.CreditsHeld", "Turn.Accepted", "Turn.Completed"):
        assert type in types
    assert types[-1] == "CreditAccount.CreditsSettled"
    assert started["message"] not in ran.out


def test_events_are_filtered_by_type(on_server: Cli, started: dict[str, Any]) -> None:
    ran = on_server("events", "tail", "--type", "Turn.Comp*", "--json")
    assert {json.loads(line)["type"] for line in ran.out.splitlines()} == {"Turn.Completed"}


def test_an_event_is_shown_by_its_place_and_by_its_id(on_server: Cli, started: dict[str, Any]) -> None:
    last = json.loads(on_server("events", "tail", "-n", "1", "--json").out)
    by_place = on_server("events", "show", f"{last['shard']}:{last['position']}", "--json").json
    by_id = on_server("events", "show", last["event_id"], "--json").json
    assert by_place == by_id == last
    assert last["event_id"] in on_server("events", "show", last["event_id"]).out


def test_a_stream_is_shown_from_its_beginning(on_server: Cli, started: dict[str, Any]) -> None:
    found = on_server("events", "show", started["request_id"], "--json").json
    assert [each["stream_version"] for each in found] == list(range(1, len(found) + 1))
    assert found[0]["type"] == "Turn.Accepted"


def hear_ctrl_c() -> None:
    """As at a terminal: what a script starts in the background ignores it, and so does whatever that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_following_the_log_shows_what_comes_and_ends_well(
    server: Up, started: dict[str, Any], tmp_path: Path
) -> None:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("OPENAI", "OSHAANI"))
    }
    log = tmp_path / "followed"
    with log.open("w") as output:
        following = subprocess.Popen(
            [sys.executable, "-m", "oshaani", "events", "tail", "-f", "-n", "1", "--json"],
            cwd=ROOT,
            env={**inherited, **server.environment},
            stdout=output,
            preexec_fn=hear_ctrl_c,
        )
    try:
        wait_until(lambda: log.read_text(), 20)
        asked(started, "Hello")
        wait_until(lambda: '"Turn.Completed"' in log.read_text(), 20)
        following.send_signal(signal.SIGINT)
        assert following.wait(10) == 0
    finally:
        following.kill()
        following.wait(5)
    assert all(json.loads(line) for line in log.read_text().splitlines())


# --- turns ------------------------------------------------------------------------------------------------------------


def test_a_story_tells_who_asked_what_and_what_it_cost(on_server: Cli, started: dict[str, Any]) -> None:
    story = settled_story(on_server, started["request_id"])
    assert story["status"] == "completed"
    assert story["message"] == started["message"]
    assert story["agent"]["agent_id"] == started["agent_id"]
    assert story["agent"]["model"] == started["model"]
    assert story["asked_by"].startswith("agent_key:")
    assert story["credits"]["lines"] == [
        {"meter": "api_call", "tool": None, "quantity": 1, "amount": "0.00", "rate_card": "rc-1"}
    ]
    assert "not charged because its price is 0" in story["notes"]
    text = on_server("turn", "show", started["request_id"]).out
    assert "charged 0.00" in text
    assert len(text.splitlines()) < 40


def test_a_story_cuts_personal_text_unless_all_is_asked_for(on_server: Cli, started: dict[str, Any]) -> None:
    long = "What is this about? " * 20
    request_id = asked(started, long)["request_id"]
    assert len(settled_story(on_server, request_id)["message"]) == 80
    assert settled_story(on_server, request_id, "--personal")["message"] == long.strip()


def test_a_story_shows_retries_of_the_model(on_server: Cli, started: dict[str, Any]) -> None:
    story = settled_story(on_server, asked(started, "[[429 1 0]] Hello")["request_id"])
    assert story["status"] == "completed"
    assert any("model call 1 failed (rate_limited); tried again after" in note for note in story["notes"])
    assert any(step["odd"] and step["type"] == "Turn.ModelCallFailed" for step in story["steps"])


def test_a_story_shows_tools_and_their_price(on_server: Cli, started: dict[str, Any]) -> None:
    story = settled_story(on_server, asked(started, DRAWN)["request_id"])
    texts = "\n".join(step["text"] for step in story["steps"])
    assert "tool svg_diagram 1.1 wanted (builtin, pure)" in texts
    assert "0.15 credits more set aside for svg_diagram 1.1" in texts
    assert "tool svg_diagram 1.1 started, attempt 1" in texts
    assert (story["credits"]["extended"], story["credits"]["charged"]) == ("0.15", "0.15")
    assert [line["tool"] for line in story["credits"]["lines"]] == [None, "svg_diagram"]


def test_a_story_says_that_a_failed_tool_is_not_charged(on_server: Cli, started: dict[str, Any]) -> None:
    story = settled_story(on_server, asked(started, NOT_DRAWN)["request_id"])
    assert "tool svg_diagram 1.1 failed (invalid_arguments): not charged" in story["notes"]
    assert (story["credits"]["charged"], story["credits"]["given_back"]) == ("0.00", "0.15")


def test_a_story_says_why_nothing_was_charged(on_server: Cli, started: dict[str, Any]) -> None:
    problem = asked(started, "[[status 400]] Hello")
    story = settled_story(on_server, problem["request_id"])
    assert story["status"] == "failed"
    assert story["error_code"] == "model_refused"
    assert "failed, so nothing is charged" in story["notes"]
    assert story["credits"]["end"] == "released"


def test_the_turns_of_a_conversation_are_listed(on_server: Cli, started: dict[str, Any]) -> None:
    (turn,) = on_server("turn", "show", started["conversation_id"], "--json").json
    assert (turn["request_id"], turn["outcome"]) == (started["request_id"], "answered")


def test_what_is_no_turn_is_said_in_one_line(on_server: Cli, server: Up) -> None:
    assert "is not an id" in on_server("turn", "show", "nonsense").err
    ran = on_server("turn", "show", "req-00000000-0000-0000-0000-000000000001")
    assert ran.err == "oshaani: there is no turn 00000000-0000-0000-0000-000000000001 in the log\n"


# --- people and their keys ----------------------------------------------------------------------------------------


def test_an_operator_finds_who_registered_over_http(on_server: Cli, started: dict[str, Any]) -> None:
    assert on_server("user", "promote", started["email"]).code == 0
    (key,) = on_server("keys", "list", started["email"], "--json").json
    assert started["user_api_key"].startswith(key["prefix"])


def test_a_key_revoked_on_the_command_line_is_refused_at_once(
    on_server: Cli, started: dict[str, Any]
) -> None:
    number = str(started["agent_id"])
    made = on_server("keys", "create", number, "--json").json
    both = {**started, "agent_api_key": made["key"]}
    wait_until(lambda: "response" in asked(both, "Hello"), 5)
    assert on_server("keys", "revoke", number, made["key_id"]).code == 0
    wait_until(lambda: asked(both, "Hello").get("status") == 401, 5)


# --- proofs -------------------------------------------------------------------------------------------------------------


def test_a_running_server_proves_all_laws(on_server: Cli, started: dict[str, Any]) -> None:
    settled_story(on_server, started["request_id"])
    ran = on_server("audit", "verify")
    assert ran.code == 0, ran.out
    assert on_server("billing", "reconcile", "--json").json == {"ok": True, "violations": []}


def test_a_read_model_is_rebuilt_beside_the_running_server(on_server: Cli, started: dict[str, Any]) -> None:
    assert on_server("projections", "rebuild", "users", "--json").json["events"] > 0
    listed = {each["name"]: each for each in on_server("projections", "list", "--json").json}
    assert listed["users"]["built_version"] == listed["users"]["version"]
    assert on_server("user", "promote", started["email"]).code == 0


def test_nothing_is_parked_on_a_healthy_server(on_server: Cli, server: Up) -> None:
    assert on_server("parked", "list").out == "No stream waits.\n"
    assert on_server("projections", "rebuild", "nope").code == 1
    stream = "00000000-0000-0000-0000-000000000001"
    assert "does not wait" in on_server("parked", "retry", "users", stream).err
    assert "--yes" in on_server("parked", "skip", "users", stream, "--reason", "a test").err
