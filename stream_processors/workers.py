"""Which worker takes up the turns of a shard, as the workers themselves say.

What is heard may be out of date: whoever relies on it makes sure that a worker that is not there harms nothing.
"""

from __future__ import annotations

import time

from schemas.hints import Serving

HEARD_S = 1.2  # how long a worker that has become silent is believed to be there


class Workers:
    """The latest that was heard of each shard."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, float]] = {}

    def hear(self, serving: Serving) -> None:
        """A worker has said what it serves."""
        worker, shards = serving
        self._found = {shard: found for shard, found in self._found.items() if found[0] != worker}
        self._found |= dict.fromkeys(shards, (worker, time.monotonic()))

    def of(self, shard: int) -> str | None:
        """The worker that serves a shard now; None when nobody has said so lately."""
        worker, heard_s = self._found.get(shard, (None, 0.0))
        return worker if time.monotonic() - heard_s < HEARD_S else None
