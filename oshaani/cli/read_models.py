"""`oshaani projections`: how the read models are, and building them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from oshaani.cli import show
from oshaani.cli.session import open_core, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from oshaani.wiring import Core

app = typer.Typer()
projections = typer.Typer(help="Read models: how far they are, and building them anew.", no_args_is_help=True)
app.add_typer(projections, name="projections")

Name = Annotated[str, typer.Argument(help="Name of a projection; see `oshaani projections list`.")]


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
