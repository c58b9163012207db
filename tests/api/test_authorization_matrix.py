"""Nobody reaches what is somebody else's: every operation of the OpenAPI document, with every kind of stranger.

The operations and their ids come from the document, so that a new one is tried without being added here; one whose
ids this file cannot fill in fails.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from domain.ids import shard_of
from tests.api.client import Answer, Client, Person
from tests.api.platform import Platform

PUBLIC = {"register", "logIn", "getHealth", "getReadiness", "getMetrics", "getOpenapi", "getDocs"} | {
    "getAsyncapi",
    "getEventSchema",
}
# About the caller only: nothing in the request names a thing of somebody's.
OWN_THINGS = {
    "listAgentsOfUser",
    "createAgent",
    "listUserKeys",
    "createUserKey",
    "logOut",
    "me",
    "eraseMe",
    "getWebhookSecret",
    "getBalance",
    "getLedger",
    "getLimits",
    "changePlan",
    "listPlans",
    "getRates",
    "getUsageOfUser",
    "createConversation",
    "listModels",
    "listAccessibleAgents",
    "simpleChat",
    "simpleQuery",
}
TOOL = {"name": "secret_tool", "description": "x", "method": "GET", "url": "https://x.example/"}
BODIES: dict[str, Any] = {
    "createAgent": {"name": "X"},
    "updateAgent": {"name": "Stolen"},
    "createAgentKey": {"name": "x"},
    "createUserKey": {"name": "x"},
    "rotateAgentKey": {"name": "x"},
    "chat": {"message": "Hi", "conversation_id": "{conversation_id}"},
    "query": {"query": "Hi", "conversation_id": "{conversation_id}"},
    "invoke": {"action": "echo", "parameters": {"text": "x"}},
    "simpleChat": {"message": "Hi", "conversation_id": "{conversation_id}"},
    "simpleQuery": {"query": "Hi", "conversation_id": "{conversation_id}"},
    "createConversation": {"message": "Hi"},
    "continueConversation": {"message": "Hi", "conversation_id": "{conversation_id}"},
    "findConversation": {"conversation_id": "{conversation_id}"},
    "createCustomTool": TOOL | {"name": "another"},
    "replaceCustomTool": TOOL | {"name": ""},
    "changePlan": {"plan": "payg"},
    "eraseMe": {"email": "somebody@example.com"},
    "cancelRequest": {"reason": "x"},
}
WITHOUT_BODY = {"deleteAgent", "publishAgent", "unpublishAgent", "trainAgent", "testAgent", "logOut"} | {
    "revokeAgentKey",
    "revokeUserKey",
    "deleteCustomTool",
}


@dataclass(frozen=True, slots=True)
class Operation:
    name: str
    method: str
    path: str
    agent_keys: bool

    def filled(self, things: dict[str, str]) -> tuple[str, Any]:
        """Path and body with a person's ids; fails for an id that is not known here."""
        path = re.sub(r"\{(\w+)\}", lambda found: things[found[1]], self.path)
        if self.name == "getAnswer":
            path += f"?request_id={things['request_id']}"
        if self.name in ("listRequestsOfCaller", "getHistory"):
            path += f"?conversation_id={things['conversation_id']}"
        body = BODIES.get(self.name)
        if body is None:
            assert self.method == "GET" or self.name in WITHOUT_BODY, f"no body known for {self.name}"
            return path, None
        return path, {
            key: things["conversation_id"] if value == "{conversation_id}" else value
            for key, value in body.items()
        }


def operations(platform: Platform) -> Iterator[Operation]:
    for path, item in platform.app.openapi()["paths"].items():
        for method, operation in item.items():
            if operation["operationId"] not in PUBLIC:
                schemes = {name for each in operation["security"] for name in each}
                yield Operation(operation["operationId"], method.upper(), path, "agentApiKey" in schemes)


@pytest.fixture
async def things(ada: Person) -> dict[str, str]:
    """What Ada has: an id for every field of the document."""
    chat = await ada.ask(f"/api/agents/{ada.agent}/chat/", {"message": "my secret"})
    tool = await ada.send("POST", f"/api/agents/{ada.agent}/custom-tools/", TOOL)
    assert tool.status == 201, tool.raw
    keys = (await ada.send("GET", f"/api/agents/{ada.agent}/api-keys/")).data
    return {
        "agent_id": str(ada.agent),
        "key_id": keys[0]["id"],
        "name": TOOL["name"],
        "request_id": chat.json["request_id"],
        "conversation_id": chat.json["conversation_id"],
    }


async def head_of(person: Person) -> tuple[int, int]:
    """How much has happened to a person, and to which shard."""
    platform = person.platform
    shard = shard_of(person.user_id)
    rows = platform.run(platform.log.read_after({shard: 0}, 100_000))
    return shard, sum(1 for row in rows if row.tenant_id == person.user_id)


def leaks(answer: Answer) -> bool:
    return b"my secret" in answer.raw or TOOL["name"].encode() in answer.raw


async def test_a_stranger_reaches_nothing_of_anybodys(
    platform: Platform, client: Client, ada: Person, bob: Person, things: dict[str, str]
) -> None:
    second = (await ada.send("POST", "/api/agents/", {"name": "Second"})).data["id"]
    await ada.send("POST", f"/api/agents/{second}/publish/")
    other_agents = (await ada.send("POST", f"/api/agents/{second}/api-keys/")).data["key"]
    revoked = (await ada.send("POST", f"/api/agents/{ada.agent}/api-keys/")).data
    await ada.send("DELETE", f"/api/agents/{ada.agent}/api-keys/{revoked['id']}/")
    strangers = {
        "nobody": None,
        "another user": bob.key,
        "another user's agent key": bob.agent_key,
        "another agent's key": other_agents,
        "a revoked key": revoked["key"],
        "an invented key": "osh_agent_0000000000000000_" + "0" * 43,
    }
    before = await head_of(ada)
    for operation in operations(platform):
        path, body = operation.filled(things)
        tried = [who for who in strangers if not is_about_the_stranger(operation, who)]
        answers = await asyncio.gather(
            *(client.send(operation.method, path, body, key=strangers[who]) for who in tried)
        )
        for who, answer in zip(tried, answers, strict=True):
            where = f"{who}: {operation.method} {path}: {answer.status} {answer.raw[:300]!r}"
            assert not leaks(answer), where
            if operation.name == "listRequestsOfCaller" and answer.status == 200:
                assert answer.data == [], where
            else:
                assert answer.status in ((401,) if strangers[who] is None else (401, 403, 404)), where
    assert await head_of(ada) == before


def is_about_the_stranger(operation: Operation, who: str) -> bool:
    """Whether the request is the stranger's own business."""
    if operation.name not in OWN_THINGS:
        return False
    own = ("another user", "another user's agent key")
    return who in own or (who == "another agent's key" and operation.agent_keys)


async def test_what_is_somebody_elses_looks_like_what_does_not_exist(
    platform: Platform, bob: Person, things: dict[str, str]
) -> None:
    missing = {
        "agent_id": "9007199254740000",
        "key_id": "0" * 16,
        "name": "nothing",
        "request_id": f"req-{uuid4()}",
        "conversation_id": f"conv-{uuid4()}",
    }
    for operation in operations(platform):
        if operation.name in OWN_THINGS or operation.name == "listRequestsOfCaller":
            continue
        answers = []
        for names in (things, missing):
            path, body = operation.filled(names)
            answer = await bob.send(operation.method, path, body)
            told = {key: value for key, value in answer.json.items() if key not in ("instance", "request_id")}
            answers.append((answer.status, told))
        assert answers[0] == answers[1], operation


async def test_another_agents_key_of_the_same_owner_is_told_that_it_is_the_wrong_one(
    ada: Person, bob: Person, client: Client
) -> None:
    answer = await client.send("POST", f"/api/agents/{ada.agent}/chat/", {"message": "Hi"}, key=bob.agent_key)
    assert (answer.status, answer.json["code"]) == (403, "agent_key_mismatch")


async def test_an_agents_key_cannot_do_what_its_owner_can(
    platform: Platform, ada: Person, things: dict[str, str]
) -> None:
    before = await head_of(ada)
    for operation in operations(platform):
        if not operation.agent_keys:
            path, body = operation.filled(things)
            answer = await ada.client.send(operation.method, path, body, key=ada.agent_key)
            assert (answer.status, answer.json["code"]) == (403, "forbidden"), operation
    assert await head_of(ada) == before


async def test_a_conversation_of_one_agent_is_unknown_to_another_of_the_same_owner(
    ada: Person, things: dict[str, str]
) -> None:
    second = (await ada.send("POST", "/api/agents/", {"name": "Second"})).data["id"]
    answer = await ada.send(
        "POST", f"/api/agents/{second}/chat/", {"message": "Hi", "conversation_id": things["conversation_id"]}
    )
    assert (answer.status, answer.json["code"]) == (404, "not_found")
