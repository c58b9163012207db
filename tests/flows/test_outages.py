"""A server that is told to stop, and a database that dies, under load."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from adapters.postgres.embedded import PostgresServer
from tests.flows.world import MESSAGE, Asked, World, balance, turn_of, until, world

STOP_S = 10.0
CLIENTS = 8


def settled(world: World, turn_ids: list[UUID]) -> bool:
    return world.due(turn_ids) == 0 and all(world.settlements(turn_id) == 1 for turn_id in turn_ids)


def test_a_server_told_to_stop_finishes_what_it_can(database_url: str, tmp_path: Path) -> None:
    with world(database_url, tmp_path) as built:
        person = built.person
        available, _ = balance(person)
        quick = [Asked(f"[[slow 700]] {n}") for n in range(10)]
        stuck = Asked("[[hang]]")
        with ThreadPoolExecutor(len(quick) + 1) as clients:
            sent = [clients.submit(asked.send, person) for asked in quick]
            lost = clients.submit(stuck.send, person)
            begun = "SELECT 1 FROM event WHERE type = 'Turn.ModelCallStarted'"
            until(lambda: len(built.rows(begun)) == len(quick) + 1, "every call to be under way")
            began = time.monotonic()
            assert built.server.stop() == 0
            assert time.monotonic() - began < STOP_S
            answers = [each.result() for each in sent]
            assert lost.result() is None or lost.result().status != 200  # type: ignore[union-attr]
        ended = "SELECT 1 FROM event WHERE type = 'Turn.Completed'"
        assert len(built.rows(ended)) == len(quick)

        # What it could not finish is gone on with: the model was asked once more, and hangs again.
        person = built.person
        again = [asked.insist(person) for asked in quick]
        for answer, before in zip(again, answers, strict=True):
            assert before is None or before.status != 200 or turn_of(before) == turn_of(answer)
        turn_ids = [turn_of(answer) for answer in again]
        until(lambda: settled(built, turn_ids), "the settlements")
        taken_over = "SELECT 1 FROM event WHERE type = 'Turn.ModelCallFailed'"
        until(lambda: len(built.rows(taken_over)) == 1, "the hanging call to be taken over")
        held = until(lambda: balance(person)[1] == MESSAGE, "one hold to be left")
        assert held
        assert balance(person)[0] == available - (len(quick) + 1) * MESSAGE


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    # As root, the server runs under its own user, which may not enter pytest's folders.
    with tempfile.TemporaryDirectory(prefix="oshaani-own-postgres-") as folder:
        Path(folder).chmod(0o755)
        yield PostgresServer(Path(folder))


def test_a_database_killed_under_load_loses_nothing_that_was_acknowledged(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    own_postgres.start()
    try:
        with world(own_postgres.dsn, tmp_path) as built:
            person = built.person
            available, _ = balance(person)
            stop = threading.Event()
            acknowledged: list[UUID] = []

            def load(client: int) -> list[Asked]:
                unanswered = []
                number = 0
                while not stop.is_set():
                    asked = Asked(f"[[slow 20]] {client}/{number}")
                    answer, number = asked.send(person), number + 1
                    if answer is not None and answer.status in (200, 202):
                        acknowledged.append(turn_of(answer))
                    else:
                        unanswered.append(asked)
                        time.sleep(0.05)
                return unanswered

            with ThreadPoolExecutor(CLIENTS) as clients:
                loads = [clients.submit(load, client) for client in range(CLIENTS)]
                until(lambda: len(acknowledged) > 30, "some answers")
                for _ in range(2):
                    kill_server(own_postgres)
                    time.sleep(0.3)
                    own_postgres.start()
                    answered = len(acknowledged)
                    until(lambda seen=answered: len(acknowledged) > seen + 20, "answers again")  # type: ignore[misc]
                stop.set()
                unanswered = [asked for each in loads for asked in each.result()]
            # The server was never restarted.
            assert built.server.process.poll() is None
            late = [turn_of(asked.insist(person)) for asked in unanswered]
            turn_ids = [*acknowledged, *late]
            assert len(set(turn_ids)) == len(turn_ids)
            accepted = "SELECT stream_id FROM event WHERE type = 'Turn.Accepted'"
            assert {turn_id for (turn_id,) in built.rows(accepted)} == set(turn_ids)
            until(lambda: settled(built, turn_ids), "the settlements")
            left = available - len(turn_ids) * MESSAGE
            until(lambda: balance(person) == (left, 0), f"{left} available and nothing held")
    finally:
        own_postgres.stop()


def kill_server(server: PostgresServer) -> None:
    """The postmaster and its children, as when the machine takes them all."""
    assert server._process is not None
    postmaster = psutil.Process(server._process.pid)
    for process in (postmaster, *postmaster.children(recursive=True)):
        process.kill()
    server._process.wait()
