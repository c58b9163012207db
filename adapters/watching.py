"""An embedded server kept running: started again whenever it dies, until it keeps dying."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Protocol

WATCH_S = 0.25
RESTARTS_MAX = 5
RESTART_CALM_S = 60.0  # A server that ran this long has its restarts forgiven.

_log = logging.getLogger(__name__)


class EmbeddedServer(Protocol):
    """A server in a process of ours; `start` blocks until it answers."""

    log_file: Path

    @property
    def has_ended(self) -> bool: ...

    def start(self) -> None: ...


async def keep_running(server: EmbeddedServer, name: str, fault: type[Exception]) -> None:
    """Start the server again whenever it dies; give up loudly when it keeps dying.

    `fault` is what `start` raises when the server cannot run.
    """
    restarts_count, started_at_s = 0, time.monotonic()
    while True:
        await asyncio.sleep(WATCH_S)
        if not server.has_ended:
            continue
        if time.monotonic() - started_at_s > RESTART_CALM_S:
            restarts_count = 0
        restarts_count += 1
        if restarts_count > RESTARTS_MAX:
            _log.critical("the embedded %s keeps ending; see %s", name, server.log_file)
            return
        _log.error("the embedded %s ended unexpectedly and is started again", name)
        started_at_s = time.monotonic()
        try:
            await asyncio.to_thread(server.start)
        except fault as failure:
            _log.error("%s", failure)
