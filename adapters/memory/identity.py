"""Logins, sessions and the uses of keys in this process's memory, gone with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from domain.ports import Login, Session
from domain.user import canonical_email


class MemoryLogins:
    """Implements `domain.ports.Logins`."""

    def __init__(self) -> None:
        self._by_email: dict[str, Login] = {}

    async def reserve(self, email: str, login: Login) -> Login:
        return self._by_email.setdefault(canonical_email(email), login)

    async def find(self, email: str) -> Login | None:
        return self._by_email.get(canonical_email(email))

    async def change_password(self, user_id: UUID, password_hash: str) -> None:
        for email, login in self._by_email.items():
            if login.user_id == user_id:
                self._by_email[email] = replace(login, password_hash=password_hash)

    async def forget(self, user_id: UUID) -> None:
        kept = {email: login for email, login in self._by_email.items() if login.user_id != user_id}
        self._by_email = kept


class MemorySessions:
    """Implements `domain.ports.Sessions`."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}

    async def begin(self, session: Session) -> None:
        self._sessions[session.digest] = session

    async def find(self, digest: bytes, now: datetime) -> Session | None:
        session = self._sessions.get(digest)
        return session if session is not None and session.expires_at > now else None

    async def end(self, digest: bytes) -> None:
        self._sessions.pop(digest, None)

    async def end_all(self, user_id: UUID) -> None:
        self._sessions = {d: session for d, session in self._sessions.items() if session.user_id != user_id}


class MemoryKeyUses:
    """Implements `domain.ports.KeyUses`."""

    def __init__(self) -> None:
        self._last: dict[str, datetime] = {}

    async def note(self, used_at: Mapping[str, datetime]) -> None:
        for key_id, at in used_at.items():
            self._last[key_id] = max(at, self._last.get(key_id, at))

    async def last(self, key_ids: Sequence[str]) -> dict[str, datetime]:
        return {key_id: self._last[key_id] for key_id in key_ids if key_id in self._last}
