"""Callers' own servers are told that a request has ended, with what `get_answer` would tell them.

Reads `Callback.Queued` and `Callback.AttemptFailed`; asks for `StartCallback`, `CompleteCallback`, `FailCallback` or
`GiveUpCallback`. Safe to replay: an attempt is claimed under the log's lock. A message may arrive twice when a worker
dies between sending it and recording that; its `webhook-id` is the same then. Signed as Standard Webhooks
(https://www.standardwebhooks.com) have it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import b64encode
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from commands.bus import LATEST
from commands.callback import CompleteCallback, FailCallback, GiveUpCallback, StartCallback
from domain.callback import TIMEOUT_S, Callback
from domain.conversation import Conversation
from domain.crash_points import crash_point
from domain.errors import Refusal
from domain.ids import ConversationId, UserId, conversation_name, derived, shard_of
from domain.ports import EgressDenied, Fetched
from domain.turn import GRACE_S
from schemas.codec import encode_json
from schemas.records import AnyRecord
from schemas.turn_story import Story, polled
from stream_processors.processor import Processor, WayOut, Work

TURN_EVENTS_MAX = 1_000  # more than a turn can have, see domain.turn
ANSWER_BYTES_MAX = 1_000_000  # of the receiver's answer, which nobody reads
RETRY_AFTER_DIGITS_MAX = 9
UNREACHABLE, ERASED = "unreachable", "erased"

notifications = Processor("notifications")


@notifications.on(Callback.Queued)
async def queued(record: AnyRecord, work: Work) -> None:
    await send_callback(record.stream_id, UserId(record.tenant_id), work)


@notifications.on(Callback.AttemptFailed)
async def attempt_failed(record: AnyRecord, work: Work) -> None:
    if record.event.retry_at is not None:
        work.retry_at(record.event.retry_at)


async def send_callback(callback_id: UUID, tenant_id: UserId, work: Work, lost_worker: str = "") -> None:
    """Make the next attempt, if it is ours to make; `lost_worker` was at the last one and is gone, or late."""
    if lost_worker == work.worker:
        work.stop(callback_id)
    out = work.out
    if out is None or callback_id in work.running:
        return
    await out.slots.acquire()
    claimed = False
    try:
        callback = await work.bus.read(Callback, callback_id, tenant_id, LATEST)
        attempt = await _claim(callback, lost_worker, work)
        claimed = attempt is not None
        crash_point("callback.claimed")
    except Refusal:
        return  # somebody else was faster, or it is over
    finally:
        if not claimed:
            out.slots.release()
    if attempt is not None:
        work.spawn(callback_id, callback_id, _send(callback, attempt, out, work))


async def _claim(callback: Callback, lost_worker: str, work: Work) -> int | None:
    if callback.is_over:
        return None
    if callback.url is None:
        giving_up = GiveUpCallback(tenant_id=callback.owner_id, callback_id=callback.id, reason=ERASED)
        await work.ask(giving_up, derived(callback.id, ERASED), callback.turn_id)
        return None
    now = work.clock()
    command = StartCallback(
        tenant_id=callback.owner_id,
        callback_id=callback.id,
        worker=work.worker,
        lost_worker=lost_worker,
        deadline_at=now + timedelta(seconds=TIMEOUT_S),
    )
    command_id = derived(callback.id, "start", callback.attempts, work.worker)
    outcome = await work.persist(command, command_id, callback.turn_id, now + timedelta(seconds=GRACE_S))
    return None if outcome.seen else outcome.result["attempt"]


async def _send(callback: Callback, attempt: int, out: WayOut, work: Work) -> None:
    """Send the message once and record what came of it. Ours alone: the attempt was claimed."""
    began = time.monotonic()
    answer: Fetched | None = None
    try:
        body = await _message(callback, out, work)
        answer = await out.egress.fetch(
            "POST",
            callback.url or "",
            headers=_headers(callback, body, out, work.clock()),
            body=body,
            timeout_s=TIMEOUT_S,
            size_bytes_max=ANSWER_BYTES_MAX,
            follow_redirects=False,
        )
        crash_point("callback.sent")
    except EgressDenied:
        pass
    finally:
        out.slots.release()
    command = _came_of(callback, attempt, answer, int((time.monotonic() - began) * 1000))
    work.running.pop(callback.id, None)
    try:
        command_id = derived(callback.id, "sent", attempt, work.worker)
        until = work.clock() + timedelta(seconds=GRACE_S)
        await work.persist(command, command_id, callback.turn_id, until)
    except Refusal:
        pass  # it was taken over meanwhile


def _came_of(
    callback: Callback, attempt: int, answer: Fetched | None, latency_ms: int
) -> CompleteCallback | FailCallback:
    if answer is not None and 200 <= answer.status < 300:
        return CompleteCallback(
            tenant_id=callback.owner_id,
            callback_id=callback.id,
            attempt=attempt,
            status_code=answer.status,
            latency_ms=latency_ms,
        )
    return FailCallback(
        tenant_id=callback.owner_id,
        callback_id=callback.id,
        attempt=attempt,
        reason=UNREACHABLE if answer is None else f"http_{answer.status}",
        status_code=None if answer is None else answer.status,
        latency_ms=latency_ms,
        retry_after_s=_retry_after_s(answer),
    )


def _retry_after_s(answer: Fetched | None) -> float | None:
    text = answer.headers.get("retry-after", "") if answer is not None else ""
    is_number = text.isascii() and text.isdecimal() and len(text) <= RETRY_AFTER_DIGITS_MAX
    return float(text) if is_number else None


async def _message(callback: Callback, out: WayOut, work: Work) -> bytes:
    """The body: the same on every attempt, unless its content was erased meanwhile."""
    rows = await out.log.read_stream(shard_of(callback.owner_id), callback.turn_id, TURN_EVENTS_MAX)
    story = Story(callback.turn_id).tell(await out.records.open(rows))
    assert story.ended is not None, "the callback is queued by what ends the turn"
    name = await _conversation(story.conversation_id, callback.owner_id, work)
    at = story.ended.ended_at.isoformat().replace("+00:00", "Z")
    message: dict[str, Any] = {
        "type": f"request.{story.status}",
        "timestamp": at,
        "data": polled(story, name),
    }
    return encode_json(message)


async def _conversation(conversation_id: UUID | None, owner_id: UserId, work: Work) -> str | None:
    if conversation_id is None:
        return None
    conversation = await work.bus.read(Conversation, ConversationId(conversation_id), owner_id)
    return conversation.name or conversation_name(conversation_id)


def _headers(callback: Callback, body: bytes, out: WayOut, now: datetime) -> dict[str, str]:
    message_id, timestamp = f"msg_{callback.id.hex}", int(now.timestamp())
    return {
        "Content-Type": "application/json",
        "Webhook-Id": message_id,
        "Webhook-Timestamp": str(timestamp),
        "Webhook-Signature": signature(out.secrets.of(callback.actor), message_id, timestamp, body),
    }


def signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` of a message (Standard Webhooks 1.0.0, "Signature scheme")."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return "v1," + b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
