"""What may be asked about agents: create, configure, publish, keys, tools of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from commands.command import Command, Result, WriteSide, handles
from domain import configuration as configurations
from domain.agent import Agent
from domain.credit_account import ChargeLine, CreditAccount, Origin
from domain.ids import AgentId, account_of, agent_of, hold_of
from domain.prices import AGENT_CREATE


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateAgent(Command):
    """A new draft; costs what the rate card says. `number` comes from the server's sequence."""

    number: int
    name: str
    description: str = ""
    model_id: int = 1
    agent_type: str = "quick_bot"
    configuration: Mapping[str, Any] = field(default_factory=dict)

    def reads(self) -> tuple[UUID, ...]:
        return (account_of(self.tenant_id),)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfAgent(Command):
    """Something asked about one agent. `expected_version` comes from If-Match."""

    agent_id: AgentId
    expected_version: int | None = None

    def reads(self) -> tuple[UUID, ...]:
        return (self.agent_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeAgent(_OfAgent):
    """An RFC 7396 merge patch of name, description, model_id, agent_type and configuration."""

    patch: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainAgent(_OfAgent):
    """Gather knowledge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestAgent(_OfAgent):
    """Try it out before publishing."""

    __test__ = False  # not a test case, whatever its name looks like


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishAgent(_OfAgent):
    """Let callers with an agent key talk to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpublishAgent(_OfAgent):
    """Back to draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteAgent(_OfAgent):
    """Take it away from everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssueAgentKey(_OfAgent):
    """A new key to talk to a published agent; only its digest is sent along."""

    key_id: str
    name: str
    prefix: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateAgentKey(_OfAgent):
    """A new key in place of an old one, which is refused from then on."""

    old_key_id: str
    key_id: str
    name: str
    prefix: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeAgentKey(_OfAgent):
    """Refuse a key from now on."""

    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddCustomTool(_OfAgent):
    """A tool of the agent's own; its secrets are references into the vault."""

    tool: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeCustomTool(_OfAgent):
    """Another definition for a tool."""

    name: str
    tool: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveCustomTool(_OfAgent):
    """The agent cannot use it any more."""

    name: str


@handles(CreateAgent)
def create_agent(command: CreateAgent, write: WriteSide) -> Result:
    account = write.get(CreditAccount, account_of(command.tenant_id))
    agent_id = agent_of(command.number)
    agent = Agent.create(
        command.tenant_id,
        command.number,
        command.name,
        command.description,
        command.model_id,
        command.agent_type,
        command.configuration,
        write.now,
    )
    card, hold_id = write.prices, hold_of(agent_id)
    price_ncr = card.price_ncr(AGENT_CREATE)
    account.hold(hold_id, price_ncr, AGENT_CREATE, write.now, timedelta(minutes=1), write.limits_of(account))
    line = ChargeLine(AGENT_CREATE, 1, price_ncr, card.rate_card_id)
    account.settle(hold_id, [line], Origin(agent_id=agent_id, actor=write.actor))
    write.add(agent)
    return {**view(agent), "created_at": write.now.isoformat()}


@handles(ChangeAgent)
def change_agent(command: ChangeAgent, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.change(command.patch)
    return view(agent)


@handles(TrainAgent)
def train_agent(command: TrainAgent, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.start_training()
    return view(agent)


@handles(TestAgent)
def test_agent(command: TestAgent, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.start_testing()
    return view(agent)


@handles(PublishAgent)
def publish_agent(command: PublishAgent, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.publish(write.now)
    return view(agent)


@handles(UnpublishAgent)
def unpublish_agent(command: UnpublishAgent, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.unpublish()
    return view(agent)


@handles(DeleteAgent)
def delete_agent(command: DeleteAgent, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.delete()
    return {"number": agent.number}


@handles(IssueAgentKey)
def issue_agent_key(command: IssueAgentKey, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.issue_key(command.key_id, command.name, command.prefix, command.digest, write.now)
    return {"key_id": command.key_id, "created_at": write.now.isoformat()}


@handles(RotateAgentKey)
def rotate_agent_key(command: RotateAgentKey, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.revoke_key(command.old_key_id)
    agent.issue_key(command.key_id, command.name, command.prefix, command.digest, write.now)
    return {"key_id": command.key_id, "created_at": write.now.isoformat()}


@handles(RevokeAgentKey)
def revoke_agent_key(command: RevokeAgentKey, write: WriteSide) -> None:
    _checked(command, write).revoke_key(command.key_id)


@handles(AddCustomTool)
def add_custom_tool(command: AddCustomTool, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.add_custom_tool(command.tool)
    return {"tool": dict(command.tool)}


@handles(ChangeCustomTool)
def change_custom_tool(command: ChangeCustomTool, write: WriteSide) -> Result:
    agent = _checked(command, write)
    agent.change_custom_tool(command.name, command.tool)
    return {"tool": agent.custom_tools[command.name]}


@handles(RemoveCustomTool)
def remove_custom_tool(command: RemoveCustomTool, write: WriteSide) -> None:
    _checked(command, write).remove_custom_tool(command.name)


def view(agent: Agent) -> Result:
    """What its owner sees of an agent."""
    return {
        "number": agent.number,
        "name": agent.name,
        "description": agent.description,
        "model_id": agent.model_id,
        "agent_type": agent.agent_type,
        "status": agent.status,
        "configuration": agent.configuration,
        "version": agent.version,
        "config_version": agent.config_version,
        "published_version": agent.published_version,
        "warnings": configurations.check(agent.configuration),
    }


def _checked(command: _OfAgent, write: WriteSide) -> Agent:
    agent = write.get(Agent, command.agent_id)
    agent.check_version(command.expected_version)
    return agent
