"""Refusals: what the rules say no to. Expected, safe to show, mapped to HTTP once in `api/errors.py`.

    Refusal
    ├── InvalidValue            a field of a command is not acceptable
    ├── NotFound                no such thing for this tenant (also when it is somebody else's)
    ├── InsufficientCredits     the account cannot pay for the work
    ├── PlanLimitExceeded       the plan's quota for today is used up
    ├── TooManyQueued           the conversation's queue is full
    ├── VersionMismatch         If-Match named another version
    ├── Conflict                the state of the thing does not allow it now
    │   ├── AgentStateConflict
    │   ├── CustomToolLimit
    │   ├── ConversationBusy
    │   └── AlreadyExists
    ├── AgentNotPublished
    └── NotYours                the step belongs to another worker, or is over

A refusal is `remembered` when asking the same again can never be answered differently by waiting or paying:
then the command id serves it for ever. The others leave the id free for another try.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class Refusal(Exception):
    """A rule said no. `code` is stable; `facts` are safe to show to whoever sent the command."""

    code: ClassVar[str] = "refused"
    remembered: ClassVar[bool] = False

    def __init__(self, sentence: str, **facts: Any) -> None:
        super().__init__(sentence)
        self.facts = facts


class InvalidValue(Refusal):
    """A field has a value that cannot be accepted; `pointer` is its JSON Pointer."""

    code = "validation_failed"
    remembered = True

    def __init__(self, pointer: str, sentence: str, value_code: str = "invalid") -> None:
        super().__init__(sentence, pointer=pointer, value_code=value_code)


class NotFound(Refusal):
    """There is no such thing, as far as this tenant may know."""

    code = "not_found"

    def __init__(self, noun: str) -> None:
        super().__init__(f"There is no such {noun}.", noun=noun)


class InsufficientCredits(Refusal):
    """The account cannot set aside what the work needs."""

    code = "insufficient_credits"

    def __init__(self, needed_ncr: int, available_ncr: int) -> None:
        super().__init__(
            "There are not enough credits for this.", needed_ncr=needed_ncr, available_ncr=available_ncr
        )
        self.needed_ncr, self.available_ncr = needed_ncr, available_ncr


class PlanLimitExceeded(Refusal):
    """The plan's daily quota of a meter is used up; `resets_in_s` seconds until it is whole again."""

    code = "plan_limit_exceeded"

    def __init__(self, meter: str, limit: int, resets_in_s: int) -> None:
        super().__init__(
            f"The plan allows {limit} of {meter!r} a day and they are used up.",
            meter=meter,
            limit=limit,
            resets_in_s=resets_in_s,
        )


class TooManyQueued(Refusal):
    """The conversation already has as many waiting messages as it may."""

    code = "too_many_concurrent_requests"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The conversation already has {limit} messages waiting for their turn.", limit=limit
        )


class VersionMismatch(Refusal):
    """The caller has seen another version of the thing it wants to change."""

    code = "version_mismatch"

    def __init__(self, current_version: int) -> None:
        super().__init__(f"The current version is v{current_version}.", current_version=current_version)


class Conflict(Refusal):
    """The state of the thing does not allow this now."""

    code = "conflict"


class AgentStateConflict(Conflict):
    """The agent cannot go from its status to the one asked for."""

    code = "agent_state_conflict"

    def __init__(self, status: str, allowed: Sequence[str]) -> None:
        super().__init__(f"The agent is {status!r}.", status=status, allowed_transitions=list(allowed))


class CustomToolLimit(Conflict):
    """The agent has as many custom tools as it may."""

    code = "custom_tool_limit"

    def __init__(self, limit: int) -> None:
        super().__init__(f"An agent has at most {limit} custom tools.", limit=limit)


class ConversationBusy(Conflict):
    """A turn of the conversation is running and the caller did not want to queue."""

    code = "conversation_busy"

    def __init__(self) -> None:
        super().__init__("The conversation is still answering an earlier message.")


class AlreadyExists(Conflict):
    """There is one already."""

    code = "conflict"
    remembered = True

    def __init__(self, noun: str) -> None:
        super().__init__(f"There is already such {noun}.", noun=noun)


class AgentNotPublished(Refusal):
    """Only published agents answer callers with an agent key."""

    code = "agent_not_published"

    def __init__(self) -> None:
        super().__init__("The agent is not published.")


class NotYours(Refusal):
    """The step was already taken, by this worker or another; whoever asked has nothing to do."""

    code = "step_taken"
