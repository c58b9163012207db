"""`oshaani projections` and `oshaani parked`: how the read models are, and what they could not go on with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from oshaani.cli import show
from oshaani.cli.session import check_read_models, open_core, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from oshaani.wiring import Core
    from projections.parking import ParkedStream, Parking

app = typer.Typer()
projections = typer.Typer(help="Read models: how far they are, and building them anew.", no_args_is_help=True)
parked = typer.Typer(help="Streams that a read model could not go on with.", no_args_is_help=True)
app.add_typer(projections, name="projections")
app.add_typer(parked, name="parked")

Name = Annotated[str, typer.Argument(help="Name of a projection; see `oshaani projections list`.")]
Stream = Annotated[UUID, typer.Argument(help="Id of the stream.")]


@dataclass(frozen=True, slots=True)
class ProjectionLine:
    """A projection as listed. `built_version` is None when its tables are not there."""

    name: str
    version: int
    built_version: int | None
    lag_events: int | None
    parked_streams: int


# --- projections --------------------------------------------------------------------------------------------------------


@projections.command("list")
def list_projections(as_json: AsJson = False) -> None:
    """List the read models, their versions, and how many events they are behind."""
    found = run(_list())
    if as_json:
        show.document([asdict(each) for each in found])
        return
    rows = [
        (
            each.name,
            str(each.version),
            "-" if each.built_version is None else str(each.built_version),
            "-" if each.lag_events is None else str(each.lag_events),
            str(each.parked_streams),
        )
        for each in found
    ]
    show.table(("projection", "version>", "built>", "events behind>", "parked>"), rows)


@projections.command()
def rebuild(name: Name, as_json: AsJson = False) -> None:
    """Build a read model anew from the log; the old one serves until the new one takes its place."""
    with _progress_bar(name, not as_json) as report:
        event_count = run(_rebuild(name, report))
    if as_json:
        show.document({"projection": name, "events": event_count})
    else:
        show.line(f"{name} is rebuilt from {event_count} events.")


async def _list() -> list[ProjectionLine]:
    from projections.catalogue import PROJECTIONS

    async with open_core() as core:
        cursor = await _checkpoints(core)
        built = {name: (version, lag, waiting) for name, version, lag, waiting in cursor}
        return [
            ProjectionLine(each.name, each.version, *built.get(each.name, (None, None, 0)))
            for each in PROJECTIONS
        ]


async def _checkpoints(core: Core) -> list[tuple[str, int, int, int]]:
    from adapters.postgres.pool import deadline

    async with core.pool.connection() as connection:
        with deadline(connection):
            cursor = await connection.execute("SELECT to_regclass('oshaani.checkpoint') IS NOT NULL")
            row = await cursor.fetchone()
            if row is None or not row[0]:
                return []
            cursor = await connection.execute(
                """
                SELECT c.projection, c.version,
                       (SELECT sum(greatest(0, s.head - coalesce(c.positions[s.shard + 1], 0)))::bigint FROM shard s),
                       (SELECT count(*) FROM parked p WHERE p.projection = c.projection)
                  FROM checkpoint c
                """
            )
            found: list[tuple[str, int, int, int]] = await cursor.fetchall()
            return found


async def _rebuild(name: str, report: Callable[[int, int], None]) -> int:
    from projections.checkpoints import migrate

    _check_name(name)
    async with open_core() as core:
        async with core.pool.connection() as connection:
            await migrate(connection)
        seen = 0

        def progress(done: int, total: int) -> None:
            nonlocal seen
            seen = done
            report(done, total)

        await core.projector.rebuild(name, progress)
        return seen


def _check_name(name: str) -> None:
    from projections.catalogue import PROJECTIONS

    names = [each.name for each in PROJECTIONS]
    if name not in names:
        raise Failed(f"there is no projection {name!r}; there are {', '.join(names)}")


@contextmanager
def _progress_bar(name: str, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- parked streams -----------------------------------------------------------------------------------------------------


@parked.command("list")
def list_parked(as_json: AsJson = False) -> None:
    """List the streams that wait, and why."""
    found = run(_list_parked())
    if as_json:
        show.document([asdict(each) for each in found])
    elif not found:
        show.line("No stream waits.")
    else:
        rows = [
            (
                each.projection,
                str(each.stream_id),
                f"{each.shard}:{each.position}",
                show.instant(each.parked_at),
                each.error,
            )
            for each in found
        ]
        show.table(("projection", "stream", "event", "since", "why"), rows)


@parked.command()
def retry(projection: Name, stream: Stream, as_json: AsJson = False) -> None:
    """Apply the event that failed and those behind it once more; exit 1 when it fails again."""
    _finish(projection, stream, run(_go_on(projection, stream, skip=False)), as_json)


@parked.command()
def skip(
    projection: Name,
    stream: Stream,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave out the event that failed and apply those behind it: the read model will lack that event."""
    if not yes:
        if not sys.stdin.isatty():
            raise Failed(
                "skipping leaves an event out of the read model for good; say --yes if that is meant"
            )
        typer.confirm("Leave the event out of this read model for good?", abort=True)
    _finish(projection, stream, run(_go_on(projection, stream, skip=True)), as_json)


async def _list_parked() -> list[ParkedStream]:
    async with open_core() as core:
        await check_read_models(core)
        return await _parking(core).streams()


async def _go_on(projection: str, stream: UUID, *, skip: bool) -> bool:
    from projections.parking import NotParked

    _check_name(projection)
    async with open_core() as core:
        await check_read_models(core)
        parking = _parking(core)
        try:
            return await (parking.skip if skip else parking.retry)(projection, stream)
        except NotParked as nothing:
            raise Failed(f"{nothing} does not wait; see `oshaani parked list`") from nothing


def _parking(core: Core) -> Parking:
    from adapters.postgres.pool import deadline
    from projections.parking import Parking

    return Parking(core.pool, deadline, core.log, core.records)


def _finish(projection: str, stream: UUID, applied: bool, as_json: bool) -> None:
    if as_json:
        show.document({"projection": projection, "stream_id": stream, "applied": applied})
    elif applied:
        show.line(f"{projection} is level with stream {stream}.")
    else:
        show.line(f"{projection} could not go on with stream {stream}; see `oshaani parked list`.")
    raise typer.Exit(0 if applied else 1)
