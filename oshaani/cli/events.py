"""`oshaani events`: the log as it is."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from oshaani.cli import show
from oshaani.cli.names import turn_id_of
from oshaani.cli.session import open_core, quiet_settings, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from domain.event_log import StoredEvent
    from oshaani.cli.event_view import Shown
    from oshaani.cli.log_search import Filter
    from oshaani.wiring import Core

app = typer.Typer()
events = typer.Typer(
    help="The event log: the latest events, single ones, whole streams.", no_args_is_help=True
)
app.add_typer(events, name="events")

Personal = Annotated[bool, typer.Option("--personal", help="Show personal content too; mind who is looking.")]


@events.command()
def tail(  # noqa: PLR0913 - one argument for each option
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what comes; Ctrl-C ends it.")
    ] = False,
    lines: Annotated[
        int, typer.Option("-n", "--lines", min=0, max=100_000, help="How many of the latest.")
    ] = 20,
    type: Annotated[str | None, typer.Option(help="Of this type, for example 'Turn.*'.")] = None,
    stream: Annotated[UUID | None, typer.Option(help="Of this stream.")] = None,
    tenant: Annotated[UUID | None, typer.Option(help="Of this tenant (the id of a user).")] = None,
    turn: Annotated[
        str | None, typer.Option(help="About this turn (req-… or its id), in any stream.")
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option(help="The records of this topic, instead of the log; see `oshaani topics show`."),
    ] = None,
    personal: Personal = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line.")] = False,
) -> None:
    """Print the latest events, oldest first: of the log, or of a topic."""
    from oshaani.cli.log_search import Filter

    if topic is not None:
        if type or stream or tenant or turn or personal:
            raise typer.BadParameter("--topic goes with --follow, --lines and --json only")
        with suppress(KeyboardInterrupt):
            run(_tail_topic(topic, lines, follow, as_json))
        return
    wanted = Filter(type, stream, tenant, turn_id_of(turn) if turn else None)
    with suppress(KeyboardInterrupt):
        run(_tail(wanted, lines, follow, personal, as_json))


@events.command("show")
def show_events(
    what: Annotated[str, typer.Argument(help="An event's id, a stream's id, or shard:position.")],
    personal: Personal = False,
    as_json: AsJson = False,
) -> None:
    """Print one event with all that is known of it, or a stream from its beginning."""
    found, is_stream = run(_show(what, personal))
    if as_json:
        show.document(found if is_stream else found[0])
        return
    from oshaani.cli.event_view import print_line, print_whole

    for view in found:
        if is_stream:
            print_line(view)
        else:
            print_whole(view)


async def _tail(wanted: Filter, count: int, follow: bool, personal: bool, as_json: bool) -> None:
    from oshaani.cli import log_search

    async with open_core() as core:
        heads = await core.log.heads()
        if count:
            await _print(core, await log_search.latest(core, wanted, count, heads), personal, as_json)
        if follow:
            async for row in log_search.follow(core, wanted, heads):
                await _print(core, [row], personal, as_json)


async def _tail_topic(topic: str, count: int, follow: bool, as_json: bool) -> None:
    from oshaani.cli import topic_tail
    from oshaani.cli.topics import reached

    async for view in topic_tail.records(reached(quiet_settings()), topic, count, follow):
        if as_json:
            show.json_line(view)
        else:
            topic_tail.print_line(view)


async def _print(core: Core, rows: list[StoredEvent], personal: bool, as_json: bool) -> None:
    from oshaani.cli.event_view import print_line, views

    for view in await views(core, rows, personal):
        if as_json:
            show.json_line(view)
        else:
            print_line(view)


async def _show(what: str, personal: bool) -> tuple[list[Shown], bool]:
    from oshaani.cli.event_view import views

    async with open_core() as core:
        rows, is_stream = await _find(core, what)
        if not rows:
            raise Failed(f"there is no event, stream or position {what!r} in the log")
        return await views(core, rows, personal), is_stream


async def _find(core: Core, what: str) -> tuple[list[StoredEvent], bool]:
    from oshaani.cli import log_search
    from oshaani.cli.streams import first_event, whole_stream

    if place := re.fullmatch(r"(\d{1,2}):(\d{1,18})", what, re.ASCII):
        row = await log_search.at(core, int(place[1]), int(place[2]))
        return ([row] if row else []), False
    try:
        id = UUID(what.partition("-")[2] if what.startswith(("req-", "conv-")) else what)
    except ValueError:
        raise Failed(f"{what!r} is neither an id nor shard:position") from None
    first = await first_event(core.log, id)
    if first is not None:
        return await whole_stream(core.log, first.shard, id), True
    row = await log_search.with_id(core, id)
    return ([row] if row else []), False
