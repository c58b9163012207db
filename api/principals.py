"""Who is calling: API keys, agents' keys, browser sessions; and that a browser's request came from our own pages.

Keys and sessions are looked up in memory first: a row is believed for `key_cache_s`, a revocation made through this
process at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated
from urllib.parse import urlsplit
from uuid import UUID

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from api.call import Call, Principal, call_of
from api.errors import Problem
from api.server import Server
from domain.agent import Agent
from domain.ids import UserId
from domain.ports import Session
from domain.user import User
from projections.api_keys import ApiKeyRow, find_key
from schemas.records import AnyRecord

log_of = logging.getLogger(__name__)

CACHED_MAX = 10_000
USE_NOTED_EVERY_S = 60.0
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
TOKEN_BYTES = 32
CSRF_HEADER = "x-csrf-token"
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="oshaani", ApiKey realm="oshaani"'}


_REVOKING = frozenset({User.ApiKeyRevoked, Agent.KeyRevoked})
_PUBLISHING = frozenset({Agent.Published, Agent.Unpublished, Agent.Deleted})


class Principals:
    """Recognises callers. One for each process."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._keys: OrderedDict[str, tuple[float, ApiKeyRow | None]] = OrderedDict()
        self._sessions: OrderedDict[bytes, tuple[float, Session | None]] = OrderedDict()
        # What this process has heard from the log is so, however far behind the read models are.
        self._revoked: OrderedDict[str, None] = OrderedDict()
        self._published: OrderedDict[UUID, bool] = OrderedDict()
        self._used: OrderedDict[str, datetime] = OrderedDict()
        self._noting: set[asyncio.Task[None]] = set()
        secure = server.base_url.startswith("https://")
        prefix = "__Host-" if secure else ""
        self.session_cookie, self.csrf_cookie = f"{prefix}oshaani_session", f"{prefix}oshaani_csrf"
        self._secure = secure
        self._origin = _origin_of(server.base_url)

    # --- keys

    async def of_key(self, text: str) -> Principal:
        """The owner of an API key.

        Raises:
            Problem: no such key, or one that is revoked or suspended.
        """
        parsed = self._server.keys.parse(text)
        if parsed is None:
            raise Problem("invalid_api_key", "This is not an API key of this server.", None, CHALLENGE)
        kind, key_id, _ = parsed
        row = await self._row(key_id, text)
        if row is None or row.kind != kind:
            raise Problem("invalid_api_key", "This is not an API key of this server.", None, CHALLENGE)
        if row.revoked_at is not None or key_id in self._revoked:
            raise Problem("key_revoked", "This API key was revoked; use another one.", None, CHALLENGE)
        if not self._serves(row):
            raise Problem(
                "agent_not_published", "The agent of this key is not published; its keys are suspended."
            )
        self._note_use(key_id)
        if row.kind == "agent":
            return Principal("agent_key", UserId(row.tenant_id), f"agent_key:{key_id}", row.agent_id, key_id)
        return Principal("user_key", UserId(row.tenant_id), f"api_key:{key_id}", None, key_id)

    async def _row(self, key_id: str, text: str) -> ApiKeyRow | None:
        """The row, once the whole key has been compared with it."""
        cached = self._keys.get(key_id)
        now = time.monotonic()
        if cached is not None and cached[0] > now:
            row = cached[1]
        else:
            row = await self._look_up(key_id)
        return row if self._server.keys.matches(text, row.digest if row else None) else None

    async def _look_up(self, key_id: str) -> ApiKeyRow | None:
        row = await find_key(self._server.db, key_id)
        limits = self._server.limits
        # A key that is not there yet may be about to come; what happens to one that is, the log tells.
        lasts_s = limits.session_cache_s if row is None else limits.key_cache_s
        _remember(self._keys, key_id, (time.monotonic() + lasts_s, row))
        return row

    def _serves(self, row: ApiKeyRow) -> bool:
        """Whether the key's agent, if it is one's, is published."""
        if row.agent_id is None:
            return True
        return self._published.get(row.agent_id, row.agent_published is not False)

    def _note_use(self, key_id: str) -> None:
        now = self._server.clock()
        last = self._used.get(key_id)
        if last is not None and (now - last).total_seconds() < USE_NOTED_EVERY_S:
            return
        _remember(self._used, key_id, now)
        task = asyncio.create_task(self._write_use(key_id, now))
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def _write_use(self, key_id: str, at: datetime) -> None:
        try:
            await self._server.key_uses.note({key_id: at})
        except Exception as failure:
            # Nobody waits for it, and the next use in a minute tries again.
            log_of.warning("the last use of key %s was not noted: %r", key_id, failure)

    def on_records(self, records: Sequence[AnyRecord]) -> None:
        """Follow the log: what this process commits, and what others do."""
        for record in records:
            kind = type(record.event)
            if kind in _REVOKING:
                _remember(self._revoked, record.event.key_id, None)
            elif kind in _PUBLISHING:
                _remember(self._published, record.stream_id, kind is Agent.Published)
                if kind is Agent.Deleted:
                    self._revoke_all(record.stream_id)

    def _revoke_all(self, agent_id: UUID) -> None:
        for key_id, (_, row) in self._keys.items():
            if row is not None and row.agent_id == agent_id:
                _remember(self._revoked, key_id, None)

    # --- sessions

    async def begin_session(self, user_id: UUID) -> tuple[str, str]:
        """Log a browser in. Returns its new token, and the CSRF token that its pages send along."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        digest = hashlib.sha256(token.encode()).digest()
        expires_at = self._server.clock() + timedelta(seconds=self._server.limits.session_s)
        await self._server.sessions.begin(Session(digest, user_id, expires_at))
        return token, self.csrf_token(digest)

    def set_cookies(self, response: Response, session_token: str, csrf_token: str) -> None:
        """Give a browser its session; pages can read the CSRF token, not the session's."""
        lasts_s = int(self._server.limits.session_s)
        for name, value in ((self.session_cookie, session_token), (self.csrf_cookie, csrf_token)):
            hidden = name == self.session_cookie
            response.set_cookie(
                name, value, lasts_s, path="/", secure=self._secure, httponly=hidden, samesite="lax"
            )

    async def replace_session(self, request: Request) -> None:
        """End the session that a browser still has when it logs in again: its token may be known to others."""
        token = request.cookies.get(self.session_cookie) if "cookie" in request.headers else None
        found = await self.of_session(token) if token else None
        if found is not None:
            await self._end(bytes.fromhex(found.credential))

    async def end_session(self, principal: Principal, response: Response) -> None:
        """Log the calling browser out."""
        await self._end(bytes.fromhex(principal.credential))
        for name in (self.session_cookie, self.csrf_cookie):
            response.delete_cookie(name, path="/", secure=self._secure, samesite="lax")

    async def _end(self, digest: bytes) -> None:
        _remember(self._sessions, digest, (time.monotonic() + self._server.limits.session_s, None))
        await self._server.sessions.end(digest)

    async def of_session(self, token: str) -> Principal | None:
        """The person whose browser this is; None when the session has ended."""
        if not 40 <= len(token) <= 64:
            return None
        return await self._of_digest(hashlib.sha256(token.encode()).digest())

    async def _of_digest(self, digest: bytes) -> Principal | None:
        cached = self._sessions.get(digest)
        now = time.monotonic()
        if cached is not None and cached[0] > now:
            session = cached[1]
        else:
            session = await self._server.sessions.find(digest, self._server.clock())
            _remember(self._sessions, digest, (now + self._server.limits.session_cache_s, session))
        if session is None or session.expires_at <= self._server.clock():
            return None
        user_id = UserId(session.user_id)
        return Principal("session", user_id, f"user:{user_id}", None, digest.hex())

    async def still(self, principal: Principal) -> bool:
        """Whether a caller would still be let in: asked every second of open streams."""
        if principal.kind == "session":
            return await self._of_digest(bytes.fromhex(principal.credential)) is not None
        if principal.credential in self._revoked:
            return False
        cached = self._keys.get(principal.credential)
        now = time.monotonic()
        row = cached[1] if cached is not None and cached[0] > now else None
        if row is None:
            row = await self._look_up(principal.credential)
        return row is not None and row.revoked_at is None and self._serves(row)

    # --- browsers

    def csrf_token(self, session_digest: bytes) -> str:
        """What the pages of a session send with everything that changes something."""
        return hmac.new(self._server.signing_key, b"csrf|" + session_digest, hashlib.sha256).hexdigest()

    def check_same_site(self, request: Request) -> None:
        """Refuse what another site made a browser send.

        Raises:
            Problem: it was not one of our pages.
        """
        site = request.headers.get("sec-fetch-site")
        if site is not None and site not in ("same-origin", "none"):
            raise Problem("csrf_failed", "The request was sent by a page of another site.")
        origin = request.headers.get("origin")
        own = (self._origin, f"{urlsplit(self._server.base_url).scheme}://{request.headers.get('host', '')}")
        if origin is not None and origin.lower() not in own:
            raise Problem("csrf_failed", "The request was sent by a page of another site.")

    def check_browser(self, request: Request, principal: Principal) -> None:
        """Under a session, what changes something must come from our pages and carry their token."""
        if request.method in SAFE_METHODS:
            return
        self.check_same_site(request)
        expected = self.csrf_token(bytes.fromhex(principal.credential))
        given = request.headers.get(CSRF_HEADER, "")
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise Problem(
                "csrf_failed", f"Send the value of the cookie {self.csrf_cookie!r} as X-CSRF-Token."
            )


async def identify(request: Request) -> Principal:
    """The caller of a request, by whatever it brought along; remembered on the call.

    Raises:
        Problem: nobody, or somebody unknown.
    """
    call = call_of(request)
    principals = call.shared.principals
    key = _key_of(request)
    if key is not None:
        call.principal = await principals.of_key(key)
        return call.principal
    token = request.cookies.get(principals.session_cookie) if "cookie" in request.headers else None
    found = await principals.of_session(token) if token else None
    if found is None:
        sentence = (
            "Send `Authorization: Bearer <user API key>`, `Authorization: ApiKey <agent API key>`, or log in."
        )
        raise Problem("unauthenticated", sentence, None, CHALLENGE)
    principals.check_browser(request, found)
    call.principal = found
    return found


async def calling_user(request: Request) -> Call:
    """The call of a person: by user API key or session.

    Raises:
        Problem: nobody, or an agent's key.
    """
    principal = await identify(request)
    if not principal.is_owner:
        raise Problem("forbidden", "An agent's API key cannot do this; use a user API key or log in.")
    return call_of(request)


async def calling_agent(request: Request) -> Call:
    """The call of somebody who may talk to one agent: by that agent's API key.

    Raises:
        Problem: nobody, or a person's key.
    """
    principal = await identify(request)
    if principal.agent_id is None:
        raise Problem("forbidden", "Use the API key of an agent: `Authorization: ApiKey <agent API key>`.")
    return call_of(request)


async def calling_anyone(request: Request) -> Call:
    """The call of a person or of an agent's key."""
    await identify(request)
    return call_of(request)


UserCall = Annotated[Call, Depends(calling_user)]
AgentCall = Annotated[Call, Depends(calling_agent)]
AnyCall = Annotated[Call, Depends(calling_anyone)]


def _key_of(request: Request) -> str | None:
    header = request.headers.get("authorization")
    if header is None:
        return request.headers.get("x-api-key")
    scheme, _, key = header.partition(" ")
    if scheme.lower() not in ("bearer", "apikey"):
        raise Problem(
            "unauthenticated", "Use `Authorization: Bearer <key>` or `ApiKey <key>`.", None, CHALLENGE
        )
    return key.strip()


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _remember(cache: OrderedDict, key: object, value: object) -> None:  # type: ignore[type-arg]
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > CACHED_MAX:
        cache.popitem(last=False)
