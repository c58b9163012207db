"""Reads bodies up to a limit that holds on the wire and after decompression."""

from __future__ import annotations

import zlib
from typing import Protocol

from aiohttp import StreamReader

from adapters.egress.rules import Refused

CHUNK_BYTES = 65_536
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Decoder(Protocol):
    """Turns chunks as they were sent into chunks of content."""

    def decode(self, chunk: bytes, size_bytes_max: int) -> bytes:
        """The content in `chunk`, of which at most `size_bytes_max` + 1 bytes are made."""

    def complete(self) -> bool:
        """Whether the content may end here."""


class Identity:
    """Content sent as it is."""

    def decode(self, chunk: bytes, size_bytes_max: int) -> bytes:
        return chunk

    def complete(self) -> bool:
        return True


class Inflate:
    """Content that was compressed although we had asked for none."""

    def __init__(self, window_bits: int) -> None:
        self._inflate = zlib.decompressobj(window_bits)

    def decode(self, chunk: bytes, size_bytes_max: int) -> bytes:
        content = self._inflate.decompress(chunk, size_bytes_max + 1)
        if self._inflate.unused_data:
            raise Refused("more after the compressed content")
        return content

    def complete(self) -> bool:
        return self._inflate.eof


def decoder_of(content_encoding: str) -> Decoder:
    """The decoder for a Content-Encoding.

    Raises:
        Refused: an encoding that we cannot undo within a limit, or several of them.
    """
    coding = content_encoding.strip().lower()
    if coding in ("", "identity"):
        return Identity()
    if coding in _WINDOW_BITS:
        return Inflate(_WINDOW_BITS[coding])
    raise Refused("content encoding")


async def read_body(content: StreamReader, content_encoding: str, size_bytes_max: int) -> bytes:
    """The whole content.

    Raises:
        Refused: more than `size_bytes_max` bytes, as sent or as decoded, or not what its encoding says.
    """
    decoder = decoder_of(content_encoding)
    body = bytearray()
    sent_bytes = 0
    async for chunk in content.iter_chunked(CHUNK_BYTES):
        sent_bytes += len(chunk)
        try:
            body += decoder.decode(chunk, size_bytes_max - len(body))
        except zlib.error as error:
            raise Refused("content encoding") from error
        if max(sent_bytes, len(body)) > size_bytes_max:
            raise Refused("size of the body")
    if sent_bytes and not decoder.complete():
        raise Refused("cut content")
    return bytes(body)
