"""Agents over HTTP."""

from __future__ import annotations

from typing import Any

from api.samples import SAMPLES
from domain.agent import Agent
from domain.ids import agent_of
from tests.api.client import Client, Person


async def test_the_agent_of_the_requirements_is_created_as_printed(ada: Person) -> None:
    assert SAMPLES["create_agent"].request is not None
    body = SAMPLES["create_agent"].request["requirements"]
    answer = await ada.send("POST", "/api/agents/", body)
    assert answer.status == 201, answer.raw
    assert answer.json["success"] is True
    agent = answer.data
    assert answer.headers["Location"] == f"/api/agents/{agent['id']}/"
    assert answer.headers["ETag"] == f'"v{agent["version"]}"'
    assert (agent["name"], agent["status"]) == ("Customer Support Bot", "draft")
    got = await ada.send("GET", f"/api/agents/{agent['id']}/")
    assert got.json["configuration"] == body["configuration"] == got.data["configuration"]


async def test_each_patch_of_the_requirements_changes_what_it_names_and_nothing_else(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/"
    await ada.send("PATCH", path, {"configuration": {"system_prompt": "Be brief."}})
    expected = {"system_prompt": "Be brief."}
    for title, body in (SAMPLES["update_agent"].request or {}).items():
        answer = await ada.send("PATCH", path, body)
        assert answer.status == 200, (title, answer.raw)
        expected |= body["configuration"]
        assert (await ada.send("GET", path)).json["configuration"] == expected


async def test_an_agent_costs_one_and_a_half_credits_and_not_having_them_costs_nothing(ada: Person) -> None:
    before = (await ada.send("GET", "/api/billing/balance")).data
    answer = await ada.send("POST", "/api/agents/", {"name": "One more"})
    assert answer.headers["Oshaani-Credits-Available"] == "197.00"
    after = (await ada.send("GET", "/api/billing/balance")).data
    assert (before["available"], after["available"]) == ("198.50", "197.00")


async def test_changes_of_a_version_that_has_passed_are_refused(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/"
    tag = (await ada.send("GET", path)).headers["ETag"]
    assert (await ada.send("PATCH", path, {"name": "B"}, headers={"If-Match": tag})).status == 200
    late = await ada.send("PATCH", path, {"name": "C"}, headers={"If-Match": tag})
    assert (late.status, late.json["code"]) == (412, "version_mismatch")
    assert f'"v{late.json["current_version"]}"' == (await ada.send("GET", path)).headers["ETag"]


async def test_what_is_known_already_is_not_sent_again(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/"
    tag = (await ada.send("GET", path)).headers["ETag"]
    answer = await ada.send("GET", path, headers={"If-None-Match": tag})
    assert (answer.status, answer.raw) == (304, b"")


async def test_an_agent_goes_through_its_states_and_back(ada: Person) -> None:
    agent = (await ada.send("POST", "/api/agents/", {"name": "X"})).data["id"]
    for step, status in (
        ("train", "training"),
        ("test", "testing"),
        ("publish", "published"),
        ("publish", "published"),
        ("unpublish", "draft"),
    ):
        answer = await ada.send("POST", f"/api/agents/{agent}/{step}/")
        assert (answer.status, answer.data["status"]) == (200, status)
    await ada.send("POST", f"/api/agents/{agent}/publish/")
    refused = await ada.send("POST", f"/api/agents/{agent}/train/")
    assert (refused.status, refused.json["code"]) == (409, "agent_state_conflict")
    assert "allowed_transitions" in refused.json


async def test_a_deleted_agent_is_gone_for_everybody(ada: Person) -> None:
    assert (await ada.send("DELETE", f"/api/agents/{ada.agent}/")).data is None
    assert (await ada.send("GET", f"/api/agents/{ada.agent}/")).status == 404
    assert (await ada.ask("/api/v1/chat", {"message": "Hi"})).status in (401, 403)
    assert ada.agent not in [agent["id"] for agent in (await ada.send("GET", "/api/agents/")).data]


async def test_lists_come_page_by_page_and_cursors_are_of_one_list_and_one_reader(
    ada: Person, bob: Person
) -> None:
    made = [(await ada.send("POST", "/api/agents", {"name": f"A{n}"})).data["id"] for n in range(4)]
    first = await ada.send("GET", "/api/agents/?limit=2")
    cursor = first.json["next_cursor"]
    assert f'cursor={cursor}>; rel="next"' in first.headers["Link"]
    second = await ada.send("GET", f"/api/agents/?limit=2&cursor={cursor}")
    found = [agent["id"] for agent in first.data + second.data]
    assert found == sorted(made, reverse=True)
    last = await ada.send("GET", f"/api/agents/?limit=2&cursor={second.json['next_cursor']}")
    assert [agent["id"] for agent in last.data] == [ada.agent]
    assert last.json["next_cursor"] is None
    for reader, path in ((bob, "/api/agents/"), (ada, "/api/requests/"), (ada, "/api/agents/?scope=shared")):
        joint = "&" if "?" in path else "?"
        refused = await reader.send("GET", f"{path}{joint}cursor={cursor}")
        assert (refused.status, refused.json["code"]) == (400, "invalid_cursor"), path


async def test_unknown_configuration_is_kept_and_said_to_have_no_effect(ada: Person) -> None:
    answer = await ada.send("POST", "/api/agents/", {"name": "X", "configuration": {"colour": "green"}})
    assert answer.data["configuration"] == {"colour": "green"}
    assert "colour" in answer.data["warnings"][0]


async def test_a_model_that_this_server_does_not_have_is_refused(ada: Person) -> None:
    answer = await ada.send("POST", "/api/agents/", {"name": "X", "model_id": 77})
    assert (answer.status, answer.json["errors"][0]["pointer"]) == (400, "/model_id")
    models = (await ada.send("GET", "/api/models/")).json
    assert (models["data"][0]["model_id"], models["default_model_id"]) == (1, 1)


async def test_the_tools_say_whether_they_are_enabled_and_what_they_lack(ada: Person) -> None:
    await ada.send("PATCH", f"/api/agents/{ada.agent}/", {"configuration": {"disabled_tools": ["echo"]}})
    tools = {tool["name"]: tool for tool in (await ada.send("GET", f"/api/agents/{ada.agent}/tools/")).data}
    assert (tools["echo"]["enabled"], tools["echo"]["available"]) == (False, True)
    assert (tools["oracle"]["enabled"], tools["oracle"]["available"]) == (True, False)
    assert "crystal ball" in tools["oracle"]["reason"]


WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "method": "GET",
    "url": "https://weather.example/{city}",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "headers": {"X-Api-Key": "canary-secret-1", "Accept": "application/json"},
}


async def test_a_custom_tools_secrets_are_never_shown_and_kept_when_sent_back_masked(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/custom-tools/"
    made = await ada.send("POST", path, WEATHER)
    assert made.status == 201, made.raw
    assert made.data["headers"] == {"X-Api-Key": "********", "Accept": "application/json"}
    agent = await _stored(ada)
    ref = agent["headers"]["X-Api-Key"]["secret_ref"]
    vault = ada.platform.server.vault
    assert ada.platform.run(vault.get(ada.user_id, ref)) == "canary-secret-1"
    changed = await ada.send("PUT", path + "weather/", {**made.data, "description": "Changed."})
    assert changed.status == 200, changed.raw
    assert (await _stored(ada))["headers"]["X-Api-Key"]["secret_ref"] == ref
    assert b"canary" not in (await ada.send("GET", path)).raw + changed.raw
    assert (await ada.send("DELETE", path + "weather/")).status == 200
    assert ada.platform.run(vault.get(ada.user_id, ref)) is None


async def _stored(ada: Person) -> dict[str, Any]:
    agent = ada.platform.run(ada.platform.server.bus.read(Agent, agent_of(ada.agent), ada.user_id))
    return dict(agent.custom_tools["weather"])


async def test_a_bad_custom_tool_names_every_fault(ada: Person) -> None:
    bad = {**WEATHER, "name": "web_search", "url": "ftp://x", "headers": {"Host": "x"}}
    answer = await ada.send("POST", f"/api/agents/{ada.agent}/custom-tools/", bad)
    assert answer.status == 400
    assert {error["pointer"] for error in answer.json["errors"]} >= {"/name", "/url", "/headers/Host"}


async def test_an_agent_has_at_most_ten_custom_tools(ada: Person) -> None:
    path = f"/api/agents/{ada.agent}/custom-tools/"
    for number in range(10):
        assert (await ada.send("POST", path, {**WEATHER, "name": f"tool_{number}"})).status == 201
    answer = await ada.send("POST", path, {**WEATHER, "name": "one_more"})
    assert (answer.status, answer.json["code"]) == (409, "custom_tool_limit")


async def test_an_agents_key_is_shown_once_and_works_at_once(ada: Person, client: Client) -> None:
    path = f"/api/agents/{ada.agent}/api-keys/"
    made = (await ada.send("POST", path, {"name": "shop"})).data
    chat = await client.send("POST", "/api/v1/chat", {"message": "Hi"}, key=made["key"])
    assert chat.status == 200, chat.raw
    listed = await ada.send("GET", path)
    assert made["key"].encode() not in listed.raw
    row = next(row for row in listed.data if row["id"] == made["id"])
    assert (row["name"], row["prefix"], row["revoked_at"]) == ("shop", made["prefix"], None)
    assert row["last_used_at"] is not None


async def test_a_rotated_key_is_refused_at_once_and_the_new_one_works(ada: Person, client: Client) -> None:
    path = f"/api/agents/{ada.agent}/api-keys/"
    old = (await ada.send("POST", path, {"name": "shop"})).data
    new = (await ada.send("POST", f"{path}{old['id']}/rotate/")).data
    assert new["name"] == "shop"
    refused = await client.send("POST", "/api/v1/chat", {"message": "Hi"}, key=old["key"])
    assert (refused.status, refused.json["code"]) == (401, "key_revoked")
    assert (await client.send("POST", "/api/v1/chat", {"message": "Hi"}, key=new["key"])).status == 200


async def test_keys_of_an_unpublished_agent_are_suspended_until_it_is_published_again(ada: Person) -> None:
    await ada.send("POST", f"/api/agents/{ada.agent}/unpublish/")
    refused = await ada.ask("/api/v1/chat", {"message": "Hi"})
    assert (refused.status, refused.json["code"]) == (403, "agent_not_published")
    issued = await ada.send("POST", f"/api/agents/{ada.agent}/api-keys/")
    assert (issued.status, issued.json["code"]) == (409, "agent_state_conflict")
    await ada.send("POST", f"/api/agents/{ada.agent}/publish/")
    assert (await ada.ask("/api/v1/chat", {"message": "Hi"})).status == 200


async def test_the_owner_may_try_a_draft_with_a_user_key(ada: Person) -> None:
    draft = (await ada.send("POST", "/api/agents/", {"name": "Draft"})).data["id"]
    answer = await ada.send("POST", f"/api/agents/{draft}/chat/", {"message": "Hello"})
    assert answer.json["response"] == "You said: Hello"
    assert answer.headers["Oshaani-Credits-Charged"] == "3.00"
