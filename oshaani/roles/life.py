"""What the processes of all roles have in common: who they are, and what they tell operators."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from prometheus_client import CollectorRegistry

from api.server import Check
from domain.event_log import LogUnavailable
from oshaani.process import http, listening
from oshaani.role_metrics import watch_process
from oshaani.settings import Settings
from oshaani.wiring import Core
from oshaani.worker_http import Ready, worker_app

DRAIN_S = 6.0  # what work under way gets after SIGTERM
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a process: its slot, which a restart keeps, and its own id."""

    role: str
    slot: str
    id: UUID = field(default_factory=uuid4)

    @classmethod
    def of(cls, settings: Settings, role: str) -> Life:
        """That of this process; without a slot in the settings it has one that nobody else will have."""
        return cls(role, settings.slot or f"{role}-{socket.gethostname()}-{os.getpid()}")

    @property
    def name(self) -> str:
        return f"{self.slot}/{self.id}"


@asynccontextmanager
async def operators(
    settings: Settings, life: Life, ready: Ready, metrics: CollectorRegistry, announce: Announce
) -> AsyncIterator[None]:
    """The pages of a worker process, while the block runs."""
    watch_process(metrics, life.role)
    with listening(settings.worker_host, settings.worker_port, "OSHAANI_WORKER_PORT") as listener:
        app = worker_app(life.role, life.slot, ready, metrics, settings.metrics_token)
        async with http(app, listener):
            host, port = listener.getsockname()[:2]
            announce(f"{life.slot} works; /readyz and /metrics at http://{host}:{port}")
            yield


async def database_answers(core: Core) -> Check:
    """Whether the log can be read."""
    try:
        await core.log.heads()
    except LogUnavailable as failure:
        return Check("database", False, str(failure))
    return Check("database", True)
