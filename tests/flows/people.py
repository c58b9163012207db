"""People who use a real server: registered, with a published agent and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from tests.flows.real_server import Answer, RealServer


@dataclass(frozen=True, slots=True)
class Person:
    """A person, and the headers to act as the person or talk to the person's agent."""

    server: RealServer
    user: Mapping[str, str]
    agent: Mapping[str, str]
    agent_id: int
    secrets: tuple[str, ...]

    @classmethod
    def register(
        cls, server: RealServer, password: str = "correct horse battery", configuration: Any = None
    ) -> Person:
        """Sign up, make and publish an agent, get both kinds of keys."""
        email = f"{uuid4().hex}@example.com"
        entered = server.send(
            "POST", "/api/auth/register", {"email": email, "password": password, "name": "Ada"}
        )
        assert entered.status == 201, entered.text
        cookies = entered.headers["set-cookie"]
        session = {"Cookie": cookies, "X-CSRF-Token": entered.json["data"]["csrf_token"]}
        user_key = server.send("POST", "/api/api-keys/", {"name": "k"}, session).json["data"]["key"]
        user = {"Authorization": f"Bearer {user_key}"}
        made = server.send(
            "POST", "/api/agents/", {"name": "Bot", "configuration": configuration or {}}, user
        )
        assert made.status == 201, made.text
        agent_id = made.json["data"]["id"]
        assert server.send("POST", f"/api/agents/{agent_id}/publish/", None, user).status == 200
        agent_key = server.send("POST", f"/api/agents/{agent_id}/api-keys/", {"name": "a"}, user).json[
            "data"
        ]["key"]
        tokens = [cookie.partition("=")[2] for cookie in cookies.split("; ") if "csrf" not in cookie]
        secrets = (user_key, agent_key, *tokens)
        return cls(server, user, {"Authorization": f"ApiKey {agent_key}"}, agent_id, secrets)

    def chat(self, message: str, **more: Any) -> Answer:
        """Ask the agent."""
        return self.server.send(
            "POST", f"/api/agents/{self.agent_id}/chat/", {"message": message, **more}, self.agent
        )

    def balance(self) -> Any:
        """What the person has."""
        return self.server.send("GET", "/api/billing/balance", headers=self.user).json["data"]
