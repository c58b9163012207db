"""`oshaani relay --verify` and `--resend`: is a topic the log, and if not, send again what it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer
from aiokafka.errors import KafkaError

from adapters.kafka.relay_check import Report, TopicMissing
from adapters.kafka.relay_check import resend as send_again
from adapters.kafka.relay_check import verify as compare
from adapters.postgres.leases import PostgresLeases
from oshaani.cli import show
from oshaani.cli.session import open_core, run
from oshaani.cli.topics import reached
from oshaani.cli.trouble import Failed
from oshaani.roles.relay import work_types
from schemas.topics import LOG

if TYPE_CHECKING:
    from domain.leases import Mark

FINDINGS_MAX = 20  # shown to people of each kind


def verify(topic: str, from_positions: Mapping[int, int] | None, as_json: bool) -> None:
    """Compare and report; exit 1 when something is missing or wrong."""
    report = run(_verify(topic, from_positions))
    if as_json:
        show.document(report.as_json())
    else:
        _print(report)
    raise typer.Exit(0 if report.is_equal else 1)


def resend(topic: str, from_positions: Mapping[int, int], as_json: bool) -> None:
    """Set the relay back and report from where it goes on."""
    marks = run(_resend(topic, from_positions))
    if as_json:
        show.document([mark._asdict() for mark in marks])
    elif not marks:
        show.line(f"{topic} has nothing from there on to send again.")
    else:
        show.table(
            ("shard>", "sent again after>"), [(str(mark.shard), str(mark.position)) for mark in sorted(marks)]
        )


async def _verify(topic: str, from_positions: Mapping[int, int] | None) -> Report:
    types = work_types()
    if topic != LOG.name and topic not in types:
        raise Failed(
            f"{topic!r} is not a topic that the relay writes; those are {LOG.name}, {', '.join(types)}"
        )
    async with open_core() as core:
        try:
            config, leases = reached(core.settings), PostgresLeases(core.pool)
            return await compare(core.log, leases, config, topic, from_positions, types.get(topic))
        except TopicMissing as missing:
            raise Failed(f"{missing}; `oshaani topics apply` makes it") from missing
        except KafkaError as failure:
            raise Failed(f"the broker does not answer: {failure!r}; see `oshaani doctor`") from failure


async def _resend(topic: str, from_positions: Mapping[int, int]) -> list[Mark]:
    async with open_core() as core:
        return await send_again(PostgresLeases(core.pool), topic, from_positions)


def _print(report: Report) -> None:
    show.line(
        f"{report.topic}: {report.event_count} events of the log in {report.record_count} records, "
        f"{report.duplicate_count} of them again, {report.out_of_order_count} out of order"
    )
    for gap in report.missing[:FINDINGS_MAX]:
        show.line(f"  missing  shard {gap.shard}, positions {gap.first} to {gap.last}", "red")
    for wrong in report.wrong[:FINDINGS_MAX]:
        show.line(f"  wrong    partition {wrong.partition}, offset {wrong.offset}: {wrong.what}", "red")
    if report.is_equal:
        show.line("It is the log.", "green")
    else:
        show.line(
            f"{report.missing_count} events are missing and {report.wrong_count} records are wrong; "
            "`oshaani relay --resend --from POSITION` sends again"
        )
