from __future__ import annotations

from adapters.kafka.broker import KafkaServer
from adapters.kafka.node import free_ports
from schemas.topics import LOG, TOPICS
from tests.oshaani.cli.conftest import Cli


def test_topics_are_made_shown_and_left_when_they_are_as_they_should_be(cli: Cli, own_broker: KafkaServer):
    servers = own_broker.bootstrap_servers
    missing = cli("topics", "show", KAFKA_BOOTSTRAP_SERVERS=servers)
    assert missing.code == 1
    assert "`oshaani topics apply`" in missing.out

    made = cli("topics", "apply", "--json", KAFKA_BOOTSTRAP_SERVERS=servers)
    assert made.code == 0, made.err
    assert [each["topic"] for each in made.json] == [topic.name for topic in TOPICS]

    again = cli("topics", "apply", KAFKA_BOOTSTRAP_SERVERS=servers)
    assert (again.code, again.out) == (0, f"All {len(TOPICS)} topics are as they should be.\n")

    shown = cli("topics", "show", KAFKA_BOOTSTRAP_SERVERS=servers)
    assert shown.code == 0
    (line,) = [line for line in shown.out.splitlines() if line.startswith(f"{LOG.name} ")]
    assert line.split() == [LOG.name, "8", "1", "7", "d", "0", "as", "it", "should", "be"]

    (state,) = [
        each
        for each in cli("topics", "show", "--json", KAFKA_BOOTSTRAP_SERVERS=servers).json
        if each["topic"] == LOG.name
    ]
    assert (state["partitions"], state["records"], state["differences"]) == (8, 0, [])


def test_another_number_of_partitions_is_refused_with_the_way_out(cli: Cli, own_broker: KafkaServer):
    servers = own_broker.bootstrap_servers
    assert cli("topics", "apply", KAFKA_BOOTSTRAP_SERVERS=servers, OSHAANI_KAFKA_PARTITIONS="2").code == 0
    refused = cli("topics", "apply", KAFKA_BOOTSTRAP_SERVERS=servers)
    assert refused.code == 1
    assert f"{LOG.name} has 2 partitions, not 8" in refused.err
    assert "OSHAANI_KAFKA_PARTITIONS" in refused.err
    assert refused.err.count("\n") == 1


def test_a_cluster_that_is_away_is_said_in_one_line(cli: Cli):
    where = f"127.0.0.1:{free_ports()[0]}"
    ran = cli("topics", "show", KAFKA_BOOTSTRAP_SERVERS=where)
    assert ran.code == 1
    assert f"oshaani: Kafka at {where} cannot be used" in ran.err


def test_without_any_cluster_it_is_said_how_to_have_one(cli: Cli):
    ran = cli("topics", "apply")
    assert ran.code == 1
    assert "set KAFKA_BOOTSTRAP_SERVERS, or start one on this machine with `oshaani up --kafka`" in ran.err


def test_a_login_without_its_password_is_refused_before_anything_is_asked(cli: Cli):
    ran = cli(
        "topics",
        "show",
        KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:9",
        KAFKA_SECURITY_PROTOCOL="SASL_SSL",
        KAFKA_SASL_USERNAME="oshaani",
    )
    assert ran.code == 1
    assert "KAFKA_SASL_PASSWORD is missing" in ran.err


def test_an_unknown_word_is_wrong_usage(cli: Cli):
    assert cli("topics", "destroy").code == 2
