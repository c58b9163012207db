"""A row of the log goes through a topic and comes back as it was."""

from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.event_log import StoredEvent
from schemas.records import PART_BYTES_MAX
from schemas.wire import FORMAT, MESSAGE_BYTES_MAX, Malformed, TooLarge, UnknownFormat, pack, unpack
from tests.peers.log_rows import stored
from tests.schemas.rows import rows


@given(rows)
def test_every_row_comes_back_as_it_was(row: StoredEvent) -> None:
    back = unpack(pack(row))
    assert back == row
    assert [type(value) for value in back] == [type(value) for value in row]


@given(rows, st.integers(FORMAT + 1, 255))
def test_a_newer_format_is_refused_by_name(row: StoredEvent, newer: int) -> None:
    with pytest.raises(UnknownFormat, match=rf"format {newer} .* update it"):
        unpack(bytes([newer]) + pack(row)[1:])


@given(rows, st.data())
def test_half_a_record_is_refused(row: StoredEvent, data: st.DataObject) -> None:
    value = pack(row)
    with pytest.raises(Malformed):
        unpack(value[: data.draw(st.sampled_from([0, *range(1, len(value))]))])


@given(st.binary(max_size=50))
def test_what_is_not_a_record_of_ours_is_refused(value: bytes) -> None:
    with pytest.raises((Malformed, UnknownFormat)):
        unpack(value)


def test_the_largest_row_that_the_log_takes_fits() -> None:
    part = b"x" * (PART_BYTES_MAX + 100)
    row = stored(uuid4(), 1, uuid4(), 1, payload=part)._replace(personal=part)
    assert len(pack(row)) < MESSAGE_BYTES_MAX


def test_a_row_that_no_topic_takes_is_refused_by_its_position() -> None:
    row = stored(uuid4(), 12, uuid4(), 1, payload=b"x" * MESSAGE_BYTES_MAX)
    with pytest.raises(TooLarge, match="event 12 of shard"):
        pack(row)
