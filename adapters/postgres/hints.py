"""Telling other processes that the log has grown: after the commit, never in it, and nothing depends on its arrival.

Hints (`schemas.hints`) that could not be sent at once become one; those that are lost are made up for by whoever looks at
the log by itself, a little later. Every listener of the database wakes for each, so only those listen who are in a hurry.

Whoever may connect to the database can listen, and say anything. What hints bring is acted on, so they are sealed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from adapters.crypto import NotAuthentic, derive, seal, unseal
from adapters.postgres.pool import connect, deadline
from domain.event_log import StoredEvent
from schemas.hints import NOTHING_NEW, Hint, News, Serving, read, written
from schemas.records import AnyRecord

log_of = logging.getLogger(__name__)

CHANNEL = "oshaani_log"
TELL_S = 2.0  # what sending one may take before its connection is cut
PAUSE_S = 1.0  # after the database failed
SENDER_BYTES = 8
SENDERS_MAX = 1_000  # whose keys are kept at hand
ANNOUNCE_S = 0.5
CHECK_S = 5.0  # a silent connection is tried this often, so that a dead one is noticed
# The transaction of a NOTIFY needs no disk: what it tells of is durable already.
_PLANS = "-c synchronous_commit=off"

OUTAGE = (psycopg.Error, OSError, TimeoutError)
Connection = psycopg.AsyncConnection[Any]
Listener = Callable[[Hint], Awaitable[object] | None]


class Sealing:
    """Hints as the text of notifications, sealed under a key that the processes of a server share.

    Each sender has a key of its own, derived from that one and its name: no key seals more than one process can send.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._name = key, os.urandom(SENDER_BYTES)
        self._ciphers: dict[bytes, AESGCM] = {}

    def written(self, body: bytes) -> str:
        """The text of a notification."""
        return b64encode(self._name + seal(self._cipher(self._name), body, self._name)).decode("ascii")

    def read(self, text: str) -> bytes | None:
        """What another process with the same key wrote; None for anything else."""
        try:
            raw = b64decode(text, validate=True)
            name = raw[:SENDER_BYTES]
            return unseal(self._cipher(name), raw[SENDER_BYTES:], name)
        except (ValueError, NotAuthentic):
            return None

    def _cipher(self, name: bytes) -> AESGCM:
        found = self._ciphers.get(name)
        if found is None:
            if len(self._ciphers) >= SENDERS_MAX:
                self._ciphers.clear()
            found = self._ciphers[name] = AESGCM(derive(self._key, f"hints of {name.hex()}"))
        return found


class Hints:
    """Sends and receives hints. `run` it as one task for the life of the process.

    `key`: what is heard was sealed under it, and what is sent will be.
    """

    def __init__(self, dsn: str, key: bytes) -> None:
        self._dsn, self._sealing = dsn, Sealing(key)
        self._news, self._told = News(), asyncio.Event()
        self._listeners: list[Listener] = []
        self._serving_listeners: list[Callable[[Serving], None]] = []
        self._serving: Callable[[], Serving] | None = None

    def tell(self, records: Sequence[AnyRecord], rows: Sequence[StoredEvent] = ()) -> None:
        """Say soon that these are committed. Never blocks."""
        self._news.add(records, rows)
        self._told.set()

    def announce(self, serving: Callable[[], Serving]) -> None:
        """Say with every hint, and at least every `ANNOUNCE_S`, what this worker serves."""
        self._serving = serving

    def wake(self) -> None:
        """Say now what there is to say."""
        self._told.set()

    def on_hint(self, listener: Listener) -> None:
        """Have a function called when the log has grown, by this process too, and wait for what it returns before the next."""
        self._listeners.append(listener)

    def on_serving(self, listener: Callable[[Serving], None]) -> None:
        """Have a function called with what each worker says that it serves, before what else comes with it."""
        self._serving_listeners.append(listener)

    async def run(self, *, sends: bool = True) -> None:
        """Send and receive until cancelled; survives any outage of the database."""
        async with asyncio.TaskGroup() as group:
            if sends:
                group.create_task(_insist(self._dsn, self._send))
            if self._listeners or self._serving_listeners:
                group.create_task(listen(self._dsn, CHANNEL, self._hear))

    async def _send(self, connection: Connection) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S if self._serving is None else ANNOUNCE_S):
                    await self._told.wait()
            self._told.clear()
            hint = self._news.take()
            if self._serving is not None:
                hint = (hint or NOTHING_NEW)._replace(serving=self._serving())
            with deadline(connection, TELL_S):
                if hint is not None:
                    text = self._sealing.written(written(hint))
                    await connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, text))
                else:
                    await connection.execute("SELECT 1")

    async def _hear(self, text: str) -> None:
        body = self._sealing.read(text)
        hint = None if body is None else read(body)
        if hint is None:
            return
        if hint.serving is not None:
            for told in self._serving_listeners:
                told(hint.serving)
        if hint.heads:
            for listener in self._listeners:
                if (heard := listener(hint)) is not None:
                    await heard


async def listen(dsn: str, channel: str, heard: Callable[[str], Awaitable[object]]) -> None:
    """Hear what is said on a channel, one after the other, until cancelled; survives any outage of the database."""

    async def receive(connection: Connection) -> None:
        await connection.execute(f"LISTEN {channel}".encode())
        while True:
            async for notify in connection.notifies(timeout=CHECK_S):
                await heard(notify.payload)
            with deadline(connection, TELL_S):
                await connection.execute("SELECT 1")

    await _insist(dsn, receive)


async def _insist(dsn: str, work: Callable[[Connection], Awaitable[None]]) -> None:
    while True:
        try:
            connection = await connect(dsn, _PLANS)
            async with connection:
                await work(connection)
        except OUTAGE as failure:
            log_of.info("what processes tell each other waits for the database: %r", failure)
        await asyncio.sleep(PAUSE_S)
