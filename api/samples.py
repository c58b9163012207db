"""The requirements' samples, as they print them: examples of the OpenAPI document, and tests that they work so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """Request bodies by title, and what a response looks like."""

    request: Mapping[str, Any] | None = None
    response: Any = None
    status: int = 200


_ACCEPTED = {
    "request_id": "req-550e8400-e29b-41d4-a716-446655440000",
    "conversation_id": "conv-550e8400-e29b-41d4-a716-446655440000",
    "status": "pending",
    "message": "Request queued for processing. Use /api/get_answer with request_id to get the response.",
}

SAMPLES: dict[str, Sample] = {
    # SOP §5.2.3
    "create_agent": Sample(
        {
            "requirements": {
                "name": "Customer Support Bot",
                "description": "Helps customers with common questions",
                "model_id": 1,
                "agent_type": "quick_bot",
                "configuration": {
                    "system_prompt": "You are a helpful customer support assistant",
                    "enabled_tools": ["web_search", "url_resolver"],
                    "use_rag": True,
                },
            }
        }
    ),
    # SOP §4.2.2, §4.3.1, §4.3.2, §4.3.3
    "update_agent": Sample(
        {
            "enable tools": {
                "configuration": {
                    "enabled_tools": ["web_search", "url_resolver", "code_executor"],
                    "disabled_tools": [],
                }
            },
            "disable tools": {"configuration": {"disabled_tools": ["text_to_image", "transcription"]}},
            "knowledge": {"configuration": {"use_rag": True, "rag_top_k": 5, "rag_threshold": 0.7}},
            "tool calling": {"configuration": {"tools_enabled": True, "max_tool_iterations": 10}},
            "memory": {"configuration": {"use_memory": True, "max_history_messages": 50}},
        }
    ),
    # SOP §5.2.4
    "chat": Sample(
        {
            "requirements": {
                "message": "What is the weather today?",
                "conversation_id": "optional-conversation-id",
            }
        },
        {
            "response": "I'll search for today's weather information...",
            "tool_calls": [
                {"tool_name": "web_search", "parameters": {"query": "weather today"}, "result": "..."}
            ],
            "conversation_id": "conv-123",
            "iterations": 2,
        },
    ),
    # SOP §5.3.2
    "simple_chat": Sample(
        {"requirements": {"message": "Hello, how can you help me?"}},
        {
            "response": "Hello! I can help you with...",
            "tool_calls": [],
            "iterations": 1,
            "conversation_id": "conv-abc123",
        },
    ),
    # SOP §5.3.4, §5.6.3; ids in full
    "create_conversation": Sample({"requirements": {"message": "What is machine learning?"}}, _ACCEPTED, 202),
    "continue_conversation": Sample(
        {
            "requirements": {
                "conversation_id": "conv-550e8400-e29b-41d4-a716-446655440000",
                "message": "Tell me more about that",
            }
        },
        _ACCEPTED,
        202,
    ),
}
