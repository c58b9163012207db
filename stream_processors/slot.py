"""A worker's name, which no two living processes may have.

Kafka gives a worker that comes back under its old name what it had at once; two under one name would put each other out
for ever. So a name is a lease, and whoever loses it ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import Final

import psutil

from domain.event_log import LogUnavailable
from domain.leases import Leases

log_of = logging.getLogger(__name__)

TTL_S: Final = 10.0
RENEW_S: Final = 2.0
TAKE_S: Final = 0.25  # how often a name that another has is asked for
COMPLAIN_S: Final = 10.0


class SlotLost(Exception):
    """Another process has our name now."""


class Slot:
    """The name of this process's worker, once it is taken."""

    def __init__(self, leases: Leases, name: str) -> None:
        self._leases, self.name = leases, name
        self._lease, self._holder = f"slot/{name}", _this_process()

    async def take(self) -> None:
        """Wait until nobody else has the name. One whose process has died on this machine is taken at once."""
        loop = asyncio.get_running_loop()
        complained_s = loop.time()
        while True:
            try:
                if await self._leases.acquire(self._lease, self._holder, TTL_S) is not None:
                    return
                holder = await self._other()
                if holder is not None and _is_dead(holder):
                    await self._leases.release(self._lease, holder)
                    continue
                reason = f"it is that of {holder}"
            except LogUnavailable as failure:
                reason = str(failure)
            if loop.time() - complained_s > COMPLAIN_S:
                complained_s = loop.time()
                log_of.warning("waiting for the name %s: %s", self.name, reason)
            await asyncio.sleep(TAKE_S)

    async def keep(self) -> None:
        """Keep the name until cancelled.

        Raises:
            SlotLost: another process has it.
        """
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                if await self._leases.acquire(self._lease, self._holder, TTL_S) is None:
                    raise SlotLost(f"{await self._other()} has taken the name {self.name!r}")
            except LogUnavailable as failure:
                # Nobody else can take it either; if somebody could, Kafka would put us out.
                log_of.warning("the name %s was not renewed: %s", self.name, failure)

    async def give_back(self) -> None:
        """Let others have the name."""
        try:
            await self._leases.release(self._lease, self._holder)
        except LogUnavailable as failure:
            log_of.warning("the name %s was not given back: %s", self.name, failure)

    async def _other(self) -> str | None:
        held = {lease.name: lease.holder for lease in await self._leases.held()}
        return held.get(self._lease)


def _machine() -> str:
    """Where process ids mean the same: the host, and the namespace in it."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}{namespace}"


def _this_process() -> str:
    return f"{_machine()}/{os.getpid()}/{psutil.Process().create_time()}"


def _is_dead(holder: str) -> bool:
    """Whether it was a process of this machine that is certainly no more."""
    machine, _, life = holder.partition("/")
    pid, _, created = life.partition("/")
    if machine != _machine() or not pid.isdecimal():
        return False
    try:
        process = psutil.Process(int(pid))
        return str(process.create_time()) != created or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
