"""What may be asked about people: sign up, log in, keys, roles."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from commands.command import Command, Result, WriteSide, handles
from commands.turn import cancel_unless_over
from domain.agent import Agent
from domain.credit_account import CreditAccount
from domain.errors import AlreadyExists
from domain.ids import AgentId, TurnId, account_of, derived
from domain.user import User


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterUser(Command):
    """Sign up. The caller has reserved the address for this `tenant_id`."""

    email: str
    name: str

    def reads(self) -> tuple[UUID, ...]:
        return (self.tenant_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogIn(Command):
    """Note a login; the first one opens the credit account with the free credits (SOP §13.3.1)."""

    def reads(self) -> tuple[UUID, ...]:
        return self.tenant_id, account_of(self.tenant_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteUser(Command):
    """Give a person a role: "user" or "operator"."""

    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IssueUserKey(Command):
    """A new API key for a person; only its digest is sent along."""

    key_id: str
    name: str
    prefix: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeUserKey(Command):
    """Refuse a key from now on."""

    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseUser(Command):
    """Forget a person. `agent_ids` and `turn_ids`: the agents that there are, and the turns that are not over."""

    agent_ids: tuple[AgentId, ...]
    turn_ids: tuple[TurnId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteErasure(Command):
    """The person's keys are destroyed."""

    destroyed_keys: int


@handles(RegisterUser)
def register_user(command: RegisterUser, write: WriteSide) -> Result:
    if write.find(User, command.tenant_id) is not None:
        raise AlreadyExists("account for this e-mail address")
    write.add(User.register(command.tenant_id, command.email, command.name))
    return {"user_id": str(command.tenant_id)}


@handles(LogIn)
def log_in(command: LogIn, write: WriteSide) -> Result:
    user = write.get(User, command.tenant_id)
    first = user.log_in()
    if write.find(CreditAccount, account_of(command.tenant_id)) is None:
        account = write.add(CreditAccount.open(command.tenant_id))
        if write.rules.free_credits_ncr:
            grant_id = derived(command.tenant_id, "free_credits")
            account.grant(grant_id, "free", write.rules.free_credits_ncr, write.now)
    return {"first": first, "role": user.role}


@handles(PromoteUser)
def promote_user(command: PromoteUser, write: WriteSide) -> None:
    write.get(User, command.tenant_id).promote(command.role)


@handles(IssueUserKey)
def issue_user_key(command: IssueUserKey, write: WriteSide) -> Result:
    user = write.get(User, command.tenant_id)
    user.issue_key(command.key_id, command.name, command.prefix, command.digest, write.now)
    return {"key_id": command.key_id, "created_at": write.now.isoformat()}


@handles(RevokeUserKey)
def revoke_user_key(command: RevokeUserKey, write: WriteSide) -> None:
    write.get(User, command.tenant_id).revoke_key(command.key_id)


@handles(EraseUser)
def erase_user(command: EraseUser, write: WriteSide) -> None:
    user = write.get(User, command.tenant_id)
    user.request_erasure(write.now)
    for turn_id in command.turn_ids:
        cancel_unless_over(turn_id, "The account is being erased.", write)
    for agent_id in command.agent_ids:
        agent = write.find(Agent, agent_id)
        if agent is not None and not agent.deleted:
            agent.delete()
    if user.erasure == "requested":
        write.due("erasure", user.id, user.id, write.now)


@handles(CompleteErasure)
def complete_erasure(command: CompleteErasure, write: WriteSide) -> None:
    user = write.get(User, command.tenant_id)
    user.complete_erasure(command.destroyed_keys, write.now)
    write.done("erasure", user.id, user.id)
