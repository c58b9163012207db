"""Places where tests kill the process, to prove that nothing is lost between any two steps.

Armed only by `arm`, which only the test programs call; unarmed, a point costs one comparison.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "command.before_append",
    "command.after_append",
    "turn.claimed",
    "model.answered",
    "turn.recorded",
    "tool.claimed",
    "tool.ran",
    "tool.recorded",
    "debit.before",
    "debit.after",
    "callback.claimed",
    "callback.sent",
    "projection.before_commit",
    "projection.after_commit",
    "cursor.saved",
)
# Reached only where the log goes through a broker.
DISTRIBUTED_POINTS = (
    "relay.before_send",
    "relay.sent",
    "relay.acked",
    "relay.saved",
    "host.delivered",
    "host.handled",
    "host.parked",
    "host.acked",
)
_armed: dict[str, int] = {}


def arm(point: str, visit: int = 1) -> None:
    """Die with SIGKILL when `point` is reached for the `visit`-th time."""
    known = (*POINTS, *DISTRIBUTED_POINTS)
    if point not in known:
        raise ValueError(f"unknown crash point {point!r}; known: {', '.join(known)}")
    _armed[point] = visit


def crash_point(point: str) -> None:
    """Here a process may die."""
    if _armed and point in _armed:
        _armed[point] -= 1
        if _armed[point] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
