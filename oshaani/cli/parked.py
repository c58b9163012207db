"""`oshaani parked`: streams that a read model or a processor could not go on with, and what is to become of them."""

from __future__ import annotations

import asyncio
import getpass
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal
from uuid import UUID

import typer

from oshaani.cli import show
from oshaani.cli.session import check_read_models, open_core, run
from oshaani.cli.show import AsJson
from oshaani.cli.trouble import Failed

if TYPE_CHECKING:
    from adapters.postgres.parked_records import PostgresParkedRecords
    from domain.parked import Skipped, Stuck, What
    from oshaani.wiring import Core
    from projections.parking import Parking

WAIT_S = 8.0  # how long a worker may take to do what it is asked; then it is left to it
LOOK_S = 0.2

app = typer.Typer()
parked = typer.Typer(
    help="Streams that a read model or a processor could not go on with.", no_args_is_help=True
)
app.add_typer(parked, name="parked")

Name = Annotated[str, typer.Argument(help="The projection or processor; see `oshaani parked list`.")]
Stream = Annotated[UUID, typer.Argument(help="Id of the stream.")]
Kind = Literal["projection", "processor"]
Of = Annotated[Kind | None, typer.Option("--of", help="What NAME is, where both are called so.")]


@dataclass(frozen=True, slots=True)
class Line:
    """A parked stream as listed. `asked`: what an operator wants its processor to do, "" when nothing."""

    kind: Kind
    name: str
    stream_id: UUID
    shard: int
    position: int
    error: str
    parked_at: datetime
    asked: str = ""
    asked_by: str = ""
    reason: str = ""


@parked.command("list")
def list_parked(as_json: AsJson = False) -> None:
    """List the streams that wait, and why."""
    found = run(_list())
    if as_json:
        show.document([asdict(each) for each in found])
    elif not found:
        show.line("No stream waits.")
    else:
        rows = [
            (
                each.kind,
                each.name,
                str(each.stream_id),
                f"{each.shard}:{each.position}",
                show.instant(each.parked_at),
                f"{each.asked} by {each.asked_by}" if each.asked else "",
                each.error,
            )
            for each in found
        ]
        show.table(("what", "name", "stream", "event", "since", "asked for", "why"), rows)


@parked.command()
def retry(name: Name, stream: Stream, of: Of = None, as_json: AsJson = False) -> None:
    """Handle the event that failed and those behind it once more; exit 1 when it fails again."""
    _finish(name, stream, run(_go_on(name, stream, of, "retry")), as_json)


@parked.command()
def skip(  # noqa: PLR0913 - each is an option
    name: Name,
    stream: Stream,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept with the event that is left out.")],
    of: Of = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave out the event that failed and go on with those behind it: it will never be handled by itself."""
    if not reason.strip():
        raise Failed("leaving an event out needs a reason; say it with --reason")
    if not yes:
        if not sys.stdin.isatty():
            raise Failed("skipping leaves an event out for good; say --yes if that is meant")
        typer.confirm("Leave the event out for good?", abort=True)
    _finish(name, stream, run(_go_on(name, stream, of, "skip", reason)), as_json)


@parked.command()
def skipped(as_json: AsJson = False) -> None:
    """List the events that were left out, by whom and why."""
    found = run(_skipped())
    if as_json:
        show.document([asdict(each) for each in found])
    elif not found:
        show.line("No event was left out.")
    else:
        rows = [
            (
                each.processor,
                str(each.stream_id),
                f"{each.stuck.shard}:{each.stuck.position}",
                each.stuck.type,
                show.instant(each.skipped_at),
                each.by,
                each.reason,
            )
            for each in found
        ]
        show.table(("name", "stream", "event", "type", "at", "by", "reason"), rows)


async def _list() -> list[Line]:
    async with open_core() as core:
        return await _lines(core)


async def _lines(core: Core) -> list[Line]:
    lines = [
        Line(
            "processor",
            each.processor,
            each.stream_id,
            each.stuck.shard,
            each.stuck.position,
            each.stuck.error,
            each.parked_at,
            *((each.asked.what, each.asked.by, each.asked.reason) if each.asked else ()),
        )
        for each in await _records(core).streams()
    ]
    if await _are_read_models_built(core):
        lines += [
            Line(
                "projection",
                each.projection,
                each.stream_id,
                each.shard,
                each.position,
                each.error,
                each.parked_at,
            )
            for each in await _parking(core).streams()
        ]
    return sorted(lines, key=lambda line: line.parked_at)


async def _skipped() -> list[Skipped]:
    async with open_core() as core:
        return await _records(core).skipped()


async def _go_on(name: str, stream: UUID, of: Kind | None, what: What, reason: str = "") -> bool | None:
    """Whether the stream goes on; None when its processor has not taken notice yet."""
    async with open_core() as core:
        if await _kind_of(core, name, stream, of) == "processor":
            return await _ask(core, name, stream, what, reason)
        await check_read_models(core)
        return await _apply(core, name, stream, what, reason)


async def _ask(core: Core, processor: str, stream: UUID, what: What, reason: str) -> bool | None:
    from domain.parked import Asked, NotParked

    records = _records(core)
    try:
        await records.ask(processor, stream, Asked(what, _operator(), reason))
    except NotParked as nothing:
        raise Failed(f"{nothing} does not wait; see `oshaani parked list`") from nothing
    until_s = time.monotonic() + WAIT_S
    while time.monotonic() < until_s:
        await asyncio.sleep(LOOK_S)
        if not await records.waits(processor, stream):
            return True
        if stream not in {each.stream_id for each in await records.asked(processor)}:
            return False
    return None


async def _apply(core: Core, projection: str, stream: UUID, what: What, reason: str) -> bool:
    from domain.parked import Skipped
    from projections.parking import NotParked

    parking = _parking(core)
    try:
        if what == "retry":
            return await parking.retry(projection, stream)
        stuck = await _stuck(core, parking, projection, stream)
        # Noted before it is done: rather a note too many than one that is missing.
        note = Skipped(projection, stream, stuck, _operator(), reason, datetime.now(UTC))
        await _records(core).note_skip([note])
        return await parking.skip(projection, stream)
    except NotParked as nothing:
        raise Failed(f"{nothing} does not wait; see `oshaani parked list`") from nothing


async def _stuck(core: Core, parking: Parking, projection: str, stream: UUID) -> Stuck:
    from domain.parked import Stuck
    from projections.parking import NotParked

    for each in await parking.streams():
        if (each.projection, each.stream_id) == (projection, stream):
            rows = await core.log.read_after({each.shard: each.position - 1}, 1)
            version, event_type = (rows[0].stream_version, rows[0].type) if rows else (0, "?")
            return Stuck(each.shard, each.position, version, event_type, each.error)
    raise NotParked(f"stream {stream} in projection {projection!r}")


async def _kind_of(core: Core, name: str, stream: UUID, of: Kind | None) -> Kind:
    """What is meant: some processors are called like the projection that shows what they did."""
    from projections.catalogue import PROJECTIONS
    from schemas.topics import PROCESSORS

    names: dict[Kind, tuple[str, ...]] = {
        "projection": tuple(each.name for each in PROJECTIONS),
        "processor": PROCESSORS,
    }
    kinds = [kind for kind, known in names.items() if name in known and of in (None, kind)]
    if not kinds:
        known = sorted({*names["projection"], *names["processor"]} if of is None else names[of])
        raise Failed(f"there is no {of or 'projection or processor'} {name!r}; there are {', '.join(known)}")
    if len(kinds) == 1:
        return kinds[0]
    waiting = {line.kind for line in await _lines(core) if (line.name, line.stream_id) == (name, stream)}
    if len(waiting) > 1:
        raise Failed(f"the projection and the processor {name} both wait; say which with --of")
    return waiting.pop() if waiting else kinds[0]


def _records(core: Core) -> PostgresParkedRecords:
    from adapters.postgres.parked_records import PostgresParkedRecords

    return PostgresParkedRecords(core.pool)


def _parking(core: Core) -> Parking:
    from adapters.postgres.pool import deadline
    from projections.parking import Parking

    return Parking(core.pool, deadline, core.log, core.records)


async def _are_read_models_built(core: Core) -> bool:
    try:
        await check_read_models(core)
    except Failed:
        return False
    return True


def _operator() -> str:
    """Who asks, as far as this machine knows."""
    try:
        return f"operator:{getpass.getuser()}"
    except (OSError, KeyError):
        return "operator"


def _finish(name: str, stream: UUID, applied: bool | None, as_json: bool) -> None:
    if as_json:
        show.document({"name": name, "stream_id": stream, "applied": applied})
    elif applied:
        show.line(f"{name} is level with stream {stream}.")
    elif applied is None:
        show.line(f"It is asked for; a worker of {name} does it as soon as one runs.")
    else:
        show.line(f"{name} could not go on with stream {stream}; see `oshaani parked list`.")
    raise typer.Exit(1 if applied is False else 0)
