"""Work in order per key and many keys at once; what is acknowledged of a partition is always a prefix of it.

Knows neither records nor brokers. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

log_of = logging.getLogger(__name__)

COMPLAIN_S = 1.0  # how often an outage is logged
CANCEL_S = 5.0  # what a handler that was cancelled may take to come to its end

T = TypeVar("T")
R = TypeVar("R")


class Hopeless(Exception):
    """Raised by a handler: another attempt would end the same way. `__cause__` says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, and how patiently. A back-off holds no slot, and grows from the first pause to the longest."""

    running: int = 256  # keys handled at once
    pending: int = 1_000  # items of a partition not acknowledged yet; beyond it the partition is to be paused
    attempts: int = 6
    backoff_first_s: float = 0.1
    backoff_max_s: float = 5.0
    patient: tuple[type[Exception], ...] = ()  # not the item's fault: tried again for as long as it takes


@dataclass(frozen=True, slots=True)
class Source(Generic[T]):
    """Where items come from: told in order of what is finished, and when a partition has more than enough, or room again."""

    acknowledge: Callable[[T], None] = lambda payload: None
    on_full: Callable[[Any], None] = lambda partition: None
    on_ebb: Callable[[Any], None] = lambda partition: None


@dataclass(slots=True, eq=False)
class _Item(Generic[T]):
    key: Hashable
    payload: T
    position: int | None  # None: it is not of the partition's sequence, and no acknowledgement waits for it
    token: Hashable = None
    attempts: int = 0
    finished: bool = False


@dataclass(slots=True, eq=False)
class _Partition(Generic[T]):
    name: Hashable
    last: int = -1  # the highest position taken
    queue: deque[_Item[T]] = field(default_factory=deque)  # not acknowledged yet, by position
    chains: dict[Hashable, deque[_Item[T]]] = field(default_factory=dict)
    tasks: set[asyncio.Future[None]] = field(default_factory=set)
    # Those of the tasks that are inside a handler, or what a handler left to follow.
    handling: set[asyncio.Future[Any]] = field(default_factory=set)
    tokens: set[Hashable] = field(default_factory=set)
    full: bool = False
    gone: bool = False
    closing: asyncio.Event = field(default_factory=asyncio.Event)


class KeyedPool(Generic[T]):
    """Hands items to `handle`, those of one key one at a time and in the order in which they were given.

    `handle` may return something awaitable of its own: its item is finished when that is, while the next of its key
    begins. It is cancelled when its partition is revoked.
    After the last attempt `give_up` is told, and the item is finished when that has succeeded, which is tried for as
    long as it takes.
    """

    def __init__(
        self,
        handle: Callable[[T], Awaitable[Awaitable[None] | None]],
        give_up: Callable[[T, Exception], Awaitable[None]],
        source: Source[T] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._handle, self._give_up = handle, give_up
        self._source: Source[T] = source or Source()
        self._limits = limits or Limits()
        self._slots = asyncio.Semaphore(self._limits.running)
        self._partitions: dict[Hashable, _Partition[T]] = {}
        self.pending = 0  # items taken and not acknowledged yet
        self._left: dict[Hashable, int] = {}  # the first that was never acknowledged of partitions given up
        self._complained_s = -COMPLAIN_S

    # --- partitions

    def assign(self, partitions: Iterable[Hashable]) -> None:
        """Take items of these partitions from now on; those already ours are left as they are."""
        for name in partitions:
            ours = self._partitions.get(name)
            if ours is not None and not ours.closing.is_set():
                continue
            if ours is not None:
                self._forget(ours)
            self._partitions[name] = _Partition(name)
            self._left.pop(name, None)

    async def revoke(self, partitions: Iterable[Hashable], grace_s: float) -> int:
        """Give partitions up: begin nothing more, let handlers under way end within `grace_s`, cancel the others.

        What ends in time is acknowledged; what does not, never. Returns how many were cancelled.
        """
        leaving = [each for name in partitions if (each := self._partitions.get(name)) is not None]
        for partition in leaving:
            partition.closing.set()
            for task in partition.tasks - partition.handling:
                task.cancel()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + grace_s
        # What ends may leave something to follow.
        while (late := {task for partition in leaving for task in partition.tasks}) and loop.time() < until_s:
            await asyncio.wait(late, timeout=until_s - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        for partition in leaving:
            self._forget(partition)
        for task in late:
            task.cancel()
        if late and (await asyncio.wait(late, timeout=CANCEL_S))[1]:
            log_of.error("a handler does not end although it was cancelled")
        return len(late)

    async def drain(self, grace_s: float) -> int:
        """`revoke` for everything."""
        return await self.revoke(list(self._partitions), grace_s)

    # --- items

    def submit(self, partition: Hashable, position: int, key: Hashable, payload: T) -> bool:
        """Take an item. False: the partition is not ours, or the position is not beyond what was taken of it."""
        ours = self._partitions.get(partition)
        if ours is None or ours.closing.is_set() or position <= ours.last:
            return False
        ours.last = position
        item = _Item(key, payload, position)
        ours.queue.append(item)
        self.pending += 1
        self._chain(ours, item)
        if len(ours.queue) >= self._limits.pending and not ours.full:
            ours.full = True
            self._source.on_full(partition)
        return True

    def follow_up(self, partition: Hashable, token: Hashable, key: Hashable, payload: T) -> bool:
        """Take an item that has no position, behind those of its key.

        False: the partition is not ours, or an item with this token is not finished yet.
        """
        ours = self._partitions.get(partition)
        if ours is None or ours.closing.is_set() or token in ours.tokens:
            return False
        ours.tokens.add(token)
        self._chain(ours, _Item(key, payload, None, token))
        return True

    # --- how much there is

    @property
    def partitions(self) -> set[Any]:
        """Those that are ours."""
        return set(self._partitions)

    def first_pending(self, partition: Hashable) -> int | None:
        """The lowest position of a partition that is not acknowledged; None when nothing waits.

        Of a partition that was revoked, what was left then.
        """
        ours = self._partitions.get(partition)
        if ours is None:
            return self._left.get(partition)
        return ours.queue[0].position if ours.queue else None

    def reached(self, partition: Hashable) -> int | None:
        """Everything of a partition of ours before this position is acknowledged; None when nothing was taken of it."""
        ours = self._partitions.get(partition)
        if ours is None or ours.last < 0:
            return None
        return ours.queue[0].position if ours.queue else ours.last + 1

    def oldest(self) -> list[T]:
        """What each partition's prefix waits for."""
        return [each.queue[0].payload for each in self._partitions.values() if each.queue]

    # --- inside

    def _forget(self, partition: _Partition[T]) -> None:
        if partition.gone:
            return
        partition.gone = True
        self.pending -= len(partition.queue)
        if partition.queue and (first := partition.queue[0].position) is not None:
            self._left[partition.name] = first
        if self._partitions.get(partition.name) is partition:
            del self._partitions[partition.name]

    def _chain(self, partition: _Partition[T], item: _Item[T], *, first: bool = False) -> None:
        chain = partition.chains.get(item.key)
        if chain is None:
            partition.chains[item.key] = chain = deque([item])
            self._start(partition, self._run_chain(partition, item.key, chain))
        elif first:
            chain.appendleft(item)
        else:
            chain.append(item)

    def _start(self, partition: _Partition[T], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        partition.tasks.add(task)
        task.add_done_callback(partition.tasks.discard)
        return task

    async def _run_chain(self, partition: _Partition[T], key: Hashable, chain: deque[_Item[T]]) -> None:
        try:
            while chain and not partition.closing.is_set():
                item = chain.popleft()
                later = await self._run(partition, item)
                if isinstance(later, asyncio.Future):
                    # Nearly all end well, which takes no task.
                    partition.tasks.add(later)
                    partition.handling.add(later)
                    later.add_done_callback(partial(self._followed, partition, item))
                elif later is not None:
                    self._follow(partition, item, later)
        finally:
            if partition.chains.get(key) is chain:
                del partition.chains[key]

    def _follow(self, partition: _Partition[T], item: _Item[T], later: Awaitable[None]) -> None:
        task = self._start(partition, self._finish_later(partition, item, later))
        partition.handling.add(task)
        task.add_done_callback(partition.handling.discard)
        if asyncio.iscoroutine(later):
            # Cancelled before its first step, the task has not even begun it.
            task.add_done_callback(partial(_close, later))

    def _followed(self, partition: _Partition[T], item: _Item[T], later: asyncio.Future[None]) -> None:
        partition.tasks.discard(later)
        partition.handling.discard(later)
        if not later.cancelled() and later.exception() is None:
            self._finish(partition, item)
        elif not (later.cancelled() and partition.closing.is_set()):
            self._follow(partition, item, later)

    async def _run(self, partition: _Partition[T], item: _Item[T]) -> Awaitable[None] | None:
        """Try until it is finished, or finished but for what is returned, or the partition is revoked."""
        pause_s = self._limits.backoff_first_s
        while True:
            try:
                async with self._slots:
                    if partition.closing.is_set():
                        return None
                    later = await self._inside(partition, self._handle(item.payload))
                if later is None:
                    self._finish(partition, item)
                return later
            except self._limits.patient as failure:
                self._complain(partition, failure)
            except Exception as failure:
                item.attempts += 1
                if isinstance(failure, Hopeless) or item.attempts >= self._limits.attempts:
                    await self._tell(partition, item, failure)
                    return None
                told = failure if item.attempts == 1 else None
                log_of.warning(
                    "%s: attempt %d failed, %r", partition.name, item.attempts, failure, exc_info=told
                )
            if await self._is_revoked_within(partition, pause_s):
                return None
            pause_s = min(pause_s * 2, self._limits.backoff_max_s)

    async def _inside(self, partition: _Partition[T], handling: Awaitable[R]) -> R:
        task = asyncio.current_task()
        assert task is not None
        partition.handling.add(task)
        try:
            return await handling
        except asyncio.CancelledError as stray:
            if task.cancelling():
                raise
            raise RuntimeError("a handler was cancelled from within") from stray
        finally:
            partition.handling.discard(task)

    async def _finish_later(self, partition: _Partition[T], item: _Item[T], later: Awaitable[None]) -> None:
        try:
            await self._inside(partition, later)
        except Exception as failure:
            log_of.warning("%s: what was to follow failed, %r", partition.name, failure, exc_info=failure)
            if not isinstance(failure, self._limits.patient):
                item.attempts += 1
                if isinstance(failure, Hopeless) or item.attempts >= self._limits.attempts:
                    await self._tell(partition, item, failure)
                    return
            if not await self._is_revoked_within(partition, self._limits.backoff_first_s):
                # Those behind it may have overtaken it meanwhile.
                self._chain(partition, item, first=True)
        else:
            self._finish(partition, item)

    async def _tell(self, partition: _Partition[T], item: _Item[T], failure: Exception) -> None:
        pause_s = self._limits.backoff_first_s
        while True:
            try:
                await self._inside(partition, self._give_up(item.payload, failure))
                break
            except Exception as worse:
                log_of.error("%s: cannot give up on an item, %r", partition.name, worse, exc_info=worse)
            if await self._is_revoked_within(partition, pause_s):
                return
            pause_s = min(pause_s * 2, self._limits.backoff_max_s)
        self._finish(partition, item)

    def _complain(self, partition: _Partition[T], failure: Exception) -> None:
        # Every item under way meets the same outage.
        now_s = asyncio.get_running_loop().time()
        if now_s - self._complained_s >= COMPLAIN_S:
            self._complained_s = now_s
            log_of.warning("%s: waiting, %r", partition.name, failure)

    async def _is_revoked_within(self, partition: _Partition[T], pause_s: float) -> bool:
        try:
            async with asyncio.timeout(pause_s * random.uniform(0.5, 1.0)):  # noqa: S311 - so that not all come back at once
                await partition.closing.wait()
        except TimeoutError:
            return False
        return True

    def _finish(self, partition: _Partition[T], item: _Item[T]) -> None:
        item.finished = True
        partition.tokens.discard(item.token)
        queue = partition.queue
        while queue and queue[0].finished and not partition.gone:
            self.pending -= 1
            self._source.acknowledge(queue.popleft().payload)
        if partition.full and len(queue) <= self._limits.pending // 2:
            partition.full = False
            if not partition.closing.is_set():
                self._source.on_ebb(partition.name)


def _close(begun_or_not: Coroutine[Any, Any, None], task: asyncio.Task[None]) -> None:
    begun_or_not.close()
