from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faust
import pytest
from aiokafka.errors import KafkaError
from confluent_kafka.admin import (
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from adapters.kafka.broker import KafkaServer
from adapters.kafka.clients import KafkaConfig, open_consumer, open_producer
from adapters.kafka.faults import KafkaConfigInvalid
from adapters.kafka.node import free_ports
from adapters.kafka.quiet import OneOfAKind, quieten_clients
from schemas.topics import LOG
from tests.peers.brokers import PrivateTopics
from tests.peers.certificates import Authority

WAIT_S = 40.0
USER, PASSWORD = "oshaani", 'open "sesame" \\ 1'


async def round_trip(config: KafkaConfig, topic: str, values: list[bytes]) -> list[bytes]:
    """Write values to one partition and read them back."""
    async with asyncio.timeout(WAIT_S), open_producer(config, "test") as producer:
        sent = [await producer.send(topic, value, key=b"key", partition=0) for value in values]
        await asyncio.gather(*sent)
        return await read(config, topic, len(values))


async def read(config: KafkaConfig, topic: str, count: int) -> list[bytes]:
    found: list[bytes] = []
    async with asyncio.timeout(WAIT_S), open_consumer(config, "test", topic) as consumer:
        while len(found) < count:
            for messages in (await consumer.getmany(timeout_ms=200)).values():
                found += [message.value for message in messages]
    return found


async def test_what_is_produced_is_consumed_in_order(broker: str, topics: PrivateTopics):
    (log,) = topics.create(LOG)
    values = [b"%d" % number * 100 for number in range(500)]
    assert await round_trip(KafkaConfig.at(broker), log.name, values) == values


async def test_a_record_that_comes_alone_is_consumed_at_once(broker: str, topics: PrivateTopics):
    (log,) = topics.create(LOG)
    config = KafkaConfig.at(broker)
    async with (
        asyncio.timeout(WAIT_S),
        open_producer(config, "test") as producer,
        open_consumer(config, "test", log.name) as consumer,
    ):
        await producer.send_and_wait(log.name, b"first", partition=0)
        assert (await consumer.getone()).value == b"first"
        took_s = []
        for _ in range(10):
            started_s = time.monotonic()
            await producer.send_and_wait(log.name, b"alone", partition=0)
            await consumer.getone()
            took_s.append(time.monotonic() - started_s)
        assert sorted(took_s)[5] < 0.2


async def test_a_group_commits_only_what_it_is_told_to_and_begins_with_the_oldest(
    broker: str, topics: PrivateTopics
):
    (log,) = topics.create(LOG)
    config, group = KafkaConfig.at(broker), f"{topics.prefix}group"
    await round_trip(config, log.name, [b"one", b"two"])
    for _ in range(2):
        async with (
            asyncio.timeout(WAIT_S),
            open_consumer(config, "test", log.name, group_id=group) as consumer,
        ):
            first = await consumer.getone()
            assert first.value == b"one"
    async with asyncio.timeout(WAIT_S), open_consumer(config, "test", log.name, group_id=group) as consumer:
        await consumer.getone()
        await consumer.commit()
    async with asyncio.timeout(WAIT_S), open_consumer(config, "test", log.name, group_id=group) as consumer:
        assert (await consumer.getone()).value == b"two"


async def test_without_a_broker_a_client_says_so_at_once():
    config = KafkaConfig.at(f"127.0.0.1:{free_ports()[0]}")
    started_s = time.monotonic()
    with pytest.raises(KafkaError):
        async with open_producer(config, "test"):
            raise AssertionError
    with pytest.raises(KafkaError):
        async with open_consumer(config, "test"):
            raise AssertionError
    assert time.monotonic() - started_s < 5


async def test_a_producer_outlives_a_broker_that_comes_back_and_loses_and_doubles_nothing(
    own_broker: KafkaServer,
):
    config = KafkaConfig.at(own_broker.bootstrap_servers)
    (log,) = PrivateTopics(own_broker.bootstrap_servers).create(LOG)
    values = [b"%d" % number for number in range(300)]
    async with asyncio.timeout(2 * WAIT_S), open_producer(config, "test") as producer:
        sent = [await producer.send(log.name, value, partition=0) for value in values[:100]]
        await asyncio.gather(*sent)
        await asyncio.to_thread(own_broker.kill)
        sent = [await producer.send(log.name, value, partition=0) for value in values[100:200]]
        await asyncio.to_thread(own_broker.start)
        sent += [await producer.send(log.name, value, partition=0) for value in values[200:]]
        await asyncio.gather(*sent)
    assert await read(config, log.name, len(values)) == values


async def test_ending_a_producer_or_consumer_is_bounded_while_the_broker_is_away(own_broker: KafkaServer):
    config = KafkaConfig.at(own_broker.bootstrap_servers)
    (log,) = PrivateTopics(own_broker.bootstrap_servers).create(LOG)
    async with asyncio.timeout(2 * WAIT_S):
        async with (
            open_producer(config, "test") as producer,
            open_consumer(config, "test", log.name, group_id="group") as consumer,
        ):
            await producer.send_and_wait(log.name, b"before", partition=0)
            await consumer.getone()
            await asyncio.to_thread(own_broker.kill)
            sent = await producer.send(log.name, b"never acknowledged", partition=0)
            started_s = time.monotonic()
        assert time.monotonic() - started_s < 25
        with pytest.raises(KafkaError):
            await sent


# --- logins and encryption --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def closed_broker(run_folder: Path, authority: Authority) -> Iterator[tuple[KafkaServer, int, int]]:
    """A broker that also wants a login under TLS at one port, and a certificate at another."""
    certificate, key = authority.sign("broker")
    sasl_port, ssl_port = free_ports()
    user = f'user_{USER}="{PASSWORD.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}"'
    settings = {
        "listeners": "PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller_port,"
        f"SASL_SSL://127.0.0.1:{sasl_port},SSL://127.0.0.1:{ssl_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:$port,SASL_SSL://127.0.0.1:{sasl_port},SSL://127.0.0.1:{ssl_port}",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.certificate.chain": certificate.read_text(),
        "ssl.keystore.key": key.read_text(),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.certificates": authority.file.read_text(),
        "listener.name.ssl.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": (
            f"org.apache.kafka.common.security.plain.PlainLoginModule required {user};"
        ),
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
    }
    server = KafkaServer(run_folder / f"closed-{sasl_port}", settings=settings)
    server.start()
    admin = AdminClient({"bootstrap.servers": server.bootstrap_servers, "log_level": 0})
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    wanted = UserScramCredentialUpsertion(USER, info, b"another password")
    for done in admin.alter_user_scram_credentials([wanted]).values():
        done.result(WAIT_S)
    yield server, sasl_port, ssl_port
    server.kill()


@pytest.fixture
def login(closed_broker: tuple[KafkaServer, int, int], authority: Authority) -> KafkaConfig:
    return KafkaConfig(
        bootstrap_servers=(f"127.0.0.1:{closed_broker[1]}",),
        security_protocol="SASL_SSL",
        sasl_username=USER,
        sasl_password=PASSWORD,
        ssl_ca_file=authority.file,
    )


@pytest.fixture
def own_log(closed_broker: tuple[KafkaServer, int, int]) -> str:
    (log,) = PrivateTopics(closed_broker[0].bootstrap_servers).create(LOG)
    return log.name


async def test_a_login_with_a_password_under_tls_is_let_in(login: KafkaConfig, own_log: str):
    assert await round_trip(login, own_log, [b"secret"]) == [b"secret"]


async def test_a_login_that_keeps_its_password_to_itself_is_let_in(login: KafkaConfig, own_log: str):
    scram = replace(login, sasl_mechanism="SCRAM-SHA-512", sasl_password="another password")
    assert await round_trip(scram, own_log, [b"secret"]) == [b"secret"]


async def test_a_certificate_of_ones_own_is_let_in(
    closed_broker: tuple[KafkaServer, int, int], authority: Authority, own_log: str
):
    certificate, key = authority.sign("client")
    config = KafkaConfig(
        bootstrap_servers=(f"127.0.0.1:{closed_broker[2]}",),
        security_protocol="SSL",
        ssl_ca_file=authority.file,
        ssl_cert_file=certificate,
        ssl_key_file=key,
    )
    assert await round_trip(config, own_log, [b"secret"]) == [b"secret"]
    nameless = replace(config, ssl_cert_file=None, ssl_key_file=None)
    with pytest.raises((KafkaError, TimeoutError)):
        await round_trip(nameless, own_log, [b"secret"])


@pytest.mark.parametrize("wrong", ["password", "authority", "mechanism"])
async def test_what_does_not_fit_is_kept_out(login: KafkaConfig, tmp_path: Path, own_log: str, wrong: str):
    others = {
        "password": replace(login, sasl_password="guessed"),
        "authority": replace(login, ssl_ca_file=Authority(tmp_path, "another").file),
        "mechanism": replace(login, sasl_mechanism="SCRAM-SHA-256"),
    }
    with pytest.raises(KafkaError):
        await round_trip(others[wrong], own_log, [b"secret"])


def test_files_that_cannot_be_used_are_named_with_the_fix(tmp_path: Path):
    authority = Authority(tmp_path)
    certificate, key = authority.sign("client", key_password="closed")
    base = KafkaConfig(bootstrap_servers=("127.0.0.1:9092",), security_protocol="SSL")
    (tmp_path / "empty").touch()
    for ca_file in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(KafkaConfigInvalid, match=r"KAFKA_SSL_CA_FILE '.*' cannot be used: .*PEM"):
            replace(base, ssl_ca_file=ca_file).client_options()
    with pytest.raises(
        KafkaConfigInvalid, match=r"KAFKA_SSL_KEY_FILE '.*' cannot be used: .*without a password"
    ):
        replace(base, ssl_cert_file=certificate, ssl_key_file=key).client_options()


def test_faust_is_told_the_same():
    plain = KafkaConfig.at("one:9092,two:9092")
    assert plain.faust_broker() == ["aiokafka://one:9092", "aiokafka://two:9092"]
    assert plain.faust_credentials() is None
    encrypted = replace(plain, security_protocol="SSL").faust_credentials()
    assert isinstance(encrypted, faust.SSLCredentials)
    login = replace(
        plain,
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username=USER,
        sasl_password=PASSWORD,
    ).faust_credentials()
    assert isinstance(login, faust.SASLCredentials)
    assert (login.protocol.value, login.mechanism.value) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (login.username, login.password) == (USER, PASSWORD)


def test_a_password_is_not_shown():
    assert "sesame" not in repr(replace(KafkaConfig.at("one:9092"), sasl_password=PASSWORD))


# --- quiet ------------------------------------------------------------------------------------------------------------


def line(text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("aiokafka.client", logging.ERROR, "client.py", 1, text, arguments, None)


def test_one_line_of_a_kind_is_let_through_and_the_next_tells_how_many_were_not():
    one_of_a_kind = OneOfAKind(every_s=0.2)
    assert one_of_a_kind.filter(line("no way to %s", "one"))
    assert not any(one_of_a_kind.filter(line("no way to %s", name)) for name in ("one", "two", "three"))
    assert one_of_a_kind.filter(line("another thing"))
    until_s = time.monotonic() + WAIT_S
    while not one_of_a_kind.filter(last := line("no way to %s", "four")):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert last.getMessage().startswith("no way to four (and ")


async def test_while_the_broker_is_away_the_clients_say_each_thing_once(
    own_broker: KafkaServer, caplog: pytest.LogCaptureFixture
):
    config = KafkaConfig.at(own_broker.bootstrap_servers)
    (log,) = PrivateTopics(own_broker.bootstrap_servers).create(LOG)
    async with open_producer(config, "test") as producer, open_consumer(config, "test", log.name):
        await producer.send_and_wait(log.name, b"before", partition=0)
        await asyncio.to_thread(own_broker.kill)
        sent = await producer.send(log.name, b"meanwhile", partition=0)
        started_s = time.monotonic()
        while time.monotonic() - started_s < 3:
            await asyncio.wait([sent], timeout=0.5)
        await asyncio.to_thread(own_broker.start)
        async with asyncio.timeout(WAIT_S):
            await sent
    said = [(record.name, record.msg) for record in caplog.records if record.name.startswith("aiokafka")]
    assert len(said) == len(set(said))
    assert len(said) <= 10


def test_quietening_twice_adds_nothing():
    quieten_clients()
    before = list(logging.getLogger("aiokafka").filters)
    quieten_clients()
    assert logging.getLogger("aiokafka").filters == before
    assert logging.getLogger("aiokafka").level == logging.WARNING
