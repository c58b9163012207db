"""`oshaani topics`: the topics of the cluster, made as they should be, and compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from oshaani.cli import show
from oshaani.cli.session import quiet_settings, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed
from oshaani.settings import Settings

if TYPE_CHECKING:
    from adapters.kafka.admin import TopicState
    from adapters.kafka.clients import KafkaConfig

app = typer.Typer()
topics = typer.Typer(help="The topics of the Kafka cluster.", no_args_is_help=True)
app.add_typer(topics, name="topics")


@topics.command()
def apply(as_json: AsJson = False) -> None:
    """Make the topics that are missing and correct the settings of the others; nothing is deleted. Safe to run again."""
    from adapters.kafka import admin
    from schemas.topics import TOPICS

    settings = quiet_settings()
    changes = run(admin.apply(reached(settings), TOPICS, settings.kafka_partitions))
    if as_json:
        show.document([asdict(each) for each in changes])
    elif not changes:
        show.line(f"All {len(TOPICS)} topics are as they should be.")
    else:
        show.table(("topic", "change"), [(each.topic, each.change) for each in changes])


@topics.command("show")
def show_topics(as_json: AsJson = False) -> None:
    """Show each topic, what it holds, and what differs from how it should be; exit 1 when something does."""
    from adapters.kafka import admin
    from schemas.topics import TOPICS

    settings = quiet_settings()
    states = run(admin.show(reached(settings), TOPICS, settings.kafka_partitions))
    if as_json:
        show.document([{**asdict(each), "records": each.records} for each in states])
    else:
        _print(states)
    raise typer.Exit(1 if any(each.differences for each in states) else 0)


def reached(settings: Settings) -> KafkaConfig:
    """How the cluster is reached; see `known`.

    Raises:
        Failed: there is none.
    """
    config = known(settings)
    if config is None:
        raise Failed(
            "there is no Kafka: set KAFKA_BOOTSTRAP_SERVERS, or start one on this machine with `oshaani up --kafka`"
        )
    return config


def known(settings: Settings) -> KafkaConfig | None:
    """The configured cluster, or that of a program which runs on the data folder; None without either."""
    from adapters.kafka.broker import running_servers
    from adapters.kafka.clients import KafkaConfig

    if settings.kafka_bootstrap_servers:
        return KafkaConfig.of(settings)
    servers = running_servers(settings.data_dir)
    return None if servers is None else KafkaConfig.at(servers)


def _print(states: Sequence[TopicState]) -> None:
    rows = [
        (
            each.topic,
            str(each.partitions),
            str(each.replicas),
            _kept(each),
            str(each.records),
            "; ".join(each.differences) or "as it should be",
        )
        for each in states
    ]
    show.table(("topic", "partitions>", "replicas>", "kept", "records>", "state"), rows)
    if any(each.differences for each in states):
        show.line(
            "`oshaani topics apply` makes what is missing and corrects settings; partitions stay as they are."
        )


def _kept(state: TopicState) -> str:
    """How long records are kept, in the largest unit that is whole."""
    if state.settings.get("cleanup.policy") == "compact":
        return "latest of each key"
    retention_s = int(state.settings.get("retention.ms", 0)) // 1000
    for unit, seconds in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if retention_s >= seconds and retention_s % seconds == 0:
            return f"{retention_s // seconds} {unit}"
    return f"{retention_s} s" if retention_s else ""
