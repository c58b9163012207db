"""`oshaani projector`: the read models, kept by one process at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.following import follow_topic
from adapters.postgres.hints import listen
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.pool import deadline
from api.server import Check
from domain.event_log import LogUnavailable
from oshaani.process import Ending
from oshaani.role_metrics import ProjectionMetrics, watch_lease
from oshaani.roles.life import Announce, Life, database_answers, operators
from oshaani.settings import Settings
from oshaani.store_metrics import StoreMetrics
from oshaani.wiring import Core, core_of
from projections.catching_up import AWAITED
from projections.runner import Runner
from schemas import wire
from schemas.topics import LOG

log_of = logging.getLogger(__name__)

LEASE_S, RENEW_S = 6.0, 2.0
GATHER_MS = 200  # whoever cannot wait that long has it read from the log
PROJECTOR_LEASE = "projector"


async def projector(settings: Settings, dsn: str, announce: Announce) -> None:
    """Keeps the read models. One at a time does; the others stand by and take over."""
    ending, life = Ending(), Life.of(settings, "projector")
    async with AsyncExitStack() as stack:
        core = await stack.enter_async_context(core_of(settings, dsn, projecting=False))
        leases = PostgresLeases(core.pool)
        metrics = CollectorRegistry()
        store = StoreMetrics(metrics)
        working = Working(core, KafkaConfig.of(settings), life, ProjectionMetrics(metrics))
        watch_lease(metrics, PROJECTOR_LEASE, lambda: working.epoch)

        async def awaited(said: str) -> None:
            working.hurry()

        async def ready() -> Sequence[Check]:
            return [await database_answers(core), working.check()]

        await stack.enter_async_context(operators(settings, life, ready, metrics, announce))
        parts = {
            "projector": working.run(leases),
            "hints": listen(dsn, AWAITED, awaited),
            "database metrics": store.run(core.pool),
        }
        await stack.enter_async_context(ending.parts(parts))
        await ending.wait()
    ending.check()


class Working:
    """Applies the log while it has the lease."""

    def __init__(self, core: Core, config: KafkaConfig, life: Life, metrics: ProjectionMetrics) -> None:
        self._config, self._life = config, life
        self._runner = Runner(core.pool, deadline, core.log, core.records, metrics=metrics)
        self.epoch: int | None = None

    async def run(self, leases: PostgresLeases) -> None:
        """Take the lease whenever it is free, and work for as long as it is held; until cancelled."""
        runner: asyncio.Task[None] | None = None
        try:
            while True:
                try:
                    async with asyncio.timeout(LEASE_S / 2):
                        self.epoch = await leases.acquire(
                            PROJECTOR_LEASE, self._life.name, LEASE_S, from_earlier_life=True
                        )
                except (LogUnavailable, TimeoutError) as failure:
                    # Whoever takes over notices at the checkpoints what this one has done.
                    log_of.warning("the projector's lease was not renewed: %s", failure)
                if self.epoch is None and runner is not None:
                    log_of.warning("another projector has taken over; standing by")
                    await _ended(runner)
                    runner = None
                elif self.epoch is not None and runner is None:
                    runner = asyncio.create_task(self._work(), name="projections")
                if runner is not None and runner.done():
                    runner.result()
                await asyncio.sleep(RENEW_S)
        finally:
            if runner is not None:
                await _ended(runner)
            if self.epoch is not None:
                async with asyncio.timeout(RENEW_S):
                    await leases.release(PROJECTOR_LEASE, self._life.name)

    def hurry(self) -> None:
        """Somebody waits for the read models."""
        self._runner.hurry()

    def check(self) -> Check:
        """What this projector does."""
        if self.epoch is None:
            return Check("projector", True, "stands by")
        behind = max(self._runner.lag().values(), default=0)
        return Check("projector", True, f"at work, {behind} events behind")

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._runner.run())
            group.create_task(follow_topic(self._config, self._life.slot, LOG.name, self._take, GATHER_MS))

    async def _take(self, values: Sequence[bytes]) -> None:
        rows = []
        for value in values:
            try:
                rows.append(wire.unpack(value))
            except wire.UnknownFormat as unknown:
                log_of.warning("the projector reads from the log what it cannot from its topic: %s", unknown)
        await self._runner.offer_rows(rows)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,), timeout=RENEW_S)
