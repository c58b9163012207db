"""`oshaani user` and `oshaani keys`: what operators do for people, directly on the database."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated
from uuid import UUID, uuid4

import typer

from domain.agent import Agent
from domain.ids import AgentId, UserId, agent_of, derived, grant_of_payment, shard_of
from domain.money import credits, ncr
from domain.user import User
from oshaani.cli import show
from oshaani.cli.session import check_read_models, open_core, run
from oshaani.cli.show import AsJson
from oshaani.cli.streams import first_event, whole_stream
from oshaani.cli.trouble import Failed
from schemas.records import AnyRecord

if TYPE_CHECKING:
    from oshaani.wiring import Core

app = typer.Typer()
user = typer.Typer(help="People: create them, make them operators.", no_args_is_help=True)
keys = typer.Typer(help="API keys of people and of agents.", no_args_is_help=True)
app.add_typer(user, name="user")
app.add_typer(keys, name="keys")

ACTOR = "operator:cli"

Owner = Annotated[str, typer.Argument(help="Whose: an e-mail address, or the number of an agent.")]
Email = Annotated[str, typer.Argument(help="E-mail address.")]


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key as listed."""

    key_id: str
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """Whose keys: a person's, or those of one of the person's agents."""

    tenant_id: UserId
    agent_id: AgentId | None

    @property
    def stream_id(self) -> UUID:
        return self.agent_id or self.tenant_id


# --- commands ---------------------------------------------------------------------------------------------------------


@user.command("create")
def create_user(
    email: Email,
    name: Annotated[str, typer.Option(help="Name of the person.")] = "",
    password: Annotated[
        str | None,
        typer.Option(help="Password; without it one is made and printed.", envvar="OSHAANI_USER_PASSWORD"),
    ] = None,
    operator: Annotated[bool, typer.Option("--operator", help="Make the person an operator.")] = False,
    as_json: AsJson = False,
) -> None:
    """Register a person."""
    chosen = password or secrets.token_urlsafe(15)
    user_id = run(_create_user(email, name, chosen, operator))
    shown = None if password else chosen
    if as_json:
        show.document({"user_id": user_id, "email": email, "password": shown, "operator": operator})
        return
    show.line(f"{email} is registered as {user_id}{', an operator' if operator else ''}.")
    if shown:
        show.line(f"password (shown this once): {shown}")


@user.command("promote")
def promote_user(
    email: Email,
    role: Annotated[str, typer.Option(help="'operator' or 'user'.")] = "operator",
    as_json: AsJson = False,
) -> None:
    """Give a person a role."""
    user_id = run(_promote(email, role))
    if as_json:
        show.document({"user_id": user_id, "email": email, "role": role})
    else:
        show.line(f"{email} has the role {role!r}.")


@user.command("grant")
def grant_credits(
    email: Email,
    amount: Annotated[str, typer.Argument(metavar="CREDITS", help="How many, for example '12.5'.")],
    reason: Annotated[str | None, typer.Option(help="Why; shown in the person's ledger.")] = None,
    payment: Annotated[
        str | None, typer.Option(help="What a payment is called elsewhere; it is granted once.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a person credits."""
    try:
        amount_ncr = ncr(amount)
    except ValueError as fault:
        raise Failed(str(fault)) from fault
    posted = credits(run(_grant(email, amount_ncr, reason, payment)))
    if as_json:
        show.document({"email": email, "granted_credits": credits(amount_ncr), "balance_credits": posted})
    else:
        show.line(f"{email} was given {credits(amount_ncr)} credits and has {posted}.")


@user.command("erase")
def erase_user(
    email: Email,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase a person for ever: logins, keys, agents, secrets and every text. Amounts stay in the ledger."""
    if not yes and not typer.confirm(f"Erase {email} for ever?"):
        raise Failed("nothing was erased")
    user_id = run(_erase(email))
    if as_json:
        show.document({"user_id": user_id, "erased": True})
    else:
        show.line(f"{user_id} is erased; what others keep of it by other means is theirs to erase.")


@keys.command("list")
def list_keys(owner: Owner, as_json: AsJson = False) -> None:
    """List the keys of a person or of an agent; revoked ones too."""
    found = run(_list(owner))
    if as_json:
        show.document([asdict(key) for key in found])
        return
    rows = [
        (
            key.key_id,
            key.name,
            key.prefix,
            show.instant(key.created_at),
            show.instant(key.last_used_at) or "never",
            f"revoked {show.instant(key.revoked_at)}" if key.revoked_at else "valid",
        )
        for key in found
    ]
    show.table(("key id", "name", "prefix", "created", "last used", "state"), rows)


@keys.command("create")
def create_key(
    owner: Owner,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "made by an operator",
    as_json: AsJson = False,
) -> None:
    """Issue a key; it is printed this once."""
    key_id, key = run(_create_key(owner, name))
    if as_json:
        show.document({"key_id": key_id, "name": name, "key": key})
    else:
        show.line(f"key id: {key_id}\nkey (shown this once): {key}")


@keys.command("revoke")
def revoke_key(
    owner: Owner, key_id: Annotated[str, typer.Argument(help="Id of the key.")], as_json: AsJson = False
) -> None:
    """Refuse a key from now on."""
    run(_revoke(owner, key_id))
    if as_json:
        show.document({"key_id": key_id, "revoked": True})
    else:
        show.line(f"Key {key_id} is revoked.")


# --- work -----------------------------------------------------------------------------------------------------------


async def _create_user(email: str, name: str, password: str, operator: bool) -> UserId:
    from adapters.passwords import Argon2Passwords
    from commands.user import PromoteUser, RegisterUser
    from domain.ports import Login

    async with open_core(may_create=True) as core:
        passwords = Argon2Passwords()
        try:
            password_hash = await passwords.hash(password)
        except ValueError as refused:
            raise Failed(str(refused)) from refused
        finally:
            await passwords.close()
        user_id = UserId(uuid4())
        reserved = await core.logins.reserve(email, Login(user_id, password_hash))
        if reserved.user_id != user_id:
            raise Failed(f"there is already an account with the address {email!r}")
        # The ids that the API would give the same registration, so that the two can never do it twice.
        await core.bus.execute(
            RegisterUser(tenant_id=user_id, email=email, name=name),
            by=ACTOR,
            command_id=derived(user_id, "registered"),
            digest=b"registered",
        )
        if operator:
            await core.bus.execute(PromoteUser(tenant_id=user_id, role="operator"), by=ACTOR)
        return user_id


async def _promote(email: str, role: str) -> UserId:
    from commands.user import PromoteUser

    async with open_core() as core:
        user_id = await _user_of(core, email)
        await core.bus.execute(PromoteUser(tenant_id=user_id, role=role), by=ACTOR)
        return user_id


async def _erase(email: str) -> UserId:
    from commands.user import CompleteErasure, EraseUser
    from oshaani.wiring import erasing_of
    from projections.users import belongings_of
    from stream_processors.erasures import KEYS_DESTROYED, forget

    async with open_core() as core:
        await check_read_models(core)
        user_id = await _user_of(core, email)
        found = await belongings_of(core.db, user_id)
        erase = EraseUser(tenant_id=user_id, agent_ids=found.agent_ids, turn_ids=found.turn_ids)
        await core.bus.execute(erase, by=ACTOR)
        await forget(user_id, erasing_of(core))
        complete = CompleteErasure(tenant_id=user_id, destroyed_keys=KEYS_DESTROYED)
        await core.bus.execute(complete, by=ACTOR, command_id=derived(user_id, "erased"))
        return user_id


async def _grant(email: str, amount_ncr: int, reason: str | None, payment: str | None) -> int:
    from commands.credit_account import GrantCredits
    from commands.user import LogIn

    async with open_core() as core:
        user_id = await _user_of(core, email)
        await core.bus.execute(
            LogIn(tenant_id=user_id), by=ACTOR
        )  # the account is there from the first login on
        command = GrantCredits(
            tenant_id=user_id,
            grant_id=grant_of_payment(user_id, payment) if payment else uuid4(),
            kind="purchase" if payment else "adjustment",
            amount_ncr=amount_ncr,
            reason=reason,
            payment_ref=payment,
        )
        outcome = await core.bus.execute(command, by=ACTOR)
        return int(outcome.result["posted_ncr"])


async def _list(owner: str) -> list[KeyLine]:
    from adapters.postgres.identity import PostgresKeyUses

    async with open_core() as core:
        whose = await _owner_of(core, owner)
        rows = await whole_stream(core.log, shard_of(whose.tenant_id), whose.stream_id)
        found = _keys_in(await core.records.open(rows))
        used_at = await PostgresKeyUses(core.pool).last([key.key_id for key in found])
        return [replace(key, last_used_at=used_at.get(key.key_id)) for key in found]


async def _create_key(owner: str, name: str) -> tuple[str, str]:
    from commands.agent import IssueAgentKey
    from commands.user import IssueUserKey, LogIn

    async with open_core() as core:
        whose = await _owner_of(core, owner)
        key_id, key = core.keys.mint("user" if whose.agent_id is None else "agent")
        prefix, digest = key.rpartition("_")[0], core.keys.digest(key)
        if whose.agent_id is not None:
            issue = IssueAgentKey(
                tenant_id=whose.tenant_id,
                agent_id=whose.agent_id,
                key_id=key_id,
                name=name,
                prefix=prefix,
                digest=digest,
            )
            await core.bus.execute(issue, by=ACTOR)
            return key_id, key
        # Whoever has a key can spend: the credit account must be there, as after a login.
        await core.bus.execute(LogIn(tenant_id=whose.tenant_id), by=ACTOR)
        user_key = IssueUserKey(
            tenant_id=whose.tenant_id, key_id=key_id, name=name, prefix=prefix, digest=digest
        )
        await core.bus.execute(user_key, by=ACTOR)
        return key_id, key


async def _revoke(owner: str, key_id: str) -> None:
    from commands.agent import RevokeAgentKey
    from commands.user import RevokeUserKey

    async with open_core() as core:
        whose = await _owner_of(core, owner)
        if whose.agent_id is None:
            await core.bus.execute(RevokeUserKey(tenant_id=whose.tenant_id, key_id=key_id), by=ACTOR)
        else:
            revoke = RevokeAgentKey(tenant_id=whose.tenant_id, agent_id=whose.agent_id, key_id=key_id)
            await core.bus.execute(revoke, by=ACTOR)


async def _owner_of(core: Core, owner: str) -> KeyOwner:
    if "@" in owner:
        return KeyOwner(await _user_of(core, owner), None)
    if not (owner.isascii() and owner.isdecimal()):
        raise Failed(f"{owner!r} is neither an e-mail address nor the number of an agent")
    agent_id = agent_of(int(owner))
    first = await first_event(core.log, agent_id)
    if first is None:
        raise Failed(f"there is no agent {owner}")
    return KeyOwner(UserId(first.tenant_id), agent_id)


async def _user_of(core: Core, email: str) -> UserId:
    login = await core.logins.find(email)
    if login is None:
        raise Failed(f"nobody is registered with the address {email!r}")
    return UserId(login.user_id)


def _keys_in(records: Sequence[AnyRecord]) -> list[KeyLine]:
    found: dict[str, KeyLine] = {}
    for record in records:
        match record.event:
            case User.ApiKeyIssued() | Agent.KeyIssued() as issued:
                found[issued.key_id] = KeyLine(
                    issued.key_id, issued.name, issued.prefix, issued.issued_at, None, None
                )
            case User.ApiKeyRevoked() | Agent.KeyRevoked() as revoked:
                found[revoked.key_id] = replace(found[revoked.key_id], revoked_at=record.recorded_at)
            case _:
                pass
    return list(found.values())
