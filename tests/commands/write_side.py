"""Owners with an account and an agent, and what they ask, for tests of the write side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import UUID, uuid4

from adapters.memory.key_ring import MemoryKeyRing
from adapters.memory.object_store import MemoryObjectStore
from commands.agent import CreateAgent
from commands.bus import Bus
from commands.command import Rules
from commands.turn import SendMessage
from commands.user import LogIn, RegisterUser
from domain.aggregate import Root
from domain.credit_account import CreditAccount
from domain.event_log import EventLog, StoredEvent
from domain.ids import AgentId, ConversationId, TurnId, UserId, account_of, agent_of, shard_of
from domain.money import ncr
from domain.plans import DEFAULT_PLANS, UNLIMITED
from schemas.records import Records

BY = "user:test"
CREDITS = 1_000
TURN_NCR = ncr("3")
AGENT_NCR = ncr("1.5")
UNLIMITED_PLANS = dict.fromkeys(DEFAULT_PLANS, UNLIMITED)
EVERYTHING = 1_000_000
_numbers = count(1)
_TIMES = {"_created_on", "_modified_on", "_pending_events"}


def memory_records() -> Records:
    """Seals under keys and keeps objects that live as long as the test."""
    return Records(MemoryKeyRing(), MemoryObjectStore())


def rules(credits_ncr: int = ncr(str(CREDITS)), **changes: Any) -> Rules:
    """No daily limits, and so many credits at the first login."""
    return Rules(**{"plans": UNLIMITED_PLANS, "free_credits_ncr": credits_ncr, **changes})


@dataclass(frozen=True, slots=True)
class Owner:
    """A tenant with an account and an agent."""

    tenant_id: UserId
    agent_id: AgentId

    def message(self, content: str = "Is it so?", **changes: Any) -> SendMessage:
        """A message that begins a conversation, unless told otherwise."""
        facts: dict[str, Any] = {
            "turn_id": TurnId(uuid4()),
            "conversation_id": ConversationId(uuid4()),
            "beginning": "new",
            "name": None,
            "channel": "api",
            "mode": "async",
            "meter": "message",
            "by_owner": True,
            "agent_id": self.agent_id,
            "content": content,
        }
        return SendMessage(tenant_id=self.tenant_id, **(facts | changes))


async def signed_up(bus: Bus, tenant_id: UUID | None = None, **agent: Any) -> Owner:
    """A new owner; the credits come from the bus's rules, and the agent is paid from them."""
    tenant = UserId(tenant_id or uuid4())
    await bus.execute(RegisterUser(tenant_id=tenant, email="ada@example.com", name="Ada"), by=BY)
    await bus.execute(LogIn(tenant_id=tenant), by=BY)
    number = next(_numbers)
    await bus.execute(CreateAgent(tenant_id=tenant, number=number, name="Guide", **agent), by=BY)
    return Owner(tenant, agent_of(number))


async def account(bus: Bus, owner: Owner) -> CreditAccount:
    """The owner's account as the bus knows it."""
    return await bus.read(CreditAccount, account_of(owner.tenant_id), owner.tenant_id)


async def log_of(log: EventLog, tenant_id: UUID) -> Sequence[StoredEvent]:
    """Everything in the log that is the tenant's, in order."""
    rows = await log.read_after({shard_of(tenant_id): 0}, EVERYTHING)
    return [row for row in rows if row.tenant_id == tenant_id]


def known(root: Root) -> dict[str, Any]:
    """All that an aggregate knows; when it was told is not part of it."""
    return {name: value for name, value in vars(root).items() if name not in _TIMES}
