"""The composition root: from settings to a running platform. Nothing else knows which adapters there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from psycopg_pool import AsyncConnectionPool

from adapters.api_keys import HmacApiKeys
from adapters.chat_models.registry import ModelRegistry
from adapters.crypto import derive
from adapters.egress.client import EgressClient
from adapters.memory.turn_feed import MemoryTurnFeed
from adapters.object_stores.files import FileObjectStore
from adapters.passwords import Argon2Passwords
from adapters.postgres import identity, key_ring, leases, parked_records, server_secret, vault
from adapters.postgres.embedded import embedded_postgres
from adapters.postgres.event_log import PostgresEventLog, run_script
from adapters.postgres.hints import Hints
from adapters.postgres.pool import deadline, open_pool
from adapters.tools.catalogue import ToolCatalogue
from adapters.tools.svg_diagram import svg_diagram
from adapters.tools.url_resolver import url_resolver
from adapters.tools.web_search import SearchServices, web_search
from adapters.webhooks import DerivedWebhookSecrets
from api.app import create_app
from api.server import Check, Limits, Server
from commands.bus import Bus
from commands.command import Rules
from domain.event_log import LogUnavailable
from oshaani import __version__
from oshaani.master_key import master_key
from oshaani.metrics import PlatformMetrics
from oshaani.models import NumberedModels, model_registry
from oshaani.processor_host import ProcessorHost
from oshaani.settings import Settings
from oshaani.toolbox import OwnersToolbox, ServerToolbox
from projections.catching_up import CheckpointWatch
from projections.read_side import ReadSide
from projections.runner import Runner
from schemas.records import AnyRecord, Records
from schemas.turn_feed import TurnFeed
from stream_processors.agent_turns import agent_turns, with_first_call
from stream_processors.credit_debits import credit_debits
from stream_processors.history import ConversationHistory
from stream_processors.notifications import notifications
from stream_processors.processor import Erasing, WayOut, Work
from stream_processors.sweeper import Sweeper
from stream_processors.tool_calls import tool_calls

Pool = AsyncConnectionPool[Any]

READ_CONNECTIONS = 4
PROCESSORS = (agent_turns, tool_calls, credit_debits, notifications)
LAG_MAX = 5_000  # events the read models may be behind and the server still be called ready
_SEQUENCE = "CREATE SEQUENCE IF NOT EXISTS agent_number"


def utc_now() -> datetime:
    """The clock of this machine."""
    return datetime.now(UTC)


@dataclass(slots=True)
class Core:
    """The write side and its surroundings: what every process has, whatever its role."""

    settings: Settings
    dsn: str
    pool: Pool
    log: PostgresEventLog
    records: Records
    key_ring: key_ring.PostgresKeyRing
    vault: vault.PostgresVault
    bus: Bus
    projector: Runner
    db: ReadSide
    keys: HmacApiKeys
    logins: identity.PostgresLogins
    secret: bytes  # what the server signs with


@dataclass(slots=True)
class Means:
    """What turns are run with: models, tools, and the doors to the outside."""

    registry: ModelRegistry
    toolbox: ServerToolbox
    egress: EgressClient


@dataclass(slots=True)
class Platform:
    """Everything in one process."""

    core: Core
    feed: MemoryTurnFeed
    work: Work
    host: ProcessorHost
    sweeper: Sweeper
    server: Server
    app: FastAPI


async def migrate(dsn: str) -> None:
    """Create or bring up to date everything in the database; safe to run again, and by several at once."""
    await PostgresEventLog(dsn).migrate()
    parts = (key_ring, vault, server_secret, identity, leases, parked_records)
    await run_script(dsn, "\n".join([*(each.TABLES for each in parts), _SEQUENCE]))


@asynccontextmanager
async def database(settings: Settings, connections: int | None = None) -> AsyncIterator[str]:
    """The DSN of the configured Postgres, or of the embedded one, which then runs as long as the block.

    `connections`: how many the embedded one takes, when many processes share it.
    """
    if settings.database_url is not None:
        yield settings.database_url
        return
    shared = {"max_connections": str(connections)} if connections else None
    async with embedded_postgres(settings.data_dir, shared) as dsn:
        yield dsn


@asynccontextmanager
async def open_log(dsn: str) -> AsyncIterator[PostgresEventLog]:
    """The log, while the block runs."""
    log = PostgresEventLog(dsn)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


def secret_of(root: bytes) -> bytes:
    """What the server signs and seals with, from the secret that its database keeps."""
    return derive(root, "server")


def hints_of(dsn: str, secret: bytes) -> Hints:
    """What the processes of a server tell each other."""
    return Hints(dsn, derive(secret, "hints"))


@asynccontextmanager
async def core_of(settings: Settings, dsn: str, *, projecting: bool = True) -> AsyncIterator[Core]:
    """The core of a process, on a database that `migrate` has prepared.

    `projecting`: whether this process runs `Core.projector`; without it, readers look at the checkpoints.
    """
    key, others = master_key(settings), settings.previous_master_keys
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_pool(dsn, READ_CONNECTIONS))
        log = await stack.enter_async_context(open_log(dsn))
        ring = key_ring.PostgresKeyRing(pool, key, others)
        records = Records(ring, FileObjectStore(settings.data_dir / "objects"))
        rules = Rules(settings.plans, settings.free_credits_ncr, settings.turn_deadline_s)
        bus = Bus(log, records, rules, utc_now)
        projector = Runner(pool, deadline, log, records)
        db = ReadSide(pool, deadline, projector.caught_up if projecting else CheckpointWatch(pool, deadline))
        root = await server_secret.server_secret(pool, key, others)
        secret = secret_of(root)
        yield Core(
            settings=settings,
            dsn=dsn,
            pool=pool,
            log=log,
            records=records,
            key_ring=ring,
            vault=vault.PostgresVault(pool, key, others),
            bus=bus,
            projector=projector,
            db=db,
            keys=HmacApiKeys(root),
            logins=identity.PostgresLogins(pool, derive(secret, "e-mail addresses")),
            secret=secret,
        )


@asynccontextmanager
async def means_of(core: Core) -> AsyncIterator[Means]:
    """The models and tools that the settings name."""
    settings = core.settings
    async with AsyncExitStack() as stack:
        registry = await model_registry(settings)
        stack.push_async_callback(registry.close)
        egress = EgressClient(allow=settings.egress_allow, ports=settings.egress_ports)
        operator_egress = EgressClient(allow=("0.0.0.0/0", "::/0"), ports=range(1, 65536))
        for client in (egress, operator_egress):
            stack.push_async_callback(client.close)
        catalogue = _catalogue(settings, egress, operator_egress)
        yield Means(registry, ServerToolbox(catalogue, egress, core.vault), egress)


def work_of(core: Core, means: Means, worker: str, feed: TurnFeed) -> Work:
    """What processors work with; `worker` is one life of a process, `slot/incarnation`."""
    return Work(
        worker,
        core.bus,
        means.registry,
        means.toolbox,
        ConversationHistory(core.log, core.records),
        feed,
        utc_now,
        core.settings.model_timeout_s,
        out=WayOut(core.log, core.records, means.egress, DerivedWebhookSecrets(core.secret)),
        erasing=erasing_of(core),
    )


def erasing_of(core: Core) -> Erasing:
    """What it takes to forget a person."""
    return Erasing(core.key_ring, core.vault, core.logins, identity.PostgresSessions(core.pool))


@asynccontextmanager
async def server_of(
    core: Core,
    means: Means,
    feed: TurnFeed,
    ready: Callable[[], Awaitable[Sequence[Check]]],
    **others: Any,
) -> AsyncIterator[Server]:
    """What the HTTP application needs; `others` are fields of `Server` that only some processes give."""
    settings, passwords = core.settings, Argon2Passwords()
    try:
        yield Server(
            bus=core.bus,
            db=core.db,
            feed=feed,
            log=core.log,
            records=core.records,
            rules=core.bus.rules,
            clock=utc_now,
            keys=core.keys,
            key_uses=identity.PostgresKeyUses(core.pool),
            logins=core.logins,
            sessions=identity.PostgresSessions(core.pool),
            passwords=passwords,
            vault=core.vault,
            webhook_secrets=DerivedWebhookSecrets(core.secret),
            models=NumberedModels(means.registry),
            toolbox=OwnersToolbox(means.toolbox),
            base_url=settings.base_url,
            signing_key=derive(core.secret, "cursors"),
            next_agent_number=lambda: _next_agent_number(core.pool),
            ready=ready,
            metrics_token=settings.metrics_token,
            limits=Limits(session_s=settings.session_days * 86_400.0),
            version=__version__,
            **others,
        )
    finally:
        await passwords.close()


@asynccontextmanager
async def platform(core: Core) -> AsyncIterator[Platform]:
    """Processors, tools, models and the HTTP server's needs around a core, all in this process."""
    async with AsyncExitStack() as stack:
        means = await stack.enter_async_context(means_of(core))
        feed = MemoryTurnFeed()
        work = work_of(core, means, f"embedded/{uuid4()}", feed)
        parked = parked_records.PostgresParkedRecords(core.pool)
        host = ProcessorHost(core.log, core.records, PROCESSORS, work, parked)
        server = await stack.enter_async_context(
            server_of(
                core,
                means,
                feed,
                lambda: _ready(core, host),
                prepare=lambda message: with_first_call(message, work, work.worker),
            )
        )
        metrics = PlatformMetrics(server.metrics, lambda: _queues(core, host, work))

        def committed(records: Sequence[AnyRecord]) -> None:
            work.history.observe(records)
            feed.publish(records)
            host.offer(records)
            core.projector.offer(records)
            metrics.observe(records)

        core.bus.on_commit, core.bus.on_loaded = committed, work.history.loaded
        app = create_app(server)
        host.on_foreign = app.state.on_records
        yield Platform(core, feed, work, host, Sweeper(core.log, work), server, app)


def _catalogue(settings: Settings, egress: EgressClient, operator_egress: EgressClient) -> ToolCatalogue:
    services = SearchServices(settings.tavily_api_key, settings.brave_api_key, settings.searxng_url)
    return ToolCatalogue(web_search(services, egress, operator_egress), url_resolver(egress), svg_diagram())


async def _next_agent_number(pool: Pool) -> int:
    async with pool.connection() as connection:
        with deadline(connection):
            cursor = await connection.execute("SELECT nextval('agent_number')")
            row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


def _events_behind(core: Core) -> int:
    """How far the read model that is furthest behind is behind the log."""
    return max(core.projector.lag().values(), default=0)


def _queues(core: Core, host: ProcessorHost, work: Work) -> dict[str, int]:
    return {
        "commands": core.bus.waiting,
        "processors": host.unfinished,
        "read_models": _events_behind(core),
        "calls": len(work.running),
        "poisoned": host.poisoned,
    }


async def _ready(core: Core, host: ProcessorHost) -> Sequence[Check]:
    try:
        heads = await core.log.heads()
    except LogUnavailable as failure:
        return [Check("database", False, str(failure))]
    lag, waiting = _events_behind(core), host.lag(heads)
    return [
        Check("database", True),
        Check("read models", lag <= LAG_MAX, f"{lag} events behind"),
        # A parked stream is an operator's affair, and stops no other.
        Check("processors", True, f"{waiting} records in work, {host.poisoned} poisoned"),
    ]
