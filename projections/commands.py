"""What was asked and what became of it: the audit trail, read from the write side's own table."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from projections.read_side import After, ReadSide, page


@dataclass(frozen=True, slots=True)
class CommandAudit:
    """A command. `outcome` is "accepted" or a refusal's code; `position` that of its last event, 0 without any."""

    shard: int
    command_id: UUID
    tenant_id: UUID
    type: str
    actor: str
    outcome: str
    attempts: int
    position: int
    recorded_at: datetime

    @property
    def after(self) -> After:
        return self.recorded_at, self.command_id


async def list_commands(
    db: ReadSide, tenant_id: UUID | None = None, limit: int = 50, after: After | None = None
) -> list[CommandAudit]:
    """Commands, newest first; those of all tenants with None, for operators."""
    tenant = "AND tenant_id = %(tenant_id)s" if tenant_id else ""
    return await db.all(
        CommandAudit,
        f"""
        SELECT shard, command_id, tenant_id, type, actor, outcome, attempts, position, recorded_at
          FROM command WHERE (recorded_at, command_id) < (%(after_at)s, %(after_id)s) {tenant}
         ORDER BY recorded_at DESC, command_id DESC LIMIT %(limit)s
        """,
        {"tenant_id": tenant_id, **page(limit, after)},
    )
