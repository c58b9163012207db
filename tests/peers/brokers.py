"""Apache Kafka for the tests: one broker per run, topics of a test's own on it, and brokers that a test may kill."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from adapters.kafka.broker import KafkaServer
from adapters.kafka.node import SERVER
from schemas.topics import Topic

ADMIN_S = 20.0
_server = pytest.StashKey[KafkaServer]()


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest, run_folder: Path) -> str:
    """The bootstrap servers of a broker for this run, shared by its workers.

    `TEST_KAFKA_BOOTSTRAP_SERVERS` names another to use instead. Nobody stops it; whoever must is given `own_broker`.
    """
    if servers := os.environ.get("TEST_KAFKA_BOOTSTRAP_SERVERS"):
        return servers
    # Kept for as long as the process lives: the first process of the run ends the broker, not this fixture.
    server = request.config.stash.setdefault(_server, KafkaServer(run_folder / "kafka"))
    started = run_folder / "kafka-started"
    with one_at_a_time(run_folder / "kafka-starting"):
        if not started.exists():
            server.start()
            started.write_text(server.bootstrap_servers)
    return started.read_text()


@pytest.fixture
def own_broker(run_folder: Path) -> Iterator[KafkaServer]:
    """A broker of the test's own, running: `kill()`, `stop()` and `start()` it at will, its port stays.

    Its methods block for seconds: call them with `asyncio.to_thread` where something must go on meanwhile.
    """
    server = KafkaServer(run_folder / f"own-kafka-{uuid4().hex}")
    server.start()
    yield server
    server.kill()
    shutil.rmtree(server.folder, ignore_errors=True)


class PrivateTopics:
    """Topics on the shared broker under names of this test's own; they go with the test."""

    def __init__(self, servers: str) -> None:
        self.prefix = f"test-{uuid4().hex[:12]}."
        self._admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
        self._own: list[str] = []

    def named(self, topic: Topic) -> Topic:
        """A topic like this one under a name of the test's own; it goes with the test, whoever makes it."""
        own = replace(topic, name=self.prefix + topic.name)
        self._own.append(own.name)
        return own

    def create(self, *topics: Topic) -> tuple[Topic, ...]:
        """Make topics like these, with their settings; they are returned as they are called here."""
        own = tuple(map(self.named, topics))
        wanted = [
            NewTopic(topic.name, topic.partitions, replication_factor=1, config=topic.settings)
            for topic in own
        ]
        for made in self._admin.create_topics(wanted, operation_timeout=ADMIN_S).values():
            made.result(ADMIN_S)
        self._wait_until_led(own)
        return own

    def _wait_until_led(self, topics: tuple[Topic, ...]) -> None:
        """A broker knows of a topic a moment after it was made."""
        until_s = time.monotonic() + ADMIN_S
        while True:
            known = self._admin.list_topics(timeout=ADMIN_S).topics
            parts = [known[topic.name].partitions if topic.name in known else {} for topic in topics]
            if all(each and all(one.leader >= 0 for one in each.values()) for each in parts):
                return
            assert time.monotonic() < until_s, "the topics were not made in time"
            time.sleep(0.02)

    def remove(self) -> None:
        """Take everything away that has a name of this test's own."""
        if self._own:
            for removed in self._admin.delete_topics(self._own, operation_timeout=ADMIN_S).values():
                removed.exception(ADMIN_S)


@pytest.fixture
def topics(broker: str) -> Iterator[PrivateTopics]:
    """Topics of the test's own on the run's broker."""
    private = PrivateTopics(broker)
    yield private
    private.remove()


def end_brokers(run_folder: Path) -> None:
    """End every broker of a run, whichever process started it."""
    place = str(run_folder.resolve()) + os.sep
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if len(words) > 2 and words[-2] == SERVER and words[-1].startswith(place):
            process.kill()
            process.wait(ADMIN_S)


@contextmanager
def one_at_a_time(lock_file: Path) -> Iterator[None]:
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
