"""Who may act: an account of a person, its plan of keys. Passwords and sessions live outside the log."""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Literal

from domain.aggregate import Created, PersonalText, Root
from domain.errors import Conflict, InvalidValue, NotFound
from domain.ids import UserId

API_KEYS_MAX = 50


class User(Root):
    """A registered person; also the tenant that owns everything the person creates."""

    TOPIC = "User"

    class Registered(Root.Event, Created):
        TOPIC = "User.Registered"
        email: PersonalText
        name: PersonalText

    class LoggedIn(Root.Event):
        """The first login only; later ones are not facts anybody needs."""

        TOPIC = "User.LoggedIn"

        def apply(self, aggregate: User) -> None:
            aggregate.logged_in = True

    class Promoted(Root.Event):
        TOPIC = "User.Promoted"
        role: str

        def apply(self, aggregate: User) -> None:
            aggregate.role = self.role

    class PasswordChanged(Root.Event):
        TOPIC = "User.PasswordChanged"

    class ApiKeyIssued(Root.Event):
        TOPIC = "User.ApiKeyIssued"
        key_id: str
        name: str
        prefix: str
        digest: str
        issued_at: datetime

        def apply(self, aggregate: User) -> None:
            aggregate.key_ids.add(self.key_id)

    class ApiKeyRevoked(Root.Event):
        TOPIC = "User.ApiKeyRevoked"
        key_id: str

        def apply(self, aggregate: User) -> None:
            aggregate.key_ids.discard(self.key_id)

    class ErasureRequested(Root.Event):
        """The person is to be forgotten; nobody acts for the person any more."""

        TOPIC = "User.ErasureRequested"
        requested_at: datetime

        def apply(self, aggregate: User) -> None:
            aggregate.erasure = "requested"

    class Erased(Root.Event):
        """What was personal cannot be read by anybody any more; amounts and the order of things stay."""

        TOPIC = "User.Erased"
        destroyed_keys: int
        erased_at: datetime

        def apply(self, aggregate: User) -> None:
            aggregate.erasure = "done"

    def __init__(self) -> None:
        self.logged_in = False
        self.role = "user"
        self.key_ids: set[str] = set()
        self.erasure: Literal["none", "requested", "done"] = "none"

    @classmethod
    def register(cls, user_id: UserId, email: str, name: str) -> User:
        """A person signs up; whoever calls has made sure that the address is free."""
        return cls.begin(cls.Registered, user_id, email=email, name=name)

    def log_in(self) -> bool:
        """Note the first login. True when this was it."""
        self._check_there()
        if self.logged_in:
            return False
        self.trigger_event(self.LoggedIn)
        return True

    def promote(self, role: str) -> None:
        """Give the person a role: "user" or "operator"."""
        self._check_there()
        if role not in ("user", "operator"):
            raise InvalidValue("/role", f"There is no role {role!r}; use 'user' or 'operator'.")
        if role != self.role:
            self.trigger_event(self.Promoted, role=role)

    def issue_key(self, key_id: str, name: str, prefix: str, digest: str, issued_at: datetime) -> None:
        """Let a new API key act as this person. Only its digest is kept."""
        self._check_there()
        if len(self.key_ids) >= API_KEYS_MAX:
            raise InvalidValue("/name", f"At most {API_KEYS_MAX} API keys; revoke one first.")
        self.trigger_event(
            self.ApiKeyIssued, key_id=key_id, name=name, prefix=prefix, digest=digest, issued_at=issued_at
        )

    def revoke_key(self, key_id: str) -> None:
        """The key is refused from now on."""
        if key_id not in self.key_ids:
            raise NotFound("API key")
        self.trigger_event(self.ApiKeyRevoked, key_id=key_id)

    def request_erasure(self, requested_at: datetime) -> None:
        """Begin to forget the person: keys are refused from now on. Asking again changes nothing."""
        if self.erasure == "none":
            for key_id in sorted(self.key_ids):
                self.revoke_key(key_id)
            self.trigger_event(self.ErasureRequested, requested_at=requested_at)

    def complete_erasure(self, destroyed_keys: int, erased_at: datetime) -> None:
        """The person's keys are destroyed. Saying so again changes nothing.

        Raises:
            Conflict: nobody asked for it.
        """
        if self.erasure == "none":
            raise Conflict("Nobody has asked for this person to be erased.")
        if self.erasure == "requested":
            self.trigger_event(self.Erased, destroyed_keys=destroyed_keys, erased_at=erased_at)

    def _check_there(self) -> None:
        if self.erasure != "none":
            raise NotFound("user")


def canonical_email(email: str) -> str:
    """The form in which two spellings of an address are the same one."""
    return unicodedata.normalize("NFKC", email).strip().casefold()
