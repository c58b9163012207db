"""People and programs that use the API in tests."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aiohttp

from commands.agent import CreateAgent, IssueAgentKey, PublishAgent
from commands.user import IssueUserKey, LogIn, RegisterUser
from domain.ids import UserId, agent_of
from tests.api.platform import STARTED_S, Platform

TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def data(self) -> Any:
        return self.json["data"]


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    id: str
    data: dict[str, Any]


class Client:
    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session, self.base_url = session, base_url

    @classmethod
    @asynccontextmanager
    async def open(cls, base_url: str) -> AsyncIterator[Client]:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            yield cls(session, base_url)

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Answer:
        """One request; `key` goes where its kind belongs."""
        sent = {**authorization(key), **(headers or {})}
        encoded = raw if raw is not None else None if body is None else json.dumps(body).encode()
        # The client warns of large bodies that are bytes.
        data = io.BytesIO(encoded) if encoded else encoded
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        async with self._session.request(
            method, self.base_url + path, data=data, headers=sent, allow_redirects=False
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def events(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        sent = {**authorization(key), **(headers or {}), "Content-Type": "application/json"}
        async with self._session.request(
            method, self.base_url + path, data=None if body is None else json.dumps(body), headers=sent
        ) as response:
            assert response.status == 200, await response.read()
            assert response.content_type == "text/event-stream"
            yield _events(response)


HEARTBEAT = Event("heartbeat", "", {})


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    fields: dict[str, str] = {}
    async for line in response.content:
        text = line.decode().rstrip("\n")
        if text.startswith(":"):
            yield HEARTBEAT
        elif text:
            name, _, value = text.partition(": ")
            fields[name] = value
        elif "event" in fields:
            yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
            fields = {}
        else:
            fields = {}


def authorization(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    return {"Authorization": f"{'ApiKey' if key.startswith('osh_agent') else 'Bearer'} {key}"}


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody with an API key and a published agent with a key."""

    platform: Platform
    client: Client
    user_id: UserId
    key: str
    agent: int
    agent_key: str

    @classmethod
    async def register(cls, platform: Platform, client: Client) -> Person:
        user_id = UserId(uuid4())
        key, agent, agent_key = platform.run(_register(platform, user_id))
        return cls(platform, client, user_id, key, agent, agent_key)

    async def send(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        """As the person."""
        return await self.client.send(method, path, body, key=self.key, **more)

    async def ask(self, path: str, body: Any = None, **more: Any) -> Answer:
        """With the agent's key."""
        return await self.client.send("POST", path, body, key=self.agent_key, **more)


async def _register(platform: Platform, user_id: UserId) -> tuple[str, int, str]:
    """Faster than over HTTP, which tests of its own try."""
    server, by = platform.server, f"user:{user_id}"
    bus, keys = server.bus, server.keys
    email = f"{user_id}@example.com"
    await bus.execute(RegisterUser(tenant_id=user_id, email=email, name="Test"), by=by)
    await bus.execute(LogIn(tenant_id=user_id), by=by)
    key_id, key = keys.mint("user")
    await bus.execute(
        IssueUserKey(tenant_id=user_id, key_id=key_id, name="t", prefix=key[:12], digest=keys.digest(key)),
        by=by,
    )
    number = await server.next_agent_number()
    agent_id = agent_of(number)
    await bus.execute(CreateAgent(tenant_id=user_id, number=number, name="Agent"), by=by)
    await bus.execute(PublishAgent(tenant_id=user_id, agent_id=agent_id), by=by)
    key_id, agent_key = keys.mint("agent")
    outcome = await bus.execute(
        IssueAgentKey(
            tenant_id=user_id,
            agent_id=agent_id,
            key_id=key_id,
            name="t",
            prefix=agent_key[:12],
            digest=keys.digest(agent_key),
        ),
        by=by,
    )
    assert await server.db.caught_up(outcome.shard, outcome.position, STARTED_S)
    return key, number, agent_key
