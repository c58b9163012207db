"""Talking to an agent over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

from api.samples import SAMPLES
from tests.api.client import HEARTBEAT, Client, Event, Person


async def test_a_chat_is_answered_as_the_requirements_print_it(ada: Person) -> None:
    assert SAMPLES["chat"].request is not None
    body = SAMPLES["chat"].request["requirements"]
    answer = await ada.ask(f"/api/agents/{ada.agent}/chat/", body)
    assert answer.status == 200, answer.raw
    assert answer.json["response"] == "You said: What is the weather today?"
    assert answer.json["conversation_id"] == "optional-conversation-id"
    assert (answer.json["tool_calls"], answer.json["iterations"]) == ([], 1)
    assert answer.headers["Oshaani-Credits-Charged"] == "3.00"
    assert answer.headers["RateLimit-Policy"] == '"messages-day";q=200;w=86400'
    assert answer.headers["RateLimit"].startswith('"messages-day";r=199;t=')
    assert "Oshaani-Credits-Available" not in answer.headers


async def test_the_tools_that_were_called_come_with_the_answer(ada: Person) -> None:
    message = '[[tool echo {"text": "hey"}]]'
    answer = await ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": message})
    assert answer.json["tool_calls"] == [
        {"tool_name": "echo", "parameters": {"text": "hey"}, "result": "echo: hey", "outcome": "succeeded"}
    ]
    assert answer.json["response"] == "The tool said: echo: hey"
    assert answer.json["iterations"] == 2
    assert answer.headers["Oshaani-Credits-Charged"] == "3.15"


async def test_both_ways_to_send_an_agents_key_and_both_forms_of_a_path_work(
    ada: Person, client: Client
) -> None:
    for headers in (
        {"Authorization": f"ApiKey {ada.agent_key}"},
        {"X-API-Key": ada.agent_key},
        {"Authorization": f"Bearer {ada.agent_key}"},
    ):
        for path in ("/api/v1/chat", "/api/v1/chat/"):
            answer = await client.send(
                "POST", path, {"message": "Hello, how can you help me?"}, headers=headers
            )
            assert answer.status == 200, answer.raw
            assert answer.json["conversation_id"].startswith("conv-")


async def test_a_conversation_goes_on_by_its_id_and_by_the_callers_own_name(ada: Person) -> None:
    first = (await ada.ask("/api/v1/chat", {"message": "one"})).json["conversation_id"]
    for name in (first, "my thread"):
        for message in ("two", "three"):
            answer = await ada.ask("/api/v1/chat", {"message": message, "conversation_id": name})
            assert answer.json["conversation_id"] == name
    found = await ada.ask("/api/find_conversation", {"conversation_id": first})
    assert [message["content"] for message in found.data["messages"]][-1] == "one"
    assert len(found.data["messages"]) == 6
    unknown = await ada.ask("/api/v1/chat", {"message": "x", "conversation_id": f"conv-{uuid4()}"})
    assert (unknown.status, unknown.json["code"]) == (404, "not_found")


async def test_a_message_may_interrupt_the_one_that_is_being_answered(ada: Person) -> None:
    gate = str(uuid4())
    path, thread = f"/api/agents/{ada.agent}/chat/", {"conversation_id": "thread"}
    body = {"message": f"[[gate {gate}]]", **thread}
    async with ada.client.events("POST", path, {**body, "stream": True}, ada.agent_key) as events:
        async for event in events:
            if event.name == "token":
                break
        refused = await ada.ask(path, {"message": "me too", "when_busy": "reject", **thread})
        answer = await ada.ask(path, {"message": "now", "when_busy": "interrupt", **thread})
        last = [event async for event in events][-1]
    ada.platform.model.open_gate(gate)
    assert (refused.status, refused.json["code"]) == (409, "conversation_busy")
    assert (answer.status, answer.json["response"]) == (200, "You said: now")
    assert (last.name, last.data["code"]) == ("error", "request_cancelled")
    assert (await ada.ask(path, {"message": "x", "when_busy": "shout"})).status == 400


async def test_a_search_gives_page_after_page(ada: Person) -> None:
    for n in range(3):
        await ada.ask("/api/v1/chat", {"message": f"Needle {n}", "conversation_id": "hay"})
    body: dict[str, Any] = {"query": "needle", "limit": 2}
    found, cursors = [], []
    while body.get("cursor", "") is not None:
        page = await ada.ask("/api/find_conversation", body)
        found += page.data["messages"]
        body["cursor"] = page.json["next_cursor"]
        cursors.append(body["cursor"])
    assert [each["content"] for each in found][::2] == [f"You said: Needle {n}" for n in (2, 1, 0)]
    assert {each["conversation_id"] for each in found} == {"hay"}
    other = await ada.ask("/api/find_conversation", {"query": "other", "cursor": cursors[0]})
    assert (other.status, other.json["code"]) == (400, "invalid_cursor")


async def test_a_query_may_be_called_a_message(ada: Person) -> None:
    for path in (f"/api/agents/{ada.agent}/query/", "/api/v1/query"):
        for field in ("query", "message"):
            answer = await ada.ask(path, {field: "What?"})
            assert answer.json["response"] == "You said: What?"
        assert (await ada.ask(path, {})).status == 400


async def test_an_action_is_one_tool_without_a_model(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/invoke/"
    answer = await ada.ask(path, {"action": "echo", "parameters": {"text": "hey"}})
    assert answer.status == 200, answer.raw
    assert (answer.json["tool_name"], answer.json["result"]) == ("echo", "echo: hey")
    assert answer.headers["Oshaani-Credits-Charged"] == "0.15"
    assert (await ada.ask(path, {"action": "echo", "parameters": {"texd": 1}})).status == 400
    assert (await ada.ask(path, {"action": "none"})).json["errors"][0]["pointer"] == "/action"
    assert (await ada.ask(path, {"action": "oracle", "parameters": {"question": "?"}})).status == 422
    failed = await ada.ask(path, {"action": "echo", "parameters": {"text": "fail"}})
    assert (failed.status, failed.json["detail"]) == (502, "The echo is broken.")


async def test_a_model_that_fails_is_told_as_such_and_costs_nothing(ada: Person) -> None:
    answer = await ada.ask("/api/v1/chat", {"message": "[[fail refused]]"})
    assert (answer.status, answer.json["code"]) == (502, "upstream_failed")
    assert answer.json["detail"] == "The scripted model will not."
    polled = await ada.client.send(
        "GET", f"/api/get_answer?request_id={answer.json['request_id']}", key=ada.agent_key
    )
    assert (polled.status, polled.json["status"], polled.json["code"]) == (200, "failed", "upstream_failed")
    assert polled.json["error_message"] == "The scripted model will not."


async def test_what_takes_too_long_to_wait_for_is_polled_for(ada: Person) -> None:
    gate = str(uuid4())
    late = await ada.ask("/api/v1/chat", {"message": f"[[gate {gate}]]"})
    assert (late.status, late.json["status"]) == (202, "processing")
    assert late.headers["Location"] == f"/api/get_answer?request_id={late.json['request_id']}"
    ada.platform.model.open_gate(gate)
    answer = await ada.client.send("GET", late.headers["Location"] + "&wait=10", key=ada.agent_key)
    assert (answer.json["status"], answer.json["response"]) == ("completed", "Half of it.")


async def test_a_conversation_is_begun_without_waiting_and_its_answer_fetched(ada: Person) -> None:
    assert SAMPLES["create_conversation"].request is not None
    accepted = await ada.ask(
        "/api/create_conversation", SAMPLES["create_conversation"].request["requirements"]
    )
    assert accepted.status == 202
    assert set(accepted.json) == {"request_id", "conversation_id", "status", "message"}
    assert accepted.json["status"] == "pending"
    assert accepted.headers["Retry-After"] == "1"
    path = f"/api/get_answer?request_id={accepted.json['request_id']}&wait=10"
    answer = await ada.client.send("GET", path, key=ada.agent_key)
    assert answer.json["response"] == "You said: What is machine learning?"
    assert answer.json["conversation_id"] == accepted.json["conversation_id"]
    told = await ada.send("GET", f"/api/requests/{accepted.json['request_id']}")
    assert told.data["model"] == "scripted:one", told.raw
    again = await ada.client.send(
        "GET", path, key=ada.agent_key, headers={"If-None-Match": answer.headers["ETag"]}
    )
    assert again.status == 304
    more = await ada.ask(
        "/api/continue_conversation",
        {"conversation_id": accepted.json["conversation_id"], "message": "Tell me more about that"},
    )
    assert (more.status, more.json["conversation_id"]) == (202, accepted.json["conversation_id"])


async def test_a_cancelled_request_ends_and_its_sender_is_told(ada: Person) -> None:
    gate = str(uuid4())
    waiting = asyncio.create_task(ada.ask("/api/v1/chat", {"message": f"[[gate {gate}]]"}))
    listed: list[dict[str, str]] = []
    async with asyncio.timeout(5):
        while not listed:
            listed = (await ada.send("GET", "/api/requests/")).data
    request = listed[0]["request_id"]
    cancelled = await ada.send("POST", f"/api/requests/{request}/cancel/", {"reason": "enough"})
    assert cancelled.status == 200, cancelled.raw
    answer = await waiting
    assert (answer.status, answer.json["code"]) == (409, "request_cancelled")
    assert (await ada.send("POST", f"/api/requests/{request}/cancel/")).status == 409
    ada.platform.model.open_gate(gate)


async def test_a_balance_read_after_an_answer_has_its_charge(ada: Person) -> None:
    for spent in range(1, 4):
        await ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": "Hi"})
        balance = (await ada.send("GET", "/api/billing/balance")).data
        assert (balance["posted"], balance["held"]) == (f"{198.5 - 3 * spent:.2f}", "0.00")
    ledger = (await ada.send("GET", "/api/billing/ledger")).data
    assert [entry["amount"] for entry in ledger] == ["-3.00", "-3.00", "-3.00", "-1.50", "200.00"]
    assert ledger[0]["agent_id"] == ada.agent


async def test_without_credits_a_guest_is_told_without_amounts_and_the_owner_with(ada: Person) -> None:
    await ada.send("PUT", "/api/billing/plan", {"plan": "payg"})
    answers = await asyncio.gather(
        *(ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": "Hi"}) for _ in range(70))
    )
    assert {answer.status for answer in answers} == {200, 402}
    poor = next(answer for answer in answers if answer.status == 402)
    assert poor.json["owner_must_top_up"] is True
    assert "required" not in poor.json
    owner = await ada.send("POST", f"/api/agents/{ada.agent}/chat/", {"message": "Hi"})
    assert (owner.status, owner.json["required"]) == (402, "3.00")
    assert owner.json["top_up_url"].startswith(ada.client.base_url)


# --- asking twice -----------------------------------------------------------------------------------------------


async def test_the_same_request_sent_again_has_its_effect_once(ada: Person) -> None:
    headers = {"Idempotency-Key": f'"{uuid4()}"'}
    first = await ada.ask("/api/v1/chat", {"message": "Hi", "conversation_id": "a"}, headers=headers)
    again = await ada.ask("/api/v1/chat/", {"conversation_id": "a", "message": "Hi"}, headers=headers)
    assert (again.status, again.json) == (first.status, first.json)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    other = await ada.ask("/api/v1/chat", {"message": "Ho", "conversation_id": "a"}, headers=headers)
    assert (other.status, other.json["code"]) == (422, "idempotency_key_reused")
    assert len((await ada.send("GET", f"/api/agents/{ada.agent}/history/")).data) == 1


async def test_fifty_equal_requests_at_once_are_one(ada: Person) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    sent = (ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": "Hi"}, headers=headers) for _ in range(50))
    answers = await asyncio.gather(*sent)
    assert {answer.status for answer in answers} == {200}
    assert len({answer.raw for answer in answers}) == 1
    assert (await ada.send("GET", "/api/billing/balance")).data["posted"] == "195.50"


async def test_a_key_that_was_refused_for_lack_of_credits_is_not_used_up(ada: Person) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    path = f"/api/agents/{ada.agent}/unpublish/"
    await ada.send("POST", path)
    chat = f"/api/agents/{ada.agent}/chat/"
    assert (await ada.ask(chat, {"message": "Hi"}, headers=headers)).status == 403
    await ada.send("POST", f"/api/agents/{ada.agent}/publish/")
    assert (await ada.ask(chat, {"message": "Hi"}, headers=headers)).status == 200


async def test_a_created_agent_and_key_are_created_once(ada: Person) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    first = await ada.send("POST", "/api/agents/", {"name": "X"}, headers=headers)
    again = await ada.send("POST", "/api/agents/", {"name": "X"}, headers=headers)
    assert (again.status, again.json) == (first.status, first.json)
    key = await ada.send("POST", "/api/api-keys/", {"name": "k"}, headers=headers)
    replay = await ada.send("POST", "/api/api-keys/", {"name": "k"}, headers=headers)
    assert (replay.data["id"], replay.data["key"]) == (key.data["id"], None)


# --- streams ------------------------------------------------------------------------------------------------------


def said(events: list[Event]) -> str:
    return "".join(event.data["delta"] for event in events if event.name == "token")


async def test_a_stream_tells_the_answer_as_it_is_written_and_ends_with_the_same_answer(ada: Person) -> None:
    body = {"message": '[[tool echo {"text": "hey"}]]', "stream": True}
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        events = [event async for event in stream]
    names = [event.name for event in events]
    assert names[0] == "status"
    assert names.index("tool_call") < names.index("tool_result") < names.index("token") < names.index("done")
    assert events[-1].name == "done"
    done = events[-1].data
    assert (done["type"], done["response"]) == ("RUN_FINISHED", said(events))
    polled = await ada.send("GET", f"/api/get_answer?request_id={done['request_id']}")
    assert polled.json["response"] == done["response"]
    assert polled.json["tool_calls"] == done["tool_calls"]
    types = {event.data["type"] for event in events}
    assert {"RUN_STARTED", "TOOL_CALL_START", "TOOL_CALL_RESULT", "TEXT_MESSAGE_CONTENT"} <= types


async def test_a_lost_stream_goes_on_where_it_was_wherever_that_was(ada: Person) -> None:
    body = {"message": "one two three four", "stream": True}
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        events = [event async for event in stream]
    path = f"/api/requests/{events[-1].data['request_id']}/events"
    for cut, event in enumerate(events):
        headers = {"Last-Event-ID": event.id}
        async with ada.client.events("GET", path, key=ada.agent_key, headers=headers) as stream:
            rest = [event async for event in stream]
        assert said(events[: cut + 1]) + said(rest) == "You said: one two three four", event
        if event.name != "done":
            assert rest[-1].data["response"] == "You said: one two three four"


async def test_a_stream_joined_in_the_middle_has_what_was_written_before(ada: Person) -> None:
    gate = str(uuid4())
    body = {"message": f"[[gate {gate}]]", "stream": True}
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        first = []
        async for event in stream:
            first.append(event)
            if event.name == "token":
                break
    # The one who asked has gone; the turn goes on.
    request = first[0].data["request_id"]
    async with ada.client.events("GET", f"/api/requests/{request}/events", key=ada.agent_key) as stream:
        joined = []
        async for event in stream:
            joined.append(event)
            if event.name == "token":
                ada.platform.model.open_gate(gate)
    assert said(joined) == "Half of it."
    headers = {"Last-Event-ID": first[-1].id}
    async with ada.client.events(
        "GET", f"/api/requests/{request}/events", key=ada.agent_key, headers=headers
    ) as s:
        rest = [event async for event in s]
    assert said(first) + said(rest) == "Half of it."


async def test_a_new_attempt_takes_back_what_the_last_one_wrote(ada: Person) -> None:
    gate, events = str(uuid4()), []
    body = {"message": f"[[flaky {gate}]]", "stream": True}
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        async for event in stream:
            events.append(event)
            if event.name == "token":
                ada.platform.model.open_gate(gate)
    names = [event.name for event in events]
    reset = names.index("reset")
    assert said(events[:reset]) == "These words are "
    assert said(events[reset:]) == events[-1].data["response"]


async def test_a_stream_of_a_failure_ends_with_the_error(ada: Person) -> None:
    body = {"message": "[[fail refused]]", "stream": True}
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        events = [event async for event in stream]
    assert events[-1].name == "error"
    assert (events[-1].data["type"], events[-1].data["code"]) == ("RUN_ERROR", "upstream_failed")


async def test_a_revoked_key_hears_no_more_within_a_second(ada: Person) -> None:
    gate = str(uuid4())
    body = {"message": f"[[gate {gate}]]", "stream": True}
    loop = asyncio.get_running_loop()
    revoked_at = 0.0
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        async for event in stream:
            if event.name == "token":
                keys = (await ada.send("GET", f"/api/agents/{ada.agent}/api-keys/")).data
                await ada.send("DELETE", f"/api/agents/{ada.agent}/api-keys/{keys[0]['id']}/")
                revoked_at = loop.time()
    assert loop.time() - revoked_at < 1.5
    ada.platform.model.open_gate(gate)


async def test_a_silent_stream_shows_that_it_is_alive(ada: Person) -> None:
    gate = str(uuid4())
    body = {"message": f"[[gate {gate}]]", "stream": True}
    names = []
    async with ada.client.events("POST", "/api/v1/chat", body, key=ada.agent_key) as stream:
        async for event in stream:
            names.append(event.name)
            if event is HEARTBEAT:
                ada.platform.model.open_gate(gate)
    assert names[-1] == "done"
