"""Talking to an agent over HTTP."""

from __future__ import annotations

import asyncio

from tests.api.client import Client, Person


async def test_a_chat_is_answered_as_the_requirements_print_it(ada: Person) -> None:
    answer = await ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": "Hello"})
    assert answer.status == 200, answer.raw
    body = answer.json
    assert body["response"] == "You said: Hello"
    assert body["tool_calls"] == []
    assert body["iterations"] == 1
    assert body["conversation_id"].startswith("conv-")
    assert answer.headers["Oshaani-Credits-Charged"] == "3.00"
