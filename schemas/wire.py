"""A row of the log as a record of a private topic: a format version, then everything of the row in msgpack.

The personal part stays sealed; whoever opens it asks the key ring as the log's readers do.
"""

from __future__ import annotations

from typing import Final

import msgspec

from domain.event_log import StoredEvent

FORMAT: Final = 1
MESSAGE_BYTES_MAX: Final = (
    1_000_000  # a broker takes 1 MiB by default; the batch around a record needs some of it
)
_PREFIX = bytes([FORMAT])

_encode = msgspec.msgpack.Encoder(uuid_format="bytes").encode
_decode = msgspec.msgpack.Decoder(StoredEvent).decode


class UnknownFormat(Exception):
    """The record was written by a newer program than this one; it must not be skipped."""


class Malformed(ValueError):
    """The bytes are not a record of ours."""


class TooLarge(ValueError):
    """A row that no topic takes: its large parts belong into the object store."""


def pack(row: StoredEvent) -> bytes:
    """The bytes of a row that the log has recorded.

    Raises:
        TooLarge: over `MESSAGE_BYTES_MAX`; `schemas.records` never makes such a row.
    """
    value = _PREFIX + _encode(row)
    if len(value) > MESSAGE_BYTES_MAX:
        raise TooLarge(
            f"event {row.position} of shard {row.shard} has {len(value)} bytes, "
            f"a record at most {MESSAGE_BYTES_MAX}"
        )
    return value


def unpack(value: bytes) -> StoredEvent:
    """The row of a record, as it is in the log.

    Raises:
        UnknownFormat: a newer program wrote it.
        Malformed: nobody of us wrote it.
    """
    if value[:1] != _PREFIX:
        if not value:
            raise Malformed("an empty record")
        raise UnknownFormat(f"format {value[0]} of a log record; this program knows {FORMAT}: update it")
    try:
        return _decode(memoryview(value)[1:])
    except msgspec.MsgspecError as error:
        raise Malformed(str(error)) from error
