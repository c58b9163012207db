"""Ended turns are charged to their owner.

Reads `Turn.Completed`, `Failed`, `TimedOut`, `Cancelled`; asks for `SettleHold`. Safe to replay: the command id
follows from the hold, and a hold ends once.
"""

from __future__ import annotations

from commands.credit_account import SettleHold
from domain.crash_points import crash_point
from domain.credit_account import Origin
from domain.ids import derived
from domain.turn import Turn
from schemas.records import AnyRecord
from stream_processors.processor import Processor, Work

PATIENCE_S = 0.01  # nobody waits for a charge: with whatever comes next it needs no append of its own

credit_debits = Processor("credit_debits")


@credit_debits.on(Turn.Completed, Turn.Failed, Turn.TimedOut, Turn.Cancelled)
async def charge_turn(record: AnyRecord, work: Work) -> None:
    ended = record.event
    crash_point("debit.before")
    await work.bus.execute(
        SettleHold(
            tenant_id=ended.owner_id,
            hold_id=ended.hold_id,
            lines=ended.lines,
            origin=Origin(agent_id=ended.agent_id, turn_id=record.stream_id, actor=ended.actor),
        ),
        by=work.actor,
        command_id=derived(ended.hold_id, "settle"),
        caused_by=record,
        patience_s=PATIENCE_S,
    )
    crash_point("debit.after")
