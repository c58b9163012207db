"""Processes that begin at once: forked from one that has imported everything, which takes longer than all else.

The server is multiprocessing's own; it is started with the first process, and ends with the one that started it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

LINE_BYTES_MAX = 1 << 20
START_S = 60.0

Program = Callable[[Sequence[str]], None]
"""What a process runs, with its arguments; importable by name."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["oshaani.preloaded"])


class Forked:
    """A running process; whoever reads its `lines` hears all it prints, until it ends."""

    def __init__(self, process: ForkServerProcess, output: asyncio.StreamReader) -> None:
        assert process.pid is not None
        self._process, self._output, self.pid = process, output, process.pid
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(process.sentinel, self._on_end)

    async def lines(self) -> AsyncIterator[str]:
        """What it prints, line by line."""
        async for line in self._output:
            yield line.decode(errors="replace").rstrip("\n")

    async def wait(self) -> int:
        """Its exit code once it has ended, or minus the signal that ended it."""
        await self._ended.wait()
        code = self._process.exitcode
        return 0 if code is None else code

    def terminate(self) -> None:
        """Ask it to end."""
        if not self._ended.is_set():
            self._process.terminate()

    def kill(self) -> None:
        """End it."""
        if not self._ended.is_set():
            self._process.kill()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._ended.set()


@asynccontextmanager
async def forked(
    program: Program, arguments: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[Forked]:
    """Run a program in a process of its own, with its output in a pipe; killed with the block if it still lives."""
    reader, writer = _context.Pipe(duplex=False)
    process = _context.Process(
        target=_begin, args=(program, tuple(arguments), dict(environment), writer), daemon=True
    )
    async with asyncio.timeout(START_S):
        # The first one waits for the server.
        await asyncio.to_thread(process.start)
    writer.close()
    output = asyncio.StreamReader(LINE_BYTES_MAX)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(output), os.fdopen(os.dup(reader.fileno()), "rb")
    )
    reader.close()
    running = Forked(process, output)
    try:
        yield running
    finally:
        running.kill()
        await running.wait()
        transport.close()
        process.close()


def _begin(
    program: Program, arguments: Sequence[str], environment: Mapping[str, str], output: Connection
) -> None:
    # A Ctrl-C is for whoever supervises, who ends its children in order.
    os.setsid()
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    program(arguments)
