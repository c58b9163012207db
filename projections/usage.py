"""Read model: what was used, by day, meter, agent and actor. Only what was settled counts (billing reference)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from typing import Literal
from uuid import UUID

from domain.credit_account import CreditAccount
from projections.projection import Count, Projection
from projections.read_side import ReadSide
from schemas.records import Record

usage = Projection(
    "usage",
    version=1,
    tables="""
    CREATE TABLE usage (
        tenant_id   uuid   NOT NULL,
        day         date   NOT NULL,               -- UTC, of the settlement
        meter       text   NOT NULL,
        agent_id    uuid   NOT NULL,               -- all zeros for none
        actor       text   NOT NULL,
        quantity    bigint NOT NULL,
        charged_ncr bigint NOT NULL,               -- nano-credits
        PRIMARY KEY (tenant_id, day, meter, agent_id, actor)
    );""",
)

NO_AGENT = UUID(int=0)
USAGE_ROWS_MAX = 10_000
Dimension = Literal["day", "meter", "agent", "actor"]
DIMENSIONS: tuple[Dimension, ...] = ("day", "meter", "agent", "actor")
_COLUMNS = {"day": "day", "meter": "meter", "agent": "nullif(agent_id, %(no_agent)s)", "actor": "actor"}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A sum; dimensions it is not grouped by are None. Units of `quantity`: billing reference, "Price list"."""

    day: date | None
    meter: str | None
    agent_id: UUID | None
    actor: str | None
    quantity: int
    charged_ncr: int


async def get_usage(
    db: ReadSide,
    tenant_id: UUID,
    first_day: date,
    last_day: date,
    group_by: Collection[Dimension] = ("day", "meter"),
) -> list[UsageRow]:
    """What a tenant used from `first_day` to `last_day`, both included (UTC), ordered by the dimensions asked for.

    At most `USAGE_ROWS_MAX` rows.
    """
    shown = [_COLUMNS[name] if name in group_by else "NULL" for name in DIMENSIONS]
    grouped = [str(number + 1) for number, name in enumerate(DIMENSIONS) if name in group_by]
    groups = f"GROUP BY {', '.join(grouped)} ORDER BY {', '.join(grouped)}" if grouped else ""
    return await db.all(
        UsageRow,
        f"""
        SELECT {shown[0]} AS day, {shown[1]} AS meter, {shown[2]} AS agent_id, {shown[3]} AS actor,
               coalesce(sum(quantity), 0)::bigint AS quantity, coalesce(sum(charged_ncr), 0)::bigint AS charged_ncr
          FROM usage WHERE tenant_id = %(tenant_id)s AND day BETWEEN %(first_day)s AND %(last_day)s
          {groups} LIMIT {USAGE_ROWS_MAX}
        """,
        {"tenant_id": tenant_id, "first_day": first_day, "last_day": last_day, "no_agent": NO_AGENT},
    )


@usage.on(CreditAccount.CreditsSettled, CreditAccount.LateCharge)
def charged(record: Record[CreditAccount.CreditsSettled | CreditAccount.LateCharge]) -> list[Count]:
    event, day = record.event, record.recorded_at.date()
    agent_id, actor = event.origin.agent_id or NO_AGENT, event.origin.actor
    return [
        Count(
            "usage",
            (record.tenant_id, day, line.meter, agent_id, actor),
            {"quantity": line.quantity, "charged_ncr": line.amount_ncr},
        )
        for line in event.lines
    ]
