"""What operators see of parked streams, and have done about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from oshaani.cli import parked
from tests.oshaani.cli.conftest import Cli, Up

REASON = "it was sent by hand"
Park = Callable[..., UUID]


@pytest.fixture
def turn_id(on_server: Cli) -> UUID:
    """A turn that has been run and charged by the running server."""
    started: dict[str, Any] = on_server("quickstart", "--json").json
    return UUID(started["request_id"].removeprefix("req-"))


def park(server: Up, turn_id: UUID, table: str, name: str) -> None:
    """Have a turn's stream wait at its last event."""
    more = ", tenant_id, stream_version, type" if table == "parked_record" else ""
    column = "processor" if table == "parked_record" else "projection"
    with psycopg.connect(
        server.environment["DATABASE_URL"], autocommit=True, options="-c search_path=oshaani"
    ) as connection:
        connection.execute(
            f"INSERT INTO {table} ({column}, stream_id, shard, position, error{more})"
            f" SELECT %s, stream_id, shard, position, 'KeyError()'{more} FROM event WHERE stream_id = %s"
            " ORDER BY position DESC LIMIT 1".encode(),
            (name, turn_id),
        )


def listed(on_server: Cli, stream_id: UUID) -> list[dict[str, Any]]:
    found = on_server("parked", "list", "--json").json
    return [each for each in found if each["stream_id"] == str(stream_id)]


def test_a_stream_that_a_processor_parked_is_listed_and_goes_on_when_asked_to(
    on_server: Cli, server: Up, turn_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    park(server, turn_id, "parked_record", "credit_debits")
    (line,) = listed(on_server, turn_id)
    assert (line["kind"], line["name"], line["error"], line["asked"]) == (
        "processor",
        "credit_debits",
        "KeyError()",
        "",
    )
    assert str(turn_id) in on_server("parked", "list").out
    # The running host looks for what others have parked now and then.
    monkeypatch.setattr(parked, "WAIT_S", 20.0)
    ran = on_server("parked", "retry", "credit_debits", str(turn_id), "--json")
    assert ran.json == {"name": "credit_debits", "stream_id": str(turn_id), "applied": True}
    assert listed(on_server, turn_id) == []


def test_what_is_left_out_is_kept_with_the_reason(
    on_server: Cli, server: Up, turn_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parked, "WAIT_S", 20.0)
    for table, name in (("parked_record", "tool_calls"), ("parked", "turns")):
        park(server, turn_id, table, name)
        (line,) = listed(on_server, turn_id)
        assert line["name"] == name
        ran = on_server("parked", "skip", name, str(turn_id), "--reason", REASON, "--yes")
        assert (ran.code, ran.out) == (0, f"{name} is level with stream {turn_id}.\n"), ran.err
    skips = [
        each for each in on_server("parked", "skipped", "--json").json if each["stream_id"] == str(turn_id)
    ]
    assert [each["processor"] for each in skips] == ["turns", "tool_calls"]
    assert {each["reason"] for each in skips} == {REASON}
    assert {each["stuck"]["type"] for each in skips} == {"Turn.Completed"}
    assert all(each["by"].startswith("operator") for each in skips)
    assert REASON in on_server("parked", "skipped").out


def test_where_a_projection_and_a_processor_have_one_name_it_is_said_which_is_meant(
    on_server: Cli, server: Up, turn_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parked, "WAIT_S", 20.0)
    for table in ("parked_record", "parked"):
        park(server, turn_id, table, "tool_calls")
    ran = on_server("parked", "retry", "tool_calls", str(turn_id))
    assert ran.code == 1
    assert "--of" in ran.err
    for kind in ("processor", "projection"):
        ran = on_server("parked", "retry", "tool_calls", str(turn_id), "--of", kind, "--json")
        assert ran.json["applied"] is True
    assert listed(on_server, turn_id) == []


def test_what_nobody_carries_out_is_left_to_the_next_worker(
    on_server: Cli, server: Up, turn_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parked, "WAIT_S", 0.3)
    # No process of this server runs it.
    park(server, turn_id, "parked_record", "usage_analytics")
    ran = on_server("parked", "retry", "usage_analytics", str(turn_id))
    assert ran.code == 0
    assert "as soon as one runs" in ran.out
    (line,) = listed(on_server, turn_id)
    assert line["asked"] == "retry"
    assert "retry by operator" in on_server("parked", "list").out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("retry", "nobody", str(uuid4())), "there is no projection or processor 'nobody'"),
        (("retry", "agent_turns", str(uuid4())), "does not wait"),
        (("skip", "agent_turns", str(uuid4()), "--yes"), "--reason"),
        (("skip", "agent_turns", str(uuid4()), "--yes", "--reason", " "), "--reason"),
        (("skip", "agent_turns", str(uuid4()), "--reason", REASON), "--yes"),
        (("retry", "agent_turns", "not-an-id"), "valid UUID"),
    ],
)
def test_what_cannot_be_done_is_said(on_server: Cli, arguments: tuple[str, ...], complaint: str) -> None:
    ran = on_server("parked", *arguments)
    assert ran.code != 0
    assert complaint in ran.err
