"""The distributed layout: any of its processes may die between any two steps, be told to end, or run twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from adapters.kafka.broker import KafkaServer
from domain.crash_points import DISTRIBUTED_POINTS, POINTS
from schemas.topics import LOG, PROCESSORS, work_topic
from tests.flows.people import Person
from tests.flows.test_crash_points import FOUND, check_settled, turns_begun
from tests.flows.world import (
    MESSAGE,
    TOOL,
    Asked,
    Layout,
    balance,
    command,
    layout,
    topic_is_the_log,
    turn_of,
    until,
)
from tests.peers.databases import new_database

RECOVERY_S = 15.0
CLIENTS = 8
WORKER_POINTS = ("host.delivered", "host.handled", "host.acked")
DEATHS = (
    *(("api-1", point) for point in ("command.before_append", "command.after_append")),
    *(("relay-1", point) for point in DISTRIBUTED_POINTS if point.startswith("relay.")),
    *(("projector-1", point) for point in POINTS if point.startswith("projection.")),
    *(
        ("agent_turns-1", point)
        for point in (*WORKER_POINTS, "command.before_append", "command.after_append")
    ),
    *(("agent_turns-1", point) for point in ("turn.claimed", "model.answered", "turn.recorded")),
    *(("tool_calls-1", point) for point in ("tool.claimed", "tool.ran", "tool.recorded")),
    *(("credit_debits-1", point) for point in ("debit.before", "debit.after", "host.acked")),
    ("public_topics-1", "host.handled"),
)
ROLES = ("api-1", "relay-1", "projector-1", *(f"{name}-1" for name in PROCESSORS))


@pytest.fixture(scope="module")
def laid_out(
    postgres_dsn: str, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Layout]:
    """A supervised layout around a broker of its own."""
    broker = KafkaServer(run_folder / f"layout-kafka-{uuid4().hex}")
    broker.start()
    try:
        with (
            new_database(postgres_dsn) as url,
            layout(url, tmp_path_factory.mktemp("layout"), broker.bootstrap_servers) as built,
        ):
            yield built
    finally:
        broker.kill()


def quiet(world: Layout) -> tuple[Person, object]:
    """Somebody of whose credits nothing is held, and what is available."""
    person = world.person
    until(lambda: balance(person)[1] == 0, "a quiet account", RECOVERY_S)
    return person, balance(person)[0]


@pytest.mark.parametrize(("slot", "point"), DEATHS)
def test_a_process_that_dies_loses_nothing_and_does_nothing_twice(
    laid_out: Layout, slot: str, point: str
) -> None:
    person, available = quiet(laid_out)
    word, before, deaths = f"w{uuid4().hex}", turns_begun(laid_out, set()), laid_out.deaths_of(slot)
    asked = (Asked(f"[[say plain {word}]]"), Asked(f'[[tool lookup {{"q": "{word}"}}]]'))
    laid_out.arm_role(slot, point)
    answers = [each.insist(person, RECOVERY_S) for each in asked]
    until(lambda: laid_out.deaths_of(slot) == deaths + 1, f"{slot} to die", RECOVERY_S)

    assert [answer.json["response"] for answer in answers] == [f"plain {word}", f"The tool said: {FOUND}"]
    turn_ids = [turn_of(answer) for answer in answers]
    assert turns_begun(laid_out, before) == set(turn_ids)
    assert 1 <= laid_out.page.visits_of(word) <= 2
    assert [len(laid_out.facts("Turn.ToolCalled", turn_id)) for turn_id in turn_ids] == [0, 1]
    check_settled(laid_out, person, turn_ids, available - 2 * MESSAGE - TOOL)  # type: ignore[operator]


@pytest.mark.parametrize("slot", ROLES)
def test_a_process_told_to_end_under_load_ends_in_order_and_nothing_is_lost(
    laid_out: Layout, slot: str
) -> None:
    person, available = quiet(laid_out)
    deaths = laid_out.deaths_of(slot)
    asked = [Asked(f"[[say {slot} {n}]]") for n in range(24)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(each.insist, person, RECOVERY_S) for each in asked]
        until(lambda: sum(answer.done() for answer in answers) >= CLIENTS, "the load to be under way")
        os.kill(laid_out.pid_of(slot), signal.SIGTERM)
        turn_ids = [turn_of(answer.result()) for answer in answers]
    until(lambda: laid_out.deaths_of(slot) == deaths + 1, f"{slot} to end")
    assert f"{slot:18} ended with exit code 0" in laid_out.server.log.read_text()
    assert len(set(turn_ids)) == len(asked)
    check_settled(laid_out, person, turn_ids, available - len(asked) * MESSAGE)  # type: ignore[operator]


def test_a_killed_turns_worker_is_replaced_before_anybody_notices(laid_out: Layout) -> None:
    person, _ = quiet(laid_out)
    asked = [Asked(f"[[slow 300]] {n}") for n in range(16)]
    longest_s: list[float] = []

    def answered(each: Asked) -> UUID:
        began = time.monotonic()
        answer = each.insist(person, RECOVERY_S)
        longest_s.append(time.monotonic() - began)
        return turn_of(answer)

    with ThreadPoolExecutor(len(asked)) as clients:
        answers = [clients.submit(answered, each) for each in asked]
        begun = "SELECT count(*) FROM due WHERE starts_with(claimed_by, 'agent_turns-1/')"
        until(lambda: laid_out.rows(begun)[0][0] > 0, "calls to be under way")
        os.kill(laid_out.pid_of("agent_turns-1"), signal.SIGKILL)
        turn_ids = [answer.result() for answer in answers]
    assert [laid_out.ends(turn_id) for turn_id in turn_ids] == [["Turn.Completed"]] * len(asked)
    assert max(longest_s) <= RECOVERY_S


def test_after_all_that_the_topics_are_the_log_and_everything_adds_up(laid_out: Layout) -> None:
    quiet(laid_out)
    for topic in (LOG.name, *(work_topic(name).name for name in PROCESSORS)):
        until(lambda name=topic: topic_is_the_log(laid_out, name), f"{topic} to be the log", RECOVERY_S)  # type: ignore[misc]
    proof = command(laid_out, "audit", "verify")
    assert proof.returncode == 0, proof.stdout
