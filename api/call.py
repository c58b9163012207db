"""One HTTP request while it is served, and what all requests of a process share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

from fastapi import Depends
from starlette.requests import Request

from api.errors import invalid
from commands.command import Command, Outcome
from domain.ids import SHARDS, TurnId, UserId, shard_of
from domain.ids import conversation_name as conversation_name
from domain.ids import request_name as request_name
from schemas.records import AnyRecord

if TYPE_CHECKING:
    from api.auth import Failures
    from api.metrics import HttpMetrics
    from api.principals import Principals
    from api.server import Server

PrincipalKind = Literal["user_key", "session", "agent_key"]

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling: the tenant it acts for, and the name under which the log remembers it.

    `agent_id` is set for an agent's key, which may only talk to that agent.
    """

    kind: PrincipalKind
    owner_id: UserId
    actor: str
    agent_id: UUID | None = None
    credential: str = ""  # the key's id, or the session's digest as hex

    @property
    def is_owner(self) -> bool:
        """Whether the caller is the person who pays, and may see amounts."""
        return self.kind != "agent_key"


class Positions:
    """How far the log is for each tenant, as this process wrote it: what the read models must have for its readers."""

    TENANTS_MAX = 10_000

    def __init__(self) -> None:
        self._positions: dict[int, int] = {}  # by the number of the tenant's id

    def note(self, tenant_id: UUID, position: int) -> None:
        number = tenant_id.int
        if len(self._positions) >= self.TENANTS_MAX and number not in self._positions:
            self._positions.pop(next(iter(self._positions)))
        if position > self._positions.get(number, 0):
            self._positions[number] = position

    def of(self, tenant_id: UUID) -> int:
        return self._positions.get(tenant_id.int, 0)

    def reached(self, tenant_id: UUID, position: int) -> None:
        """The read models have this much; nobody needs to wait for it again."""
        if self._positions.get(tenant_id.int) == position:
            del self._positions[tenant_id.int]


@dataclass(slots=True)
class Shared:
    """What the requests of a process share."""

    server: Server
    principals: Principals
    metrics: HttpMetrics
    failures: Failures
    positions: Positions = field(default_factory=Positions)

    def on_records(self, records: Sequence[AnyRecord]) -> None:
        """Be told of what this process has committed: keys and sessions change at once, readers see their writes."""
        tenant_id = None
        for record in reversed(records):
            if record.tenant_id is not tenant_id:  # else an earlier one of the same command
                tenant_id = record.tenant_id
                self.positions.note(tenant_id, record.position)
        self.principals.on_records(records)


class Call:
    """One request. `headers` are added to whatever is answered."""

    __slots__ = (
        "client",
        "given",
        "headers",
        "method",
        "path",
        "principal",
        "request_id",
        "shared",
        "trace_id",
        "traceparent",
    )

    def __init__(self, scope: Any, shared: Shared) -> None:
        self.shared = shared
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.client: str = (scope.get("client") or ("", 0))[0]
        self.principal: Principal | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        self.given: list[tuple[bytes, bytes]] = scope["headers"]
        match = _TRACEPARENT.fullmatch(self.header(b"traceparent") or "")
        fresh = os.urandom(24).hex()
        self.trace_id = match[1] if match else fresh[:32]
        self.traceparent = f"00-{self.trace_id}-{fresh[32:]}-01"
        named = self.header(b"x-request-id") or ""
        self.request_id = named if _REQUEST_ID.fullmatch(named) else self.trace_id

    @property
    def server(self) -> Server:
        return self.shared.server

    def header(self, name: bytes) -> str | None:
        """A header of the request, by its name in lower case."""
        return next((value.decode("latin-1") for each, value in self.given if each == name), None)

    def say(self, name: str, value: str) -> None:
        """Add a header to the answer."""
        self.headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))

    def caller(self) -> Principal:
        """Who is calling, on routes that have asked."""
        assert self.principal is not None
        return self.principal

    async def execute(
        self,
        command: Command,
        command_id: UUID | None = None,
        digest: bytes | None = None,
        correlation_id: UUID | None = None,
    ) -> Outcome:
        """Have a command decided on behalf of the caller, and say where in the log it stands."""
        outcome = await self.server.bus.execute(
            command,
            by=self.principal.actor if self.principal else f"user:{command.tenant_id}",
            command_id=command_id,
            digest=digest,
            correlation_id=correlation_id,
            traceparent=self.traceparent,
        )
        self.say("Oshaani-Position", f"{outcome.shard}:{outcome.position}")
        if outcome.seen:
            self.say("Idempotent-Replayed", "true")
        return outcome

    async def reads(self) -> None:
        """Before a query: wait until the read models have what the caller's tenant wrote through this process.

        And, if the client brought one along (`Oshaani-Min-Position`), what is at that position.
        """
        server, tenant_id = self.server, self.caller().owner_id
        timeout_s, position = server.limits.read_wait_s, self.shared.positions.of(tenant_id)
        reached = not position or await server.db.caught_up(shard_of(tenant_id), position, timeout_s)
        if reached and position:
            self.shared.positions.reached(tenant_id, position)
        asked = self.header(b"oshaani-min-position")
        if reached and asked is not None:
            shard, position = position_of(asked)
            reached = await server.db.caught_up(shard, position, timeout_s)
        if not reached:
            self.say("Oshaani-Position-Reached", "false")

    async def shown(self, outcome: Outcome) -> None:
        """Wait until the read models have what a command wrote, when the next request is likely to need it."""
        if not await self.server.db.caught_up(
            outcome.shard, outcome.position, self.server.limits.read_wait_s
        ):
            self.say("Oshaani-Position-Reached", "false")


def position_of(text: str) -> tuple[int, int]:
    """A position as `Oshaani-Position` writes it.

    Raises:
        Problem: not `shard:position`.
    """
    shard, _, position = text.partition(":")
    digits = re.fullmatch(r"[0-9]{1,2}:[0-9]{1,18}", text)
    if digits is None or int(shard) >= SHARDS:
        raise invalid(
            "Oshaani-Min-Position", "Oshaani-Min-Position is '<shard>:<position>', as answers give it."
        )
    return int(shard), int(position)


def call_of(request: Request) -> Call:
    """The call that a request is served as."""
    call: Call = request.scope["oshaani"]
    return call


async def _call(request: Request) -> Call:
    return call_of(request)


CallDep = Annotated[Call, Depends(_call)]


def turn_named(text: str) -> TurnId | None:
    """The turn of a request id; None for what cannot be one."""
    found = _uuid_after("req-", text)
    return TurnId(found) if found else None


def conversation_named(text: str) -> UUID | None:
    """The conversation of an id of our form; None for names that callers gave."""
    return _uuid_after("conv-", text)


def _uuid_after(prefix: str, text: str) -> UUID | None:
    # Only the form that we write ourselves: UUID() takes braces, "urn:" and missing hyphens too.
    if not text.startswith(prefix) or len(text) != len(prefix) + 36:
        return None
    try:
        found = UUID(text[len(prefix) :])
    except ValueError:
        return None
    return found if str(found) == text[len(prefix) :].lower() else None
