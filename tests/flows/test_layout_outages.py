"""The distributed layout while its surroundings fail, with everything in it twice, and when all is delivered again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from adapters.kafka.broker import KafkaServer
from adapters.postgres.embedded import PostgresServer
from schemas.topics import LOG, PROCESSORS, work_topic
from tests.flows.real_server import RealServer, free_ports
from tests.flows.test_crash_points import check_settled
from tests.flows.test_layout import quiet
from tests.flows.world import (
    MESSAGE,
    Asked,
    Layout,
    balance,
    command,
    environment_of,
    layout,
    topic_is_the_log,
    turn_of,
    until,
)
from tests.peers.databases import new_database

AWAY_S = 12.0
RECOVERY_S = 30.0
CLIENTS = 8


@pytest.fixture(scope="module")
def broker_of_ours(run_folder: Path) -> Iterator[KafkaServer]:
    broker = KafkaServer(run_folder / f"outage-kafka-{uuid4().hex}")
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture(scope="module")
def laid_out(
    postgres_dsn: str, broker_of_ours: KafkaServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Layout]:
    folder = tmp_path_factory.mktemp("outages")
    with (
        new_database(postgres_dsn) as url,
        layout(url, folder, broker_of_ours.bootstrap_servers) as built,
    ):
        yield built


def test_turns_go_on_while_the_broker_is_away_and_everything_arrives_when_it_is_back(
    laid_out: Layout, broker_of_ours: KafkaServer
) -> None:
    person, available = quiet(laid_out)
    broker_of_ours.kill()
    away_until = time.monotonic() + AWAY_S
    asked = [Asked(f"[[say away {n}]]") for n in range(6)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda each: each.insist(person, RECOVERY_S), asked))
    body = {"message": "[[say later]]"}
    later = person.server.send("POST", "/api/create_conversation", body, person.agent)
    assert later.status == 202
    turn_ids = [turn_of(answer) for answer in (*answers, later)]
    until(
        lambda: all(laid_out.ends(turn_id) == ["Turn.Completed"] for turn_id in turn_ids),
        "the ends",
        RECOVERY_S,
    )
    until(lambda: time.monotonic() > away_until, "the outage to last", AWAY_S)
    broker_of_ours.start()
    until(lambda: all(laid_out.settlements(turn_id) for turn_id in turn_ids), "the charges", RECOVERY_S)
    check_settled(laid_out, person, turn_ids, available - len(turn_ids) * MESSAGE)  # type: ignore[operator]
    until(lambda: topic_is_the_log(laid_out), "the topic to be the log", RECOVERY_S)


@contextmanager
def another_of_each(world: Layout) -> Iterator[RealServer]:
    """A second process of every role; the second API."""
    first = free_ports(20)
    roles = [("api",), ("relay",), ("projector",), *(("processor", name) for name in PROCESSORS)]
    log = world.folder / "second.log"
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab"))
        processes = []
        for number, role in enumerate(roles):
            more = {
                "OSHAANI_PORT": str(first),
                "OSHAANI_WORKER_PORT": str(first + number),
                "OSHAANI_SLOT": f"{role[-1]}-2",
                **settings_of_tools(world),
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "oshaani", *role],
                    cwd=world.folder,
                    env=environment_of(world, **more),
                    stdout=output,
                    stderr=output,
                )
            )
        try:
            server = RealServer(f"http://127.0.0.1:{first}", processes[0], log)
            for number in range(len(roles)):
                until(lambda port=first + number: is_ready(port), f"{roles[number]} to be ready", 60.0)
            yield server
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(20) for process in processes]
    assert codes == [0] * len(roles), log.read_text()


def settings_of_tools(world: Layout) -> Mapping[str, str]:
    return {
        "OSHAANI_EGRESS_ALLOW": "127.0.0.0/8",
        "OSHAANI_EGRESS_PORTS": str(world.page.port),
        "OSHAANI_PLAN_LIMITS": json.dumps({"free": {"message": None, "api_call": None, "tool_call": None}}),
    }


def is_ready(port: int) -> bool:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except HTTPError:
        return False
    except OSError:
        return False


def test_two_of_each_process_give_the_same_answers_and_do_nothing_twice(laid_out: Layout) -> None:
    person, available = quiet(laid_out)
    with another_of_each(laid_out) as second:
        elsewhere = replace(person, server=second)
        asked = [Asked(f'[[tool lookup {{"q": "both{uuid4().hex}"}}]]') for _ in range(8)]
        asked += [Asked(f"[[say both {n}]]") for n in range(16)]
        with ThreadPoolExecutor(CLIENTS) as clients:
            # The same request to both: one turn, and one answer.
            here = [clients.submit(each.insist, person, RECOVERY_S) for each in asked]
            there = [clients.submit(each.insist, elsewhere, RECOVERY_S) for each in asked]
            answers = [(a.result(), b.result()) for a, b in zip(here, there, strict=True)]
        turn_ids = [turn_of(a) for a, _ in answers]
        assert [turn_of(b) for _, b in answers] == turn_ids
        assert [a.json["response"] for a, _ in answers] == [b.json["response"] for _, b in answers]
        # A stream is served by whichever process is asked.
        path = f"/api/requests/{answers[0][0].json['request_id']}/events"
        assert "RUN_FINISHED" in second.send("GET", path, headers=person.agent).text
        until(lambda: balance(person) == balance(elsewhere), "both to see the same")
        assert all(laid_out.ends(turn_id) == ["Turn.Completed"] for turn_id in turn_ids)
        until(
            lambda: all(laid_out.settlements(turn_id) == 1 for turn_id in turn_ids), "the charges", RECOVERY_S
        )
    assert all(laid_out.settlements(turn_id) == 1 for turn_id in turn_ids)
    until(lambda: balance(person)[1] == 0, "nothing to be held", RECOVERY_S)
    assert balance(person)[0] < available  # type: ignore[operator]


def test_whatever_is_delivered_again_changes_nothing(laid_out: Layout) -> None:
    person, _ = quiet(laid_out)
    turn_ids = [turn_of(Asked(f"[[say again {n}]]").insist(person)) for n in range(5)]
    until(lambda: all(laid_out.settlements(turn_id) for turn_id in turn_ids), "the charges", RECOVERY_S)
    until(lambda: balance(person)[1] == 0, "nothing to be held", RECOVERY_S)
    before, calls = balance(person), laid_out.model.counts()
    events = laid_out.rows("SELECT shard, head FROM shard ORDER BY shard")
    for topic in (LOG.name, *(work_topic(name).name for name in PROCESSORS)):
        sent = command(laid_out, "relay", "--resend", "--from", "1", "--topic", topic)
        assert sent.returncode == 0, sent.stderr

    def arrived_again() -> bool:
        shown = json.loads(command(laid_out, "relay", "--verify", "--json").stdout)
        return bool(shown["is_equal"] and shown["duplicate_count"] >= shown["event_count"])

    until(arrived_again, "everything to have been sent again", RECOVERY_S)
    level = ["--json"]
    until(
        lambda: lag_of(command(laid_out, "doctor", *level).stdout) == 0, "every group to be level", RECOVERY_S
    )
    assert laid_out.rows("SELECT shard, head FROM shard ORDER BY shard") == events
    assert (balance(person), laid_out.model.counts()) == (before, calls)
    proof = command(laid_out, "audit", "verify")
    assert proof.returncode == 0, proof.stdout


def lag_of(doctor: str) -> int:
    """How many findings say that a group is behind."""
    lags = [each for each in json.loads(doctor)["findings"] if each["name"].startswith("lag of ")]
    return sum("level" not in each["detail"] for each in lags) if lags else 1


def test_a_database_restarted_under_the_layout_loses_nothing_that_was_acknowledged(
    broker_of_ours: KafkaServer, run_folder: Path, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="oshaani-own-postgres-") as folder:
        Path(folder).chmod(0o755)
        postgres = PostgresServer(Path(folder), {"max_connections": "250"})
        broker = KafkaServer(run_folder / f"restart-kafka-{uuid4().hex}")
        postgres.start()
        broker.start()
        try:
            with layout(postgres.dsn, tmp_path, broker.bootstrap_servers) as world:
                person, available = quiet(world)
                acknowledged: list[UUID] = [turn_of(Asked("[[say before]]").insist(person))]
                postgres.stop()
                began = time.monotonic()
                refused = person.chat("[[say meanwhile]]")
                assert refused.status == 503, refused.text
                assert time.monotonic() - began < 4.0
                postgres.start()
                asked = [Asked(f"[[say after {n}]]") for n in range(8)]
                with ThreadPoolExecutor(CLIENTS) as clients:
                    answers = list(clients.map(lambda each: each.insist(person, RECOVERY_S), asked))
                acknowledged += [turn_of(answer) for answer in answers]
                check_settled(world, person, acknowledged, available - len(acknowledged) * MESSAGE)  # type: ignore[operator]
        finally:
            postgres.stop()
            broker.kill()
