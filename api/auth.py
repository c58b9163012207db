"""Sign up, log in, log out. A browser gets a session; the first login brings the free credits (SOP §13.3.1)."""

from __future__ import annotations

import re
from collections import OrderedDict
from datetime import datetime
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from api.bodies import Body, StrictRoute
from api.call import Call, CallDep
from api.envelopes import Envelope, enveloped, instant
from api.errors import Problem, invalid
from api.principals import UserCall
from commands.user import EraseUser, LogIn, RegisterUser
from domain.errors import NotFound
from domain.ids import UserId, derived
from domain.ports import Login
from domain.user import User, canonical_email
from projections.users import belongings_of, get_user

PASSWORD_CHARS_MIN, PASSWORD_CHARS_MAX = 8, 1024
FAILURES_MAX, FAILURES_ANYWHERE_MAX, FAILURES_S = 10, 100, 900.0
WATCHED_MAX = 10_000
_EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f.]+(\.[^@\s\x00-\x1f\x7f.]+)*")

router = APIRouter(route_class=StrictRoute, tags=["Accounts"])

Email = Annotated[str, Field(max_length=254, examples=["ada@example.com"])]
Password = Annotated[str, Field(min_length=PASSWORD_CHARS_MIN, max_length=PASSWORD_CHARS_MAX)]


class RegisterBody(Body):
    """Somebody new."""

    email: Email
    password: Password
    name: Annotated[str, Field(max_length=200)] = ""


class LoginBody(Body):
    """Somebody who is known."""

    email: Email
    password: Annotated[str, Field(max_length=PASSWORD_CHARS_MAX)]


class EraseBody(Body):
    """The account's own address, as a confirmation."""

    email: Email


class UserData(BaseModel):
    """A person."""

    id: str
    email: str | None
    name: str | None
    role: str
    created_at: str | None = None
    csrf_token: str | None = Field(None, description="To send as X-CSRF-Token under this session.")


class Failures:
    """Failed logins of late, so that guessing is slowed down.

    Counted by address and client together, and with more patience by address alone: a stranger elsewhere does not
    lock a person out at once, and a proxy that all share locks out nobody.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[str, str], tuple[int, datetime]] = OrderedDict()

    def check(self, address: str, client: str, now: datetime) -> None:
        """Refuse further tries for a while.

        Raises:
            Problem: too many have failed.
        """
        for name, most in (((address, client), FAILURES_MAX), ((address, ""), FAILURES_ANYWHERE_MAX)):
            count, since = self._failures.get(name, (0, now))
            left_s = FAILURES_S - (now - since).total_seconds()
            if count >= most and left_s > 0:
                headers = {"Retry-After": str(int(left_s) + 1)}
                raise Problem("rate_limited", "Too many failed logins; try again later.", None, headers)

    def note(self, address: str, client: str, now: datetime) -> None:
        """One more has failed."""
        for name in ((address, client), (address, "")):
            count, since = self._failures.pop(name, (0, now))
            fresh = (now - since).total_seconds() < FAILURES_S
            self._failures[name] = (count + 1, since) if fresh else (1, now)
            if len(self._failures) > WATCHED_MAX:
                self._failures.popitem(last=False)

    def forget(self, address: str, client: str) -> None:
        """It was the right one after all."""
        self._failures.pop((address, client), None)
        self._failures.pop((address, ""), None)


@router.post("/api/auth/register", status_code=201, response_model=Envelope[UserData])
async def register(request: Request, call: CallDep, body: RegisterBody) -> Response:
    """Sign up and log in."""
    call.shared.principals.check_same_site(request)
    email = _checked_email(body.email)
    server = call.server
    login = Login(uuid4(), await server.passwords.hash(body.password))
    holder = await server.logins.reserve(email, login)
    if holder.user_id != login.user_id:
        raise Problem("conflict", "There is already an account for this e-mail address; log in.")
    return await _enter(call, UserId(login.user_id), email, body.name, 201)


@router.post("/api/auth/login", response_model=Envelope[UserData])
async def log_in(request: Request, call: CallDep, body: LoginBody) -> Response:
    """Log in with a new session; the first login brings the free credits."""
    call.shared.principals.check_same_site(request)
    server, failures = call.server, call.shared.failures
    now, address = server.clock(), canonical_email(body.email)
    failures.check(address, call.client, now)
    login = await server.logins.find(body.email)
    # As much work for nobody as for somebody, so that the time tells nothing.
    right = await server.passwords.verify(login.password_hash if login else None, body.password)
    if login is None or not right:
        failures.note(address, call.client, now)
        raise Problem("invalid_credentials", "The e-mail address or the password is wrong.")
    failures.forget(address, call.client)
    await call.shared.principals.replace_session(request)
    return await _enter(call, UserId(login.user_id), body.email, "", 200)


@router.post("/api/auth/logout", response_model=Envelope[None])
async def log_out(call: UserCall) -> Response:
    """End the session."""
    response = enveloped(None, "Logged out.")
    if call.caller().kind == "session":
        await call.shared.principals.end_session(call.caller(), response)
    return response


@router.get("/api/auth/me", response_model=Envelope[UserData])
async def me(request: Request, call: UserCall) -> Response:
    """Who is calling."""
    principal = call.caller()
    await call.reads()
    row = await get_user(call.server.db, principal.owner_id)
    if row is None:
        raise NotFound("user")
    token = None
    if principal.kind == "session":
        token = call.shared.principals.csrf_token(bytes.fromhex(principal.credential))
    data = {
        "id": str(row.user_id),
        "email": row.email,
        "name": row.name,
        "role": row.role,
        "created_at": instant(row.created_at),
        "csrf_token": token,
    }
    return enveloped(data, "You.")


@router.delete("/api/auth/me", status_code=202, response_model=Envelope[None])
async def erase_me(call: UserCall, body: EraseBody) -> Response:
    """Erase the account for ever: logins, keys, agents, secrets, and every text in it. Amounts stay in the ledger."""
    principal, server = call.caller(), call.server
    await call.reads()
    row = await get_user(server.db, principal.owner_id)
    if row is None or row.email is None:
        raise NotFound("user")
    if canonical_email(body.email) != canonical_email(row.email):
        raise invalid("/email", "This is not the account's e-mail address; repeat it to confirm.", "mismatch")
    found = await belongings_of(server.db, principal.owner_id)
    await call.execute(
        EraseUser(tenant_id=principal.owner_id, agent_ids=found.agent_ids, turn_ids=found.turn_ids)
    )
    await server.sessions.end_all(principal.owner_id)
    response = enveloped(None, "Your account is being erased.", 202)
    if principal.kind == "session":
        await call.shared.principals.end_session(principal, response)
    return response


async def _enter(call: Call, user_id: UserId, email: str, name: str, status: int) -> Response:
    """Log a person in; one whose registration was cut off before it reached the log is registered now."""
    server = call.server
    registering = RegisterUser(tenant_id=user_id, email=email, name=name)
    if status == 201:
        await _register(call, registering)
    try:
        await call.execute(LogIn(tenant_id=user_id))
    except NotFound:
        await _register(call, registering)
        await call.execute(LogIn(tenant_id=user_id))
    user = await server.bus.read(User, user_id, user_id)
    principals = call.shared.principals
    session_token, csrf_token = await principals.begin_session(user_id)
    data: dict[str, Any] = {"id": str(user_id), "email": email, "role": user.role, "csrf_token": csrf_token}
    response = enveloped(data, "Welcome." if status == 201 else "Logged in.", status)
    principals.set_cookies(response, session_token, csrf_token)
    return response


async def _register(call: Call, command: RegisterUser) -> None:
    # One id for ever: of two that find the registration missing, one registers.
    await call.execute(command, derived(command.tenant_id, "registered"), b"registered")


def _checked_email(email: str) -> str:
    if not _EMAIL.fullmatch(email.strip()):
        raise invalid("/email", "This is not an e-mail address.", "invalid_email")
    return email.strip()
