"""Read model: credit accounts, their ledger, grants, open holds, and every double-entry leg for the auditor.

All of it follows from the events of credit accounts; the unique keys make Postgres refuse what must not be twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

from domain.credit_account import ChargeLine, CreditAccount, Origin, Slice
from domain.ids import event_id
from domain.turn import Turn
from projections.projection import Change, Delete, Increment, Insert, Projection, Update
from projections.read_side import NEWEST_POSITION, PAGE_MAX, ReadSide
from schemas.records import Record

credit_ledger = Projection(
    "credit_ledger",
    version=2,
    tables="""
    CREATE TABLE credit_account (
        account_id    uuid        PRIMARY KEY,
        tenant_id     uuid        NOT NULL,
        plan          text        NOT NULL,
        available_ncr bigint      NOT NULL CHECK (available_ncr >= 0),
        held_ncr      bigint      NOT NULL CHECK (held_ncr >= 0),
        low_balance   boolean     NOT NULL,        -- warned and not yet recovered
        version       integer     NOT NULL,        -- of the stream
        opened_at     timestamptz NOT NULL
    );
    -- What changed the settled balance, signed: its sum is what the account has.
    CREATE TABLE credit_ledger (
        shard             smallint    NOT NULL,
        position          bigint      NOT NULL,    -- of the event
        line              smallint    NOT NULL,    -- of the event, from 0
        account_id        uuid        NOT NULL,
        stream_version    integer     NOT NULL,
        tenant_id         uuid        NOT NULL,
        kind              text        NOT NULL,    -- grant | charge | uncollected | expiry
        grant_kind        text,                    -- free | purchase | adjustment | promotion
        amount_ncr        bigint      NOT NULL,    -- nano-credits, negative when spent
        balance_after_ncr bigint      NOT NULL,
        meter             text,
        quantity          bigint,
        unit_price_ncr    bigint,
        rate_card_id      text,
        tool              text,
        grant_id          uuid,
        hold_id           uuid,
        agent_id          uuid,
        turn_id           uuid,
        actor             text        NOT NULL,
        recorded_at       timestamptz NOT NULL,
        reason            text,                    -- of a grant
        payment_ref       text,                    -- of a grant that was paid for
        PRIMARY KEY (shard, position, line)
    );
    CREATE TABLE credit_grant (
        grant_id      uuid        PRIMARY KEY,     -- one grant for each payment, adjustment, promotion
        account_id    uuid        NOT NULL,
        kind          text        NOT NULL,
        granted_ncr   bigint      NOT NULL CHECK (granted_ncr > 0),
        remaining_ncr bigint      NOT NULL CHECK (remaining_ncr >= 0),
        granted_at    timestamptz NOT NULL,
        expires_at    timestamptz
    );
    -- Open holds only.
    CREATE TABLE credit_hold (
        hold_id       uuid        PRIMARY KEY,
        account_id    uuid        NOT NULL,
        tenant_id     uuid        NOT NULL,
        amount_ncr    bigint      NOT NULL CHECK (amount_ncr >= 0),
        meter         text        NOT NULL,
        held_at       timestamptz NOT NULL,
        expires_at    timestamptz NOT NULL,
        turn_id       uuid,                        -- the work it pays for
        turn_ended_at timestamptz                  -- from then on its settlement is near
    );
    -- Every leg of every movement; the legs of an event sum to 0.
    CREATE TABLE credit_entry (
        shard      smallint NOT NULL,
        position   bigint   NOT NULL,
        leg        smallint NOT NULL,
        account_id uuid     NOT NULL,
        book       text     NOT NULL,
        amount_ncr bigint   NOT NULL,
        PRIMARY KEY (shard, position, leg)
    );""",
    indexes="""
    CREATE UNIQUE INDEX credit_account_by_tenant ON credit_account (tenant_id);
    CREATE INDEX credit_ledger_by_account ON credit_ledger (account_id, position DESC, line DESC);
    CREATE UNIQUE INDEX credit_ledger_once_per_hold ON credit_ledger (hold_id, line) WHERE hold_id IS NOT NULL;
    CREATE UNIQUE INDEX credit_ledger_once_per_grant ON credit_ledger (grant_id) WHERE kind = 'grant';
    CREATE INDEX credit_grant_by_account ON credit_grant (account_id);
    CREATE UNIQUE INDEX credit_grant_free_once ON credit_grant (account_id) WHERE kind = 'free';
    CREATE INDEX credit_hold_by_tenant ON credit_hold (tenant_id);
    """,
)

UNSETTLED_MAX = 1_000


@dataclass(frozen=True, slots=True)
class GrantRow:
    """A grant that is not used up."""

    grant_id: UUID
    kind: str
    granted_ncr: int
    remaining_ncr: int
    granted_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class AccountRow:
    """A credit account; `posted_ncr` is what is available plus what is held."""

    account_id: UUID
    tenant_id: UUID
    plan: str
    available_ncr: int
    held_ncr: int
    low_balance: bool
    opened_at: datetime

    @property
    def posted_ncr(self) -> int:
        return self.available_ncr + self.held_ncr


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """What changed the settled balance. `kind`: grant, charge, uncollected (what a late charge could not take), expiry."""

    position: int
    line: int
    account_id: UUID
    stream_version: int
    recorded_at: datetime
    kind: str
    grant_kind: str | None
    amount_ncr: int
    balance_after_ncr: int
    meter: str | None
    quantity: int | None
    tool: str | None
    agent_id: UUID | None
    turn_id: UUID | None
    actor: str
    reason: str | None
    payment_ref: str | None

    @property
    def ledger_id(self) -> UUID:
        """The same for ever, wherever it is computed."""
        return uuid5(event_id(self.account_id, self.stream_version), str(self.line))

    @property
    def request_id(self) -> UUID | None:
        return self.turn_id

    @property
    def after(self) -> tuple[int, int]:
        return self.position, self.line


async def get_account(db: ReadSide, tenant_id: UUID) -> AccountRow | None:
    """A tenant's account; None before the first login."""
    return await db.one(
        AccountRow,
        """
        SELECT account_id, tenant_id, plan, available_ncr, held_ncr, low_balance, opened_at
          FROM credit_account WHERE tenant_id = %(tenant_id)s
        """,
        {"tenant_id": tenant_id},
    )


async def list_grants(db: ReadSide, tenant_id: UUID) -> list[GrantRow]:
    """A tenant's grants that are not used up, oldest first; at most `PAGE_MAX`."""
    return await db.all(
        GrantRow,
        """
        SELECT g.grant_id, g.kind, g.granted_ncr, g.remaining_ncr, g.granted_at, g.expires_at
          FROM credit_account a JOIN credit_grant g USING (account_id)
         WHERE a.tenant_id = %(tenant_id)s AND g.remaining_ncr > 0
         ORDER BY g.granted_at, g.grant_id LIMIT %(limit)s
        """,
        {"tenant_id": tenant_id, "limit": PAGE_MAX},
    )


async def list_ledger(
    db: ReadSide, tenant_id: UUID, limit: int = 50, after: tuple[int, int] | None = None
) -> list[LedgerLine]:
    """A tenant's ledger, newest first; `after` is (position, line) of the last line seen."""
    after_position, after_line = after or (NEWEST_POSITION, 0)
    return await db.all(
        LedgerLine,
        """
        SELECT l.position, l.line, l.account_id, l.stream_version, l.recorded_at, l.kind, l.grant_kind, l.amount_ncr,
               l.balance_after_ncr, l.meter, l.quantity, l.tool, l.agent_id, l.turn_id, l.actor,
               l.reason, l.payment_ref
          FROM credit_account a JOIN credit_ledger l USING (account_id)
         WHERE a.tenant_id = %(tenant_id)s AND (l.position, l.line) < (%(after_position)s, %(after_line)s)
         ORDER BY l.position DESC, l.line DESC LIMIT %(limit)s
        """,
        {
            "tenant_id": tenant_id,
            "limit": max(1, min(limit, PAGE_MAX)),
            "after_position": after_position,
            "after_line": after_line,
        },
    )


async def unsettled_turns(db: ReadSide, tenant_id: UUID) -> list[UUID]:
    """A tenant's turns that have ended and whose charge is not in the ledger yet; at most `UNSETTLED_MAX`."""
    rows = await db.rows(
        """
        SELECT turn_id FROM credit_hold
         WHERE tenant_id = %(tenant_id)s AND turn_ended_at IS NOT NULL
         ORDER BY turn_ended_at, turn_id LIMIT %(limit)s
        """,
        {"tenant_id": tenant_id, "limit": UNSETTLED_MAX},
    )
    return [row[0] for row in rows]


# --- accounts -------------------------------------------------------------------------------------------------------


@credit_ledger.on(CreditAccount.Opened)
def opened(record: Record[CreditAccount.Opened]) -> Insert:
    row = {
        "account_id": record.stream_id,
        "tenant_id": record.tenant_id,
        "plan": record.event.plan,
        "available_ncr": 0,
        "held_ncr": 0,
        "low_balance": False,
        "version": record.stream_version,
        "opened_at": record.recorded_at,
    }
    return Insert("credit_account", row)


@credit_ledger.on(CreditAccount.PlanChanged)
def plan_changed(record: Record[CreditAccount.PlanChanged]) -> Update:
    columns = {"plan": record.event.plan, "version": record.stream_version}
    return Update("credit_account", (record.stream_id,), columns)


@credit_ledger.on(CreditAccount.LowBalanceCrossed)
def low_balance_crossed(record: Record[CreditAccount.LowBalanceCrossed]) -> Update:
    columns = {"low_balance": True, "version": record.stream_version}
    return Update("credit_account", (record.stream_id,), columns)


@credit_ledger.on(CreditAccount.BalanceRecovered)
def balance_recovered(record: Record[CreditAccount.BalanceRecovered]) -> Update:
    columns = {"low_balance": False, "version": record.stream_version}
    return Update("credit_account", (record.stream_id,), columns)


# --- money comes and goes ----------------------------------------------------------------------------------------


@credit_ledger.on(CreditAccount.CreditsGranted)
def granted(record: Record[CreditAccount.CreditsGranted]) -> Iterator[Change]:
    grant = record.event.grant
    yield from _moved(record)
    row = {
        "grant_id": grant.grant_id,
        "account_id": record.stream_id,
        "kind": grant.kind,
        "granted_ncr": grant.remaining_ncr,
        "remaining_ncr": grant.remaining_ncr,
        "granted_at": grant.granted_at,
        "expires_at": grant.expires_at,
    }
    yield Insert("credit_grant", row)
    line = {
        "kind": "grant",
        "grant_kind": grant.kind,
        "amount_ncr": grant.remaining_ncr,
        "grant_id": grant.grant_id,
        "actor": record.actor,
        "reason": record.event.reason,
        "payment_ref": record.event.payment_ref,
    }
    yield from _lines(record, [line])


@credit_ledger.on(CreditAccount.GrantExpired)
def grant_expired(record: Record[CreditAccount.GrantExpired]) -> Iterator[Change]:
    event = record.event
    yield from _moved(record)
    yield Increment("credit_grant", (event.grant_id,), {"remaining_ncr": -event.expired_ncr})
    line = {
        "kind": "expiry",
        "amount_ncr": -event.expired_ncr,
        "grant_id": event.grant_id,
        "actor": record.actor,
    }
    yield from _lines(record, [line])


@credit_ledger.on(CreditAccount.CreditsHeld)
def held(record: Record[CreditAccount.CreditsHeld]) -> Iterator[Change]:
    event = record.event
    yield from _moved(record)
    row = {
        "hold_id": event.hold_id,
        "account_id": record.stream_id,
        "tenant_id": record.tenant_id,
        "amount_ncr": event.amount_ncr,
        "meter": event.meter,
        "held_at": event.held_at,
        "expires_at": event.expires_at,
    }
    yield Insert("credit_hold", row)


@credit_ledger.on(CreditAccount.HoldExtended)
def hold_extended(record: Record[CreditAccount.HoldExtended]) -> Iterator[Change]:
    yield from _moved(record)
    yield Increment("credit_hold", (record.event.hold_id,), {"amount_ncr": record.event.amount_ncr})


@credit_ledger.on(CreditAccount.HoldReleased, CreditAccount.HoldExpired)
def hold_ended(record: Record[CreditAccount.HoldReleased | CreditAccount.HoldExpired]) -> Iterator[Change]:
    yield from _moved(record)
    yield Delete("credit_hold", (record.event.hold_id,))


@credit_ledger.on(CreditAccount.CreditsSettled)
def settled(record: Record[CreditAccount.CreditsSettled]) -> Iterator[Change]:
    event = record.event
    yield from _moved(record)
    yield Delete("credit_hold", (event.hold_id,))
    yield from _consumed(event.slices)
    yield from _lines(record, [_charge(line, event.hold_id, event.origin) for line in event.lines])


@credit_ledger.on(CreditAccount.LateCharge)
def charged_late(record: Record[CreditAccount.LateCharge]) -> Iterator[Change]:
    event = record.event
    yield from _moved(record)
    yield from _consumed(event.slices)
    lines = [_charge(line, event.hold_id, event.origin) for line in event.lines]
    if event.uncollected_ncr:
        # First, so that no line shows a balance below zero.
        uncollected = {
            "kind": "uncollected",
            "amount_ncr": event.uncollected_ncr,
            "hold_id": event.hold_id,
            **_origin(event.origin),
        }
        lines.insert(0, uncollected)
    yield from _lines(record, lines)


# --- whose work a hold pays for ------------------------------------------------------------------------------------


@credit_ledger.on(Turn.Accepted)
def turn_accepted(record: Record[Turn.Accepted]) -> Update:
    return Update("credit_hold", (record.event.hold_id,), {"turn_id": record.stream_id})


@credit_ledger.on(Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled)
def turn_ended(record: Record[Turn.Completed | Turn.Failed | Turn.TimedOut | Turn.Cancelled]) -> Update:
    return Update("credit_hold", (record.event.hold_id,), {"turn_ended_at": record.event.ended_at})


# --- shared ----------------------------------------------------------------------------------------------------------


def _moved(record: Record[CreditAccount.Moved]) -> Iterator[Change]:
    """The balances after a movement, and its legs."""
    event = record.event
    balances = {
        "available_ncr": event.available_after_ncr,
        "held_ncr": event.held_after_ncr,
        "version": record.stream_version,
    }
    yield Update("credit_account", (record.stream_id,), balances)
    for leg, posting in enumerate(event.postings):
        row = {
            "shard": record.shard,
            "position": record.position,
            "leg": leg,
            "account_id": record.stream_id,
            "book": posting.book,
            "amount_ncr": posting.amount_ncr,
        }
        yield Insert("credit_entry", row)


def _consumed(slices: Sequence[Slice]) -> Iterator[Change]:
    for taken in slices:
        yield Increment("credit_grant", (taken.grant_id,), {"remaining_ncr": -taken.amount_ncr})


def _lines(record: Record[CreditAccount.Moved], lines: Sequence[dict[str, Any]]) -> Iterator[Change]:
    """Ledger rows with the running balance, which ends at the balance after the event."""
    event = record.event
    after_ncr = event.available_after_ncr + event.held_after_ncr
    balance_ncr = after_ncr - sum(line["amount_ncr"] for line in lines)
    for number, line in enumerate(lines):
        balance_ncr += line["amount_ncr"]
        row = {
            "shard": record.shard,
            "position": record.position,
            "line": number,
            "account_id": record.stream_id,
            "stream_version": record.stream_version,
            "tenant_id": record.tenant_id,
            "balance_after_ncr": balance_ncr,
            "recorded_at": record.recorded_at,
            **line,
        }
        yield Insert("credit_ledger", row)


def _charge(line: ChargeLine, hold_id: UUID, origin: Origin) -> dict[str, Any]:
    return {
        "kind": "charge",
        "amount_ncr": -line.amount_ncr,
        "meter": line.meter,
        "quantity": line.quantity,
        "unit_price_ncr": line.unit_price_ncr,
        "rate_card_id": line.rate_card_id,
        "tool": line.tool,
        "hold_id": hold_id,
        **_origin(origin),
    }


def _origin(origin: Origin) -> dict[str, Any]:
    return {"agent_id": origin.agent_id, "turn_id": origin.turn_id, "actor": origin.actor}
