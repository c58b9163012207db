"""`oshaani api`: commands and queries over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

import psycopg
from psycopg_pool import PoolTimeout

from adapters.kafka.clients import KafkaConfig
from adapters.kafka.following import follow_topic
from adapters.kafka.turn_feed import KafkaTurnFeed
from adapters.postgres.pool import deadline
from api.app import create_app
from api.server import Check
from domain.event_log import LogUnavailable
from domain.ids import shard_of
from oshaani.log_tail import LogTail
from oshaani.metrics import PlatformMetrics
from oshaani.process import Ending, http, listening, quieten_collector
from oshaani.role_metrics import watch_process
from oshaani.roles.life import Announce, Life
from oshaani.settings import Settings
from oshaani.wiring import LAG_MAX, Core, core_of, hints_of, means_of, server_of, work_of
from projections.catching_up import CheckpointWatch
from schemas.hints import Hint
from schemas.records import AnyRecord
from schemas.topics import TURN_STREAM
from stream_processors.agent_turns import with_first_call
from stream_processors.workers import Workers


async def api(settings: Settings, dsn: str, announce: Announce) -> None:
    """Commands and queries over HTTP; turns are run by others and followed through the log."""
    ending, life = Ending(), Life.of(settings, "api")
    with listening(settings.host, settings.port, "OSHAANI_PORT") as listener:
        async with AsyncExitStack() as stack:
            core = await stack.enter_async_context(core_of(settings, dsn, projecting=False))
            means = await stack.enter_async_context(means_of(core))
            feed, hints = KafkaTurnFeed(TURN_STREAM.name), hints_of(dsn, core.secret)
            work, workers = work_of(core, means, life.name, feed), Workers()
            server = await stack.enter_async_context(
                server_of(
                    core,
                    means,
                    feed,
                    lambda: _serves(core),
                    prepare=lambda message: with_first_call(
                        message, work, workers.of(shard_of(message.tenant_id))
                    ),
                )
            )
            watch_process(server.metrics, life.role)
            metrics = PlatformMetrics(server.metrics, lambda: {"commands": core.bus.waiting})

            def committed(records: Sequence[AnyRecord]) -> None:
                tail.offer(records)
                work.history.observe(records)
                feed.publish(records)
                metrics.observe(records)

            def heard(records: Sequence[AnyRecord]) -> None:
                feed.publish(records)
                app.state.on_records(records)

            async def take_in(hint: Hint) -> None:
                work.history.observe(await core.bus.take_in(hint.heads, hint.rows))

            tail = LogTail(core.log, core.records, heard, feed.is_followed)
            core.bus.on_commit, core.bus.on_append = committed, hints.tell
            core.bus.on_loaded = work.history.loaded
            app = create_app(server)
            hints.on_hint(tail.hear)
            hints.on_hint(take_in)
            hints.on_serving(workers.hear)
            config = KafkaConfig.of(settings)
            parts = {
                "hints": hints.run(),
                "log tail": tail.run(),
                "turn stream": follow_topic(config, life.slot, TURN_STREAM.name, feed.take),
            }
            await stack.enter_async_context(ending.parts(parts))
            async with http(app, listener) as serving:
                quieten_collector()
                announce(f"{life.slot} serves {settings.base_url}")
                await ending.wait()
                serving.should_exit = True
            await core.bus.drain()
    ending.check()


async def _serves(core: Core) -> Sequence[Check]:
    """Whether an API process can answer: the database, and read models that some projector keeps."""
    try:
        behind = await CheckpointWatch(core.pool, deadline).behind(await core.log.heads())
    except (LogUnavailable, psycopg.Error, PoolTimeout, OSError) as failure:
        return [Check("database", False, str(failure))]
    if behind is None:
        return [
            Check("database", True),
            Check("read models", False, "not built yet; a projector builds them"),
        ]
    return [Check("database", True), Check("read models", behind <= LAG_MAX, f"{behind} events behind")]
