"""`oshaani api`, `relay`, `projector`, `processor`: one process of the distributed layout each."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from domain.ids import SHARDS
from oshaani.cli import logs, show
from oshaani.cli.session import is_migrated, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed
from oshaani.settings import Settings, read_settings
from schemas.topics import LOG, PROCESSORS

app = typer.Typer()

Role = Callable[[Settings, str, Callable[[str], None]], Awaitable[None]]


@app.command()
def api() -> None:
    """Serve HTTP; needs DATABASE_URL and KAFKA_BOOTSTRAP_SERVERS, as all roles do."""
    from oshaani import roles

    run_role(roles.api)


@app.command()
def relay(  # noqa: PLR0913 - one argument for each option
    verify: Annotated[bool, typer.Option("--verify", help="Prove that a topic is the log, and end.")] = False,
    resend: Annotated[
        bool, typer.Option("--resend", help="Have the log sent to a topic again from --from, and end.")
    ] = False,
    topic: Annotated[str, typer.Option(help="The topic that is verified or sent to.")] = LOG.name,
    shard: Annotated[int | None, typer.Option(min=0, max=SHARDS - 1, help="Only this shard.")] = None,
    since: Annotated[
        int | None, typer.Option("--from", min=1, help="From this position of each shard.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry the log to Kafka; several share the shards. Or look after what it has carried."""
    if not verify and not resend:
        if since is not None or shard is not None:
            raise typer.BadParameter("--from and --shard go with --verify or --resend")
        from oshaani import roles

        run_role(roles.relay)
        return
    from oshaani.cli import relaying

    shards = range(SHARDS) if shard is None else (shard,)
    if resend:
        if since is None:
            raise typer.BadParameter("--resend needs --from: the first position to send again")
        relaying.resend(topic, dict.fromkeys(shards, since), as_json)
    else:
        positions = None if since is None else dict.fromkeys(shards, since - 1)
        relaying.verify(topic, positions, as_json)


@app.command()
def projector() -> None:
    """Keep the read models; several stand by for each other."""
    from oshaani import roles

    run_role(roles.projector)


@app.command()
def processor(name: Annotated[str, typer.Argument(help=f"One of {', '.join(PROCESSORS)}.")]) -> None:
    """Run one of the stream processors; several share its records."""
    if name not in PROCESSORS:
        raise typer.BadParameter(f"there is no processor {name!r}; there are {', '.join(PROCESSORS)}")
    from oshaani import roles

    run_role(lambda settings, dsn, announce: roles.processor(settings, dsn, announce, name))


def run_role(role: Role) -> None:
    """Run a role until a signal ends it; ends the process."""
    logs.set_up("info")
    settings = read_settings()
    logs.set_up(settings.log_level)
    if settings.database_url is None or not settings.kafka_bootstrap_servers:
        raise Failed(
            "DATABASE_URL and KAFKA_BOOTSTRAP_SERVERS must say where Postgres and Kafka are; "
            "`oshaani up --kafka` starts all of it on this machine"
        )
    run(_live(role, settings, settings.database_url))
    # All is closed and saved; a thread that still waits for a slow provider must not keep the process for its time limit.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


async def _live(role: Role, settings: Settings, dsn: str) -> None:
    if not await is_migrated(dsn):
        raise Failed("the database is not set up; run `oshaani migrate`")
    await role(settings, dsn, show.line)
