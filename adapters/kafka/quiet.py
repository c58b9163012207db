"""The log of the Kafka clients, which write a line for each retry: hundreds a second while a broker is away."""

from __future__ import annotations

import logging
import time

EVERY_S = 30.0
FAMILIES = ("aiokafka", "kafka", "faust", "mode")
_TEMPLATES_MAX = 1_000


class OneOfAKind(logging.Filter):
    """Lets one line of each kind through in `every_s`, and says how many like it were left out."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        super().__init__()
        self._every_s = every_s
        self._until_s: dict[tuple[str, object], float] = {}
        self._left_out: dict[tuple[str, object], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Two lines are of one kind when they are written by the same call, whatever it names."""
        kind = (record.name, record.msg if isinstance(record.msg, str) else type(record.msg))
        now_s = time.monotonic()
        if now_s < self._until_s.get(kind, 0.0):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if len(self._until_s) > _TEMPLATES_MAX:
            self._until_s.clear()
            self._left_out.clear()
        self._until_s[kind] = now_s + self._every_s
        if left_out := self._left_out.pop(kind, 0):
            record.msg, record.args = f"{record.getMessage()} (and {left_out} more like it)", None
        return True


_filter = OneOfAKind()


def quieten_clients() -> None:
    """Warnings and worse only, one line of each kind at a time; call it again after importing more of the clients.

    A filter counts for its logger alone, not for those below it, so each of them is given it.
    """
    for name in (*FAMILIES, *logging.root.manager.loggerDict):
        if name.split(".", 1)[0] in FAMILIES:
            logger = logging.getLogger(name)
            if name in FAMILIES and logger.level < logging.WARNING:
                logger.setLevel(logging.WARNING)
            if _filter not in logger.filters:
                logger.addFilter(_filter)
