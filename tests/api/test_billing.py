"""Credits, limits and plans over HTTP, and how fresh what is read is."""

from __future__ import annotations

from datetime import UTC, datetime

from tests.api.client import Person


async def test_a_used_up_plan_is_said_with_what_is_left_and_when_it_comes_back(ada: Person) -> None:
    assert (await ada.send("PUT", "/api/billing/plan", {"plan": "starter"})).data == {"plan": "starter"}
    chat = f"/api/agents/{ada.agent}/chat/"
    assert (await ada.ask(chat, {"message": "Hi"})).status == 200
    refused = await ada.ask(chat, {"message": "Hi"})
    assert (refused.status, refused.json["code"]) == (429, "plan_limit_exceeded")
    assert refused.headers["RateLimit-Policy"] == '"messages-day";q=1;w=86400'
    assert refused.headers["RateLimit"].startswith('"messages-day";r=0;t=')
    assert int(refused.headers["Retry-After"]) > 0
    limits = {line["meter"]: line for line in (await ada.send("GET", "/api/billing/limits")).data}
    assert (limits["message"]["used"], limits["message"]["remaining"]) == (1, 0)
    assert limits["agent_create"]["used"] == 1


async def test_an_unknown_plan_is_refused_with_those_there_are(ada: Person) -> None:
    answer = await ada.send("PUT", "/api/billing/plan", {"plan": "golden"})
    assert (answer.status, answer.json["errors"][0]["pointer"]) == (400, "/plan")
    assert "payg" in answer.json["detail"]
    plans = [plan["plan"] for plan in (await ada.send("GET", "/api/billing/plans")).data]
    assert plans == ["free", "starter", "professional", "enterprise", "payg"]


async def test_prices_are_those_of_the_requirements(ada: Person) -> None:
    rates = (await ada.send("GET", "/api/billing/rates")).data
    prices = {price["meter"]: price["credits"] for price in rates["prices"]}
    assert (prices["message"], prices["api_call"], prices["tool_call"]) == ("3.00", "0.00", "0.15")
    assert [tier["credits"] for tier in rates["video"]] == ["30.00", "45.00", "60.00", "75.00"]


async def test_usage_is_summed_up_by_what_is_asked_for(ada: Person) -> None:
    await ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": '[[tool echo {"text": "a"}]]'})
    today = str(datetime.now(UTC).date())
    usage = (await ada.send("GET", f"/api/billing/usage?from={today}&to={today}&group_by=meter,agent")).data
    sums = {line["meter"]: (line["quantity"], line["credits"], line["agent_id"]) for line in usage["sums"]}
    assert sums["message"] == (1, "3.00", ada.agent)
    assert sums["tool_call"] == (1, "0.15", ada.agent)
    for query in (
        "from=2024-01-02&to=2024-01-01",
        "from=x",
        "group_by=colour",
        "from=2020-01-01&to=2024-01-01",
    ):
        assert (await ada.send("GET", f"/api/billing/usage?{query}")).status == 400, query


async def test_the_ledger_comes_page_by_page_and_sums_up_to_the_balance(ada: Person) -> None:
    for _ in range(3):
        await ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": "Hi"})
    amounts: list[str] = []
    path = "/api/billing/ledger?limit=2"
    while path:
        page = await ada.send("GET", path)
        amounts += [entry["amount"] for entry in page.data]
        cursor = page.json["next_cursor"]
        path = f"/api/billing/ledger?limit=2&cursor={cursor}" if cursor else ""
    assert amounts == ["-3.00", "-3.00", "-3.00", "-1.50", "200.00"]


async def test_a_reader_may_ask_for_a_position_and_is_told_when_it_is_not_reached(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/"
    position = (await ada.send("PATCH", path, {"name": "B"})).headers["Oshaani-Position"]
    read = await ada.send("GET", path, headers={"Oshaani-Min-Position": position})
    assert (read.data["name"], "Oshaani-Position-Reached" in read.headers) == ("B", False)
    shard = position.partition(":")[0]
    ahead = await ada.send("GET", path, headers={"Oshaani-Min-Position": f"{shard}:999999999"})
    assert (ahead.status, ahead.headers["Oshaani-Position-Reached"]) == (200, "false")
    for bad in ("x", "32:1", "1", "1:-1"):
        assert (await ada.send("GET", path, headers={"Oshaani-Min-Position": bad})).status == 400


async def test_history_and_search_find_what_was_said(ada: Person) -> None:
    answer = await ada.ask("/api/v1/chat", {"message": "the needle 100%", "conversation_id": "hay"})
    history = (await ada.client.send("GET", f"/api/agents/{ada.agent}/history/", key=ada.agent_key)).data
    assert (history[0]["message"], history[0]["response"]) == ("the needle 100%", answer.json["response"])
    assert "charged_credits" not in history[0]
    found = (await ada.ask("/api/find_conversation", {"query": "needle 100%"})).data["messages"]
    assert {message["role"] for message in found} == {"user", "assistant"}
    named = (await ada.ask("/api/find_conversation", {"conversation_id": "hay"})).data
    assert named["message_count"] == 2


async def test_what_an_agents_users_may_know_of_it_has_no_prompt(ada: Person) -> None:
    await ada.send("PATCH", f"/api/agents/{ada.agent}/", {"configuration": {"system_prompt": "canary"}})
    for path in ("/api/v1/agents", f"/api/v1/agents/{ada.agent}", f"/api/agents/{ada.agent}/status/"):
        answer = await ada.client.send("GET", path, key=ada.agent_key)
        assert answer.status == 200
        assert b"canary" not in answer.raw
    status = await ada.client.send("GET", f"/api/agents/{ada.agent}/status/", key=ada.agent_key)
    assert (status.data["status"], status.data["tools_count"]) == ("published", 1)
