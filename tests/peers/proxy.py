"""A TCP proxy in front of a Postgres that fails the way networks fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum

from psycopg.conninfo import conninfo_to_dict, make_conninfo

READ_BYTES = 65_536


class Fault(Enum):
    """What happens to what passes. The cuts happen once, to the connection that is used next."""

    NONE = "none"
    CUT_REQUEST = "cut_request"  # the request never arrives
    CUT_ANSWER = "cut_answer"  # the request is served, its answer is lost with the connection
    HALF_OPEN = "half_open"  # requests arrive, answers are swallowed, nothing is ever closed


class Proxy:
    """Passes bytes between its port and a server, until it is told a fault."""

    def __init__(self, dsn: str) -> None:
        self._target = conninfo_to_dict(dsn)
        self._dsn = dsn
        self._tasks: set[asyncio.Task[None]] = set()
        self.fault = Fault.NONE
        self.dsn = ""

    def listens(self, port: int) -> None:
        """Set `dsn`: the server, seen through this proxy."""
        self.dsn = make_conninfo(self._dsn, host="127.0.0.1", hostaddr=None, port=port, sslmode="disable")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one client's bytes until either side is closed."""
        server_reader, server_writer = await self._connect()
        pumps = [
            asyncio.create_task(self._pump(reader, server_writer, Fault.CUT_REQUEST)),
            asyncio.create_task(self._pump(server_reader, writer, Fault.CUT_ANSWER)),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
                self._tasks.discard(pump)
            writer.transport.abort()
            server_writer.transport.abort()

    def stop(self) -> None:
        """Let go of every connection."""
        for task in self._tasks:
            task.cancel()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = str(self._target.get("host") or "127.0.0.1"), int(self._target.get("port") or 5432)
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Fault) -> None:
        with suppress(OSError):
            while content := await reader.read(READ_BYTES):
                if self.fault is cut:
                    self.fault = Fault.NONE
                    return
                if self.fault is Fault.HALF_OPEN and cut is Fault.CUT_ANSWER:
                    continue
                writer.write(content)
                await writer.drain()


@asynccontextmanager
async def proxy_before(dsn: str) -> AsyncIterator[Proxy]:
    """Serve on a free port of the loopback address."""
    proxy = Proxy(dsn)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.listens(server.sockets[0].getsockname()[1])
    try:
        yield proxy
    finally:
        server.close()
        proxy.stop()
