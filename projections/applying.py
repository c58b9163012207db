"""One batch of records onto the tables of several projections, inside the caller's transaction."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psycopg

from projections import tables
from projections.checkpoints import Connection, Parked, Progress, parked_at
from projections.fold import Fold, RowExists, edited
from projections.projection import Change, Forget
from schemas.records import AnyRecord, Record, Unreadable

log_of = logging.getLogger(__name__)

Readable = AnyRecord | Unreadable


class BatchRefused(Exception):
    """The database refused some row of the batch; applied one by one, only the culprit's stream is parked."""


async def apply(
    connection: Connection, work: Progress, records: Sequence[Readable]
) -> tuple[int, list[Parked]]:
    """Write what the records mean for a projection; how many rows that were, and which streams it had to park.

    Does not move the projection's positions. A parked stream is added to `work.waiting`.

    Raises:
        BatchRefused: the transaction is lost.
    """
    batches, parked = _changes(work, records)
    count = begun = 0
    try:
        for end, changes in enumerate(batches):
            if changes and type(changes[0]) is Forget:
                count += await _write(connection, work, batches[begun:end])
                count += await _forget(connection, work, changes)
                begun = end + 1
        count += await _write(connection, work, batches[begun:])
    except (RowExists, psycopg.IntegrityError, psycopg.DataError) as refused:
        raise BatchRefused(str(refused)) from refused
    return count, parked


async def _write(connection: Connection, work: Progress, batches: Sequence[Sequence[Change]]) -> int:
    if not batches:
        return 0
    wanted = edited(batches)
    loaded = await tables.load(connection, work.shapes, wanted) if wanted else {}
    fold = Fold(work.shapes, loaded)
    for changes in batches:
        fold.add(changes)
    return await tables.write(connection, work.shapes, fold)


async def _forget(connection: Connection, work: Progress, changes: Sequence[Change]) -> int:
    found = [change for change in changes if isinstance(change, Forget)]
    if work.forgets is not None:
        work.forgets += found
        return 0
    return sum([await tables.forget(connection, change) for change in found])


async def apply_one_by_one(
    connection: Connection, work: Progress, records: Sequence[Readable]
) -> tuple[int, list[Parked]]:
    """As `apply`, each record for itself, so that one that is refused parks its stream and harms no other."""
    count = 0
    parked: list[Parked] = []
    for record in records:
        if not work.concerns(record):
            continue
        try:
            async with connection.transaction():
                rows, stopped = await apply(connection, work, [record])
        except BatchRefused as refused:
            work.waiting.add(record.stream_id)
            rows, stopped = 0, [parked_at(work, record, refused)]
        count += rows
        parked += stopped
    return count, parked


def _changes(work: Progress, records: Sequence[Readable]) -> tuple[list[list[Change]], list[Parked]]:
    batches: list[list[Change]] = []
    parked: list[Parked] = []
    handled, positions, waiting = work.handled, work.positions, work.waiting
    for record in records:
        # Most records are of types that the projection does not handle, and no stream waits: decided without a call.
        concerned = record.type in handled and record.position > positions[record.shard]
        if not concerned and (type(record) is Record or not work.concerns(record)):
            continue
        if waiting and record.stream_id in waiting:
            continue
        try:
            if isinstance(record, Unreadable):
                raise record.error
            batches.append(work.projection.changes(record))
        except Exception as error:
            log_of.exception("projection %s parks stream %s", work.projection.name, record.stream_id)
            waiting.add(record.stream_id)
            parked.append(parked_at(work, record, error))
    return batches, parked
