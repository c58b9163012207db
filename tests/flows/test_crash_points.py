"""A server that dies between any two steps loses nothing and does nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from domain.callback import callback_of
from domain.crash_points import POINTS
from tests.flows.people import Person
from tests.flows.world import MESSAGE, TOOL, Asked, World, balance, turn_of, until, world
from tests.peers.databases import new_database

FOUND = "HTTP 200 OK\n\n42"
CALLBACK_POINTS = [point for point in POINTS if point.startswith("callback.")]
UNKNOWN = "It is not known whether this tool call took effect"


@pytest.fixture(scope="module")
def killed(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world whose server dies in every test, and is started again."""
    with (
        new_database(postgres_dsn) as url,
        world(url, tmp_path_factory.mktemp("killed")) as built,
    ):
        yield built


def recorded(world: World, turn_id: UUID) -> dict[str, int]:
    """How often the model was asked for what the log has an answer to."""
    counts = world.model.counts()
    calls = [fact["call_id"] for fact in world.facts("Turn.ModelCallCompleted", turn_id)]
    return {call_id: counts[call_id] for call_id in calls}


def turns_begun(world: World, before: set[UUID]) -> set[UUID]:
    rows = world.rows("SELECT stream_id FROM event WHERE type = 'Turn.Accepted'")
    return {turn_id for (turn_id,) in rows} - before


def check_settled(world: World, person: Person, turn_ids: list[UUID], left: object) -> None:
    """Each turn has ended once and was charged once; nothing is held, nothing is due."""
    until(lambda: all(world.settlements(turn_id) for turn_id in turn_ids), "the settlements")
    until(lambda: world.due(turn_ids) == 0, "nothing to be due")
    until(lambda: balance(person) == (left, 0), f"{left} available and nothing held")
    for turn_id in turn_ids:
        assert world.ends(turn_id) == ["Turn.Completed"]
        assert world.settlements(turn_id) == 1


@pytest.mark.parametrize("point", [point for point in POINTS if point not in CALLBACK_POINTS])
def test_a_server_that_dies_at(killed: World, point: str) -> None:
    person, word = killed.person, f"w{uuid4().hex}"
    until(lambda: balance(person)[1] == 0, "a quiet account")
    available, _ = balance(person)
    before = turns_begun(killed, set())
    plain = Asked(f"[[say plain {word}]]")
    with_tool = Asked(f'[[tool lookup {{"q": "{word}"}}]]')
    killed.arm(point)
    for asked in (plain, with_tool):
        if asked.send(person) is None:
            break
    until(killed.has_died, "the server's death")

    begun = turns_begun(killed, before)
    answers_before = {turn_id: recorded(killed, turn_id) for turn_id in begun}
    ran_before = {turn_id: killed.facts("Turn.ToolCalled", turn_id) for turn_id in begun}
    visits_before = killed.page.visits_of(word)

    person = killed.person  # asks the next server
    answers = [asked.insist(person) for asked in (plain, with_tool)]
    assert [answer.json["response"] for answer in answers] == [f"plain {word}", f"The tool said: {FOUND}"]
    turn_ids = [turn_of(answer) for answer in answers]
    assert turns_begun(killed, before) == set(turn_ids)
    for turn_id, answered in answers_before.items():
        after = recorded(killed, turn_id)
        assert {call_id: after[call_id] for call_id in answered} == answered
    if any(ran_before.values()):
        assert killed.page.visits_of(word) == visits_before
    assert 1 <= killed.page.visits_of(word) <= 2
    assert [len(killed.facts("Turn.ToolCalled", turn_id)) for turn_id in turn_ids] == [0, 1]
    check_settled(killed, person, turn_ids, available - 2 * MESSAGE - TOOL)


@pytest.mark.parametrize("point", ["tool.claimed", "tool.ran"])
def test_what_must_not_happen_twice_does_not(killed: World, point: str) -> None:
    person, word = killed.person, f"w{uuid4().hex}"
    until(lambda: balance(person)[1] == 0, "a quiet account")
    available, _ = balance(person)
    order = Asked(f'[[tool order {{"q": "{word}"}}]]')
    killed.arm(point)
    assert order.send(person) is None
    until(killed.has_died, "the server's death")
    visits = killed.page.visits_of(word)
    person = killed.person
    answer = order.insist(person)
    assert UNKNOWN in answer.json["response"]
    assert killed.page.visits_of(word) == visits == (1 if point == "tool.ran" else 0)
    assert len(killed.facts("Turn.ToolCallOutcomeUnknown", turn_of(answer))) == 1
    # Nobody pays for what nobody knows.
    check_settled(killed, person, [turn_of(answer)], available - MESSAGE)


@pytest.mark.parametrize("point", CALLBACK_POINTS)
def test_a_callback_is_told_although_its_sender_died(killed: World, point: str) -> None:
    person, word = killed.person, f"w{uuid4().hex}"
    until(lambda: balance(person)[1] == 0, "a quiet account")
    killed.arm(point)
    url = f"http://127.0.0.1:{killed.page.port}/told?{word}"
    body = {"message": f"[[say plain {word}]]", "callback_url": url}
    accepted = person.server.send("POST", "/api/create_conversation", body, person.agent)
    assert accepted.status == 202, accepted.text
    until(killed.has_died, "the server's death")
    # Nobody can know whether what was sent was heard, so it is sent again.
    before = killed.page.visits_of(f"told?{word}")
    assert before == (1 if point == "callback.sent" else 0)

    person = killed.person
    path = f"/api/get_answer?request_id={accepted.json['request_id']}"

    def told() -> Any:
        found = person.server.send("GET", path, headers=person.agent).json["callback"]
        return found if found["status"] == "delivered" else None

    assert until(told, "the delivery")["attempts"] == 2
    assert killed.page.visits_of(f"told?{word}") == before + 1
    callback_id = callback_of(turn_of(accepted))
    assert killed.due([callback_id, turn_of(accepted)]) == 0
    assert len(killed.facts("Callback.Delivered", callback_id)) == 1


def test_every_point_is_reached_by_the_program() -> None:
    root = Path(__file__).parents[2]
    sources = [
        file.read_text()
        for layer in ("commands", "stream_processors", "projections", "oshaani")
        for file in (root / layer).rglob("*.py")
    ]
    for point in POINTS:
        assert sum(source.count(f'crash_point("{point}")') for source in sources) >= 1, point
