"""What may be asked of credit accounts: settle what ran, grant, change the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from commands.command import Command, Result, WriteSide, handles
from domain.credit_account import ChargeLine, CreditAccount, GrantKind, Origin
from domain.errors import InvalidValue
from domain.ids import HoldId, account_of, grant_of_payment


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleHold(Command):
    """Charge what ran and give the rest of the hold back; no lines gives back everything."""

    hold_id: HoldId
    lines: Sequence[ChargeLine]
    origin: Origin

    def reads(self) -> tuple[UUID, ...]:
        return (account_of(self.tenant_id),)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantCredits(Command):
    """Give credits: by an operator, or for a payment. Once per `grant_id`, which follows from a `payment_ref`."""

    grant_id: UUID
    kind: GrantKind
    amount_ncr: int
    expires_at: datetime | None = None
    reason: str | None = None
    payment_ref: str | None = None

    def reads(self) -> tuple[UUID, ...]:
        return (account_of(self.tenant_id),)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePlan(Command):
    """Another set of daily limits."""

    plan: str

    def reads(self) -> tuple[UUID, ...]:
        return (account_of(self.tenant_id),)


@handles(SettleHold)
def settle_hold(command: SettleHold, write: WriteSide) -> None:
    account = write.get(CreditAccount, account_of(command.tenant_id))
    account.settle(command.hold_id, command.lines, command.origin)


@handles(GrantCredits)
def grant_credits(command: GrantCredits, write: WriteSide) -> Result:
    account = write.get(CreditAccount, account_of(command.tenant_id))
    ref = command.payment_ref
    if ref is not None and command.grant_id != grant_of_payment(command.tenant_id, ref):
        raise InvalidValue("/payment_ref", "The id of a payment's grant follows from its reference.")
    account.grant(
        command.grant_id,
        command.kind,
        command.amount_ncr,
        write.now,
        command.expires_at,
        command.reason,
        ref,
    )
    return {"posted_ncr": account.posted_ncr}


@handles(ChangePlan)
def change_plan(command: ChangePlan, write: WriteSide) -> Result:
    if command.plan not in write.rules.plans:
        known = ", ".join(write.rules.plans)
        raise InvalidValue("/plan", f"There is no plan {command.plan!r}; choose one of: {known}.")
    write.get(CreditAccount, account_of(command.tenant_id)).change_plan(command.plan)
    return {"plan": command.plan}
