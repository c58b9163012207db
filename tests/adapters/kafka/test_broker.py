from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from adapters.kafka.broker import KafkaServer, embedded_kafka, running_servers
from adapters.kafka.faults import KafkaDidNotStart, KafkaFolderUnusable, KafkaPortTaken, KafkaProgramsMissing
from adapters.kafka.node import answers, free_ports, nodes_on
from adapters.kafka.programs import kafka_programs
from schemas.topics import AGENT_STATE, LOG, TURN_STREAM
from tests.peers.brokers import PrivateTopics, end_brokers

ROOT = Path(__file__).parents[3]
WAIT_S = 30.0
LIVES_WITH_A_BROKER = """
import asyncio, sys
from pathlib import Path
from adapters.kafka.broker import embedded_kafka

async def main():
    async with embedded_kafka(Path(sys.argv[1])) as servers:
        print(servers, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    end_brokers(tmp_path)


async def until(reached: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not reached():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.05)


def port_of(servers: str) -> int:
    return int(servers.rpartition(":")[2])


def produce(servers: str, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": servers, "log_level": 0})
    producer.produce(topic, value)
    assert producer.flush(WAIT_S) == 0


def consume_one(servers: str, topic: str) -> bytes | None:
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": "test",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "log_level": 0,
        }
    )
    try:
        consumer.subscribe([topic])
        message = consumer.poll(WAIT_S)
        return None if message is None or message.error() else message.value()
    finally:
        consumer.close()


@asynccontextmanager
async def living_with_a_broker(data_dir: Path) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """A program of its own that runs an embedded broker."""
    with subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [sys.executable, "-c", LIVES_WITH_A_BROKER, str(data_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        try:
            yield program, (await asyncio.to_thread(program.stdout.readline)).strip()
        finally:
            program.kill()


def test_what_is_written_to_the_runs_broker_is_read_from_it(broker: str, topics: PrivateTopics):
    (log,) = topics.create(LOG)
    produce(broker, log.name, b"a record")
    assert consume_one(broker, log.name) == b"a record"


def test_topics_of_a_test_have_the_settings_of_their_models(broker: str, topics: PrivateTopics):
    made = topics.create(LOG, TURN_STREAM, AGENT_STATE)
    found = AdminClient({"bootstrap.servers": broker}).list_topics(timeout=WAIT_S).topics
    assert [len(found[topic.name].partitions) for topic in made] == [8, 8, 12]


async def test_the_embedded_broker_serves_while_the_block_runs_and_ends_with_it(data_dir: Path):
    async with embedded_kafka(data_dir) as servers:
        assert answers(port_of(servers))
        assert servers.startswith("127.0.0.1:")
    assert not answers(port_of(servers))
    assert nodes_on(data_dir / "kafka") == []


async def test_a_second_life_finds_its_port_and_what_was_written(data_dir: Path):
    async with embedded_kafka(data_dir) as first:
        private = PrivateTopics(first)
        (log,) = await asyncio.to_thread(private.create, LOG)
        await asyncio.to_thread(produce, first, log.name, b"kept")
    async with embedded_kafka(data_dir) as second:
        assert second == first
        assert await asyncio.to_thread(consume_one, second, log.name) == b"kept"


async def test_a_broker_that_dies_is_started_again_at_the_same_port(data_dir: Path):
    async with embedded_kafka(data_dir) as servers:
        (process,) = nodes_on(data_dir / "kafka")
        process.kill()
        await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
        await until(lambda: answers(port_of(servers)))


async def test_a_broker_left_by_a_killed_program_is_ended_by_the_next(data_dir: Path):
    async with living_with_a_broker(data_dir) as (program, servers):
        (left,) = nodes_on(data_dir / "kafka")
        assert running_servers(data_dir) == servers
        program.kill()
        program.wait(WAIT_S)
        assert left.is_running()
        assert running_servers(data_dir) is None
        async with embedded_kafka(data_dir) as again:
            assert again == servers
            assert not left.is_running()
            assert len(nodes_on(data_dir / "kafka")) == 1


async def test_a_folder_serves_one_program_at_a_time(data_dir: Path):
    async with living_with_a_broker(data_dir) as (program, servers):
        with pytest.raises(KafkaFolderUnusable, match=f"in use by process {program.pid}; stop that one"):
            async with embedded_kafka(data_dir):
                raise AssertionError
        assert answers(port_of(servers))


async def test_a_port_that_is_taken_is_named(data_dir: Path):
    port, _ = free_ports()
    taken = pytest.raises(KafkaPortTaken, match=f"port {port} is taken by another program")
    with socket.create_server(("127.0.0.1", port)), taken:
        async with embedded_kafka(data_dir, port):
            raise AssertionError


async def test_the_given_port_is_used(data_dir: Path):
    port, _ = free_ports()
    async with embedded_kafka(data_dir, port) as servers:
        assert servers == f"127.0.0.1:{port}"


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(KafkaFolderUnusable, match=r"cannot use Kafka's folder .*OSHAANI_DATA_DIR"):
        async with embedded_kafka(tmp_path / "file"):
            raise AssertionError


async def test_a_broker_that_cannot_use_what_is_there_says_its_last_words(data_dir: Path):
    data = data_dir / "kafka" / "data"
    data.mkdir(parents=True)
    (data / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=AAAAAAAAAAAAAAAAAAAAAA\n")
    with pytest.raises(
        KafkaDidNotStart, match=r"did not start: the broker ended: .*node id 7.*remove .*data'"
    ):
        async with embedded_kafka(data_dir):
            raise AssertionError


def test_java_that_is_missing_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KafkaProgramsMissing, match="needs Java 17 or newer, and there is none; install it"):
        kafka_programs()


def test_java_that_is_too_old_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KafkaProgramsMissing, match=r"Java 17 or newer, and '.*/java' is Java 8; install it"):
        kafka_programs()


def test_maven_that_is_missing_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    java = kafka_programs().java
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").symlink_to(java.resolve())
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(KafkaProgramsMissing, match="fetched by Maven, and there is none; install it"):
        kafka_programs()


def test_what_was_fetched_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch):
    kafka_programs()
    said: list[str] = []
    started_s = time.monotonic()
    assert kafka_programs(said.append).archive.exists()
    assert said == []
    assert time.monotonic() - started_s < 5


def test_a_broker_that_was_killed_comes_back_at_its_port_with_what_it_had(own_broker: KafkaServer):
    servers = own_broker.bootstrap_servers
    (log,) = PrivateTopics(servers).create(LOG)
    produce(servers, log.name, b"kept")
    own_broker.kill()
    assert not answers(port_of(servers))
    own_broker.start()
    assert own_broker.bootstrap_servers == servers
    assert consume_one(servers, log.name) == b"kept"


def test_a_file_name_outside_of_latin_1_is_no_trouble(tmp_path: Path):
    server = KafkaServer(tmp_path / "größe 数 # 'x'")
    try:
        server.start()
        assert (server.folder / "data" / "meta.properties").exists()
        assert any(each.name.startswith("__cluster_metadata") for each in (server.folder / "data").iterdir())
    finally:
        server.kill()
