"""Telling a caller's own server that a request has ended: at least once, with growing pauses, and not for ever.

The stream follows from the turn's id. `AttemptStarted` is both the fence (the slower of two workers loses) and the
claim; what a worker that died had sent is not known, so it is sent again under the same message id.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal
from urllib.parse import urlsplit
from uuid import UUID

from domain.aggregate import Created, PersonalText, Root
from domain.errors import InvalidValue, NotYours
from domain.ids import AgentId, TurnId, UserId, derived

URL_CHARS_MAX = 2_000
TIMEOUT_S = 15.0  # of one attempt, redirects not followed
PAUSES_S = (5.0, 30.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 28_800.0, 28_800.0)  # 23 h 36 min in all
ATTEMPTS_MAX = len(PAUSES_S) + 1
GIVES_UP_AFTER = timedelta(hours=24)

CallbackStatus = Literal["waiting", "pending", "delivered", "failed"]


def callback_of(turn_id: UUID) -> UUID:
    """The callback of a turn; also what the message sent is known by, the same on every attempt."""
    return derived(turn_id, "callback")


class Callback(Root):
    """One message to one URL. `status`: waiting for the turn's end, pending, delivered, or failed for good."""

    TOPIC = "Callback"

    class Requested(Root.Event, Created):
        TOPIC = "Callback.Requested"
        owner_id: UserId
        agent_id: AgentId
        turn_id: TurnId
        url: PersonalText
        actor: str
        requested_at: datetime

    class Queued(Root.Event):
        """The turn has ended: the message is due."""

        TOPIC = "Callback.Queued"
        turn_id: TurnId
        queued_at: datetime

        def apply(self, aggregate: Callback) -> None:
            aggregate.status = "pending"
            aggregate.gives_up_at = self.queued_at + GIVES_UP_AFTER

    class AttemptStarted(Root.Event):
        TOPIC = "Callback.AttemptStarted"
        turn_id: TurnId
        attempt: int
        worker: str
        deadline_at: datetime

        def apply(self, aggregate: Callback) -> None:
            aggregate.attempts, aggregate.worker, aggregate.retry_at = self.attempt, self.worker, None

    class Delivered(Root.Event):
        TOPIC = "Callback.Delivered"
        turn_id: TurnId
        attempt: int
        status_code: int
        latency_ms: int
        delivered_at: datetime

        def apply(self, aggregate: Callback) -> None:
            aggregate.status, aggregate.worker, aggregate.failure = "delivered", "", None

    class AttemptFailed(Root.Event):
        """No 2xx came back; `status_code` is None when nothing did."""

        TOPIC = "Callback.AttemptFailed"
        turn_id: TurnId
        attempt: int
        reason: str
        status_code: int | None
        latency_ms: int
        retry_at: datetime | None

        def apply(self, aggregate: Callback) -> None:
            aggregate.worker, aggregate.retry_at, aggregate.failure = "", self.retry_at, self.reason

    class GivenUp(Root.Event):
        """Nobody will try again."""

        TOPIC = "Callback.GivenUp"
        turn_id: TurnId
        attempts: int
        reason: str

        def apply(self, aggregate: Callback) -> None:
            aggregate.status, aggregate.failure = "failed", self.reason

    def __init__(
        self, owner_id: UserId, agent_id: AgentId, turn_id: TurnId, url: str | None, actor: str
    ) -> None:
        self.owner_id = owner_id
        self.agent_id = agent_id
        self.turn_id = turn_id
        self.url = url
        self.actor = actor
        self.status: CallbackStatus = "waiting"
        self.attempts = 0
        self.worker = ""  # that is at it, "" when nobody is
        self.retry_at: datetime | None = None
        self.gives_up_at: datetime | None = None
        self.failure: str | None = None  # of the last attempt

    @classmethod
    def request(
        cls,
        turn_id: TurnId,
        owner_id: UserId,
        agent_id: AgentId,
        url: str,
        actor: str,
        requested_at: datetime,
    ) -> Callback:
        """A message to send when the turn has ended; signed for `actor`, whose request it answers.

        Raises:
            InvalidValue: the URL cannot be one of a server that may be told.
        """
        check_url(url)
        return cls.begin(
            cls.Requested,
            callback_of(turn_id),
            owner_id=owner_id,
            agent_id=agent_id,
            turn_id=turn_id,
            url=url,
            actor=actor,
            requested_at=requested_at,
        )

    @property
    def is_over(self) -> bool:
        return self.status in ("delivered", "failed")

    def queue(self, queued_at: datetime) -> None:
        """The turn has ended."""
        if self.status == "waiting":
            self.trigger_event(self.Queued, turn_id=self.turn_id, queued_at=queued_at)

    def start(self, worker: str, lost_worker: str, deadline_at: datetime, now: datetime) -> int | None:
        """Claim the next attempt for a worker and return its number. `lost_worker` had the one before and is gone.

        None when there have been attempts enough, all that is left having been lost: then it is given up.

        Raises:
            NotYours: it is not due, somebody is at it, or it is over.
        """
        if self.status != "pending" or self.worker != lost_worker:
            raise NotYours("The callback does not wait to be sent by this worker.")
        if self.retry_at is not None and now < self.retry_at:
            raise NotYours("The callback's next attempt is not due yet.")
        if self.attempts >= ATTEMPTS_MAX:
            self.give_up("worker_lost")
            return None
        attempt = self.attempts + 1
        self.trigger_event(
            self.AttemptStarted,
            turn_id=self.turn_id,
            attempt=attempt,
            worker=worker,
            deadline_at=deadline_at,
        )
        return attempt

    def deliver(self, attempt: int, status_code: int, latency_ms: int, now: datetime) -> None:
        """The receiver has confirmed the message.

        Raises:
            NotYours: this attempt is not under way.
        """
        self._check_under_way(attempt)
        self.trigger_event(
            self.Delivered,
            turn_id=self.turn_id,
            attempt=attempt,
            status_code=status_code,
            latency_ms=latency_ms,
            delivered_at=now,
        )

    def fail(
        self,
        attempt: int,
        reason: str,
        status_code: int | None,
        latency_ms: int,
        retry_after_s: float | None,
        now: datetime,
    ) -> None:
        """The receiver has not confirmed the message: try again later, or give up.

        Raises:
            NotYours: this attempt is not under way.
        """
        self._check_under_way(attempt)
        retry_at = self._retry_at(attempt, status_code, retry_after_s, now)
        self.trigger_event(
            self.AttemptFailed,
            turn_id=self.turn_id,
            attempt=attempt,
            reason=reason,
            status_code=status_code,
            latency_ms=latency_ms,
            retry_at=retry_at,
        )
        if retry_at is None:
            self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """There is nothing that could still be sent."""
        if not self.is_over:
            self.trigger_event(self.GivenUp, turn_id=self.turn_id, attempts=self.attempts, reason=reason)

    def _retry_at(
        self, attempt: int, status_code: int | None, retry_after_s: float | None, now: datetime
    ) -> datetime | None:
        # 410 says that the receiver is gone for good (Standard Webhooks, "Delivery").
        if status_code == 410 or attempt >= ATTEMPTS_MAX or self.gives_up_at is None:
            return None
        pause_s = PAUSES_S[attempt - 1] if retry_after_s is None else max(0.0, retry_after_s)
        # Compared as numbers: a receiver may name a wait that no calendar holds.
        if pause_s > (self.gives_up_at - now).total_seconds():
            return None
        return now + timedelta(seconds=pause_s)

    def _check_under_way(self, attempt: int) -> None:
        if self.status != "pending" or not self.worker or self.attempts != attempt:
            raise NotYours("The callback is not being sent in this attempt.")


def check_url(url: str) -> None:
    """Refuse what cannot be the address of a server; whether it may be reached is decided when it is called.

    Raises:
        InvalidValue: naming what is wrong.
    """
    pointer = "/callback_url"
    if len(url) > URL_CHARS_MAX or any(character <= " " or character in '\x7f\\<>"' for character in url):
        sentence = f"callback_url has up to {URL_CHARS_MAX} characters and no spaces."
        raise InvalidValue(pointer, sentence, "invalid_url")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InvalidValue(pointer, "callback_url is not a URL.", "invalid_url") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidValue(pointer, "callback_url begins with https:// or http:// and a host.", "invalid_url")
    if "@" in parts.netloc or parts.fragment:
        sentence = "callback_url has no user name, password or fragment; put a secret in its path or query."
        raise InvalidValue(pointer, sentence, "invalid_url")
