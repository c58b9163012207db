"""What public topics carry besides the log's events: facts that follow from them, in the form consumers can use.

Amounts are whole nano-credits here, `…_ncr`; what is published has decimal strings, `…_credits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from domain.agent import Agent, Status
from domain.credit_account import CreditAccount
from domain.ports import ToolKind
from domain.turn import ToolOutcome
from schemas.records import Record


@dataclass(frozen=True, slots=True)
class UsageCharged:
    """A settled line: `quantity` units of a meter at the price of a rate card. `late`: its hold had expired."""

    tenant_id: UUID
    account_id: UUID
    hold_id: UUID
    line: int  # its number in the settlement, from 0
    meter: str
    quantity: int
    unit_price_ncr: int
    amount_ncr: int
    rate_card_id: str
    tool: str | None
    agent_id: UUID | None
    turn_id: UUID | None
    actor: str
    cached: bool
    late: bool


@dataclass(frozen=True, slots=True)
class UsageModelCalled:
    """A model call that gave a reply, and its tokens; `source` says who counted them."""

    tenant_id: UUID
    turn_id: UUID
    conversation_id: UUID | None
    agent_id: UUID
    call_id: UUID
    provider: str
    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    source: Literal["provider", "estimated"]
    latency_ms: int
    ttft_ms: int | None


@dataclass(frozen=True, slots=True)
class UsageToolCalled:
    """A tool call that has ended; its price is charged when it succeeded and its turn is settled."""

    tenant_id: UUID
    turn_id: UUID
    conversation_id: UUID | None
    agent_id: UUID
    tool_call_id: UUID
    tool: str
    kind: ToolKind
    outcome: ToolOutcome
    error_class: str | None
    latency_ms: int
    units: dict[str, int]
    price_ncr: int


@dataclass(frozen=True, slots=True)
class SpendAnomaly:
    """A tenant, or one agent of it, spends far more in a window than it used to."""

    tenant_id: UUID
    agent_id: UUID | None
    window_s: int
    window_start_at: datetime
    spent_ncr: int
    baseline_ncr: int
    threshold_ncr: int


@dataclass(frozen=True, slots=True)
class ToolFailing:
    """Most calls of a tool fail for an agent."""

    tenant_id: UUID
    agent_id: UUID
    tool: str
    window_s: int
    window_start_at: datetime
    call_count: int
    failure_count: int


@dataclass(frozen=True, slots=True)
class CommandAccepted:
    """A command that was accepted and changed something; `position` is that of its last event."""

    command_id: UUID
    type: str
    tenant_id: UUID
    actor: str
    outcome: str
    shard: int
    position: int
    correlation_id: UUID
    causation_id: UUID | None


@dataclass(frozen=True, slots=True)
class AgentState:
    """What an agent is now; `version` grows with every change."""

    agent_id: UUID
    number: int
    tenant_id: UUID
    name: str
    model_id: int
    agent_type: str
    status: Status
    config_version: int
    published_version: int | None
    custom_tools: tuple[str, ...]
    version: int


@dataclass(frozen=True, slots=True)
class CreditBalance:
    """What an account has now; `balance` is what is available plus what is held. `version` grows with every change."""

    account_id: UUID
    tenant_id: UUID
    balance_ncr: int
    held_ncr: int
    available_ncr: int
    shard: int
    position: int
    version: int


Fact = (
    UsageCharged
    | UsageModelCalled
    | UsageToolCalled
    | SpendAnomaly
    | ToolFailing
    | CommandAccepted
    | AgentState
    | CreditBalance
)
FACT_NAMES: Mapping[type[Fact], str] = {
    UsageCharged: "usage.charged.v1",
    UsageModelCalled: "usage.model_called.v1",
    UsageToolCalled: "usage.tool_called.v1",
    SpendAnomaly: "usage.spend_anomaly.v1",
    ToolFailing: "usage.tool_failing.v1",
    CommandAccepted: "command.accepted.v1",
    AgentState: "agent.state.v1",
    CreditBalance: "credit.balance.v1",
}
Charge = CreditAccount.CreditsSettled | CreditAccount.LateCharge


def charged_lines(record: Record[Charge]) -> list[UsageCharged]:
    """The lines of a settlement."""
    event = record.event
    return [
        UsageCharged(
            tenant_id=record.tenant_id,
            account_id=record.stream_id,
            hold_id=event.hold_id,
            line=number,
            meter=line.meter,
            quantity=line.quantity,
            unit_price_ncr=line.unit_price_ncr,
            amount_ncr=line.amount_ncr,
            rate_card_id=line.rate_card_id,
            tool=line.tool,
            agent_id=event.origin.agent_id,
            turn_id=event.origin.turn_id,
            actor=event.origin.actor,
            cached=event.origin.cached,
            late=isinstance(event, CreditAccount.LateCharge),
        )
        for number, line in enumerate(event.lines)
    ]


def state_of(agent: Agent) -> AgentState:
    """An agent as others may know it."""
    return AgentState(
        agent_id=agent.id,
        number=agent.number,
        tenant_id=agent.owner_id,
        name=agent.name,
        model_id=agent.model_id,
        agent_type=agent.agent_type,
        status=agent.status,
        config_version=agent.config_version,
        published_version=agent.published_version,
        custom_tools=tuple(sorted(agent.custom_tools)),
        version=agent.version,
    )


def balance_of(record: Record[CreditAccount.Moved]) -> CreditBalance:
    """An account after a movement."""
    event = record.event
    return CreditBalance(
        account_id=record.stream_id,
        tenant_id=record.tenant_id,
        balance_ncr=event.available_after_ncr + event.held_after_ncr,
        held_ncr=event.held_after_ncr,
        available_ncr=event.available_after_ncr,
        shard=record.shard,
        position=record.position,
        version=record.stream_version,
    )
