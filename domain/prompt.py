"""From a conversation's past and a turn's story to the messages a model is asked with. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from domain.ports import Message, ToolRequest
from domain.turn import Turn

FORGOTTEN = "[erased]"  # stands where personal text was destroyed


@dataclass(frozen=True, slots=True)
class Exchange:
    """An answered turn of the past. Versions are those of its two messages in the conversation's stream."""

    asked: str
    answered: str
    asked_version: int
    answered_version: int


def first_messages_of(
    history: Sequence[Exchange], question: str, history_messages_max: int
) -> tuple[Message, ...]:
    """The prompt of a turn's first call: the last `history_messages_max` messages of the past, and the question."""
    kept = history[max(0, len(history) - history_messages_max // 2) :] if history_messages_max > 1 else ()
    messages: list[Message] = []
    for exchange in kept:
        messages += (Message("user", exchange.asked), Message("assistant", exchange.answered))
    messages.append(Message("user", question))
    return tuple(messages)


def messages_of(
    history: Sequence[Exchange], question: str, turn: Turn, history_messages_max: int
) -> tuple[Message, ...]:
    """The prompt: that of the first call, and what happened since."""
    messages = [*first_messages_of(history, question, history_messages_max)]
    for said in turn.said:
        calls = [turn.tool_calls[tool_call_id] for tool_call_id in said.tool_call_ids]
        requests = tuple(
            ToolRequest(
                call.model_ref, call.tool, dict(call.arguments or {}), json.dumps(call.arguments or {})
            )
            for call in calls
        )
        messages.append(Message("assistant", said.text or "", requests))
        messages += (Message("tool", call.result or FORGOTTEN, tool_call_id=call.model_ref) for call in calls)
    return tuple(messages)


def digest_of(system: str, messages: Sequence[Message]) -> str:
    """A fingerprint of a prompt, so that an auditor can prove which one was sent."""
    parts = [
        [
            *(message.role, message.content, message.tool_call_id),
            *([request.id, request.name, request.raw] for request in message.tool_requests),
        ]
        for message in messages
    ]
    return sha256(json.dumps([system, parts]).encode()).hexdigest()
