"""What workers ask about callbacks: to begin an attempt, and to record what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from commands.command import Command, Result, WriteSide, handles
from domain.callback import Callback
from domain.turn import GRACE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfCallback(Command):
    """Something asked about one callback."""

    callback_id: UUID

    def reads(self) -> tuple[UUID, ...]:
        return (self.callback_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCallback(_OfCallback):
    """Claim the next attempt. `lost_worker` had the one before and is gone, "" when nobody had."""

    worker: str
    lost_worker: str
    deadline_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteCallback(_OfCallback):
    """The receiver has confirmed the message."""

    attempt: int
    status_code: int
    latency_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailCallback(_OfCallback):
    """The receiver has not confirmed the message."""

    attempt: int
    reason: str
    status_code: int | None
    latency_ms: int
    retry_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUpCallback(_OfCallback):
    """There is nothing left that could be sent."""

    reason: str


@handles(StartCallback)
def start_callback(command: StartCallback, write: WriteSide) -> Result:
    callback = write.get(Callback, command.callback_id)
    attempt = callback.start(command.worker, command.lost_worker, command.deadline_at, write.now)
    if attempt is None:
        write.done("callback", callback.id, callback.id)
    else:
        late_at = command.deadline_at + timedelta(seconds=GRACE_S)
        write.due("callback", callback.id, callback.id, late_at, command.worker)
    return {"attempt": attempt}


@handles(CompleteCallback)
def complete_callback(command: CompleteCallback, write: WriteSide) -> None:
    callback = write.get(Callback, command.callback_id)
    callback.deliver(command.attempt, command.status_code, command.latency_ms, write.now)
    write.done("callback", callback.id, callback.id)


@handles(FailCallback)
def fail_callback(command: FailCallback, write: WriteSide) -> None:
    callback = write.get(Callback, command.callback_id)
    callback.fail(
        command.attempt,
        command.reason,
        command.status_code,
        command.latency_ms,
        command.retry_after_s,
        write.now,
    )
    if callback.retry_at is None:
        write.done("callback", callback.id, callback.id)
    else:
        write.due("callback", callback.id, callback.id, callback.retry_at)


@handles(GiveUpCallback)
def give_up_callback(command: GiveUpCallback, write: WriteSide) -> None:
    callback = write.get(Callback, command.callback_id)
    callback.give_up(command.reason)
    write.done("callback", callback.id, callback.id)
