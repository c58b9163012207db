"""Work is done in order per key, and what is acknowledged of a partition is always a prefix of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_processors.keyed_pool import Hopeless, KeyedPool, Limits, Source

P = "partition"
PATIENCE_S = 5.0
QUICK = Limits(backoff_first_s=0.001, backoff_max_s=0.004, attempts=3, patient=(ConnectionError,))


@dataclass
class Bench:
    """A pool whose handler does what `does` says, and what came of it."""

    does: Callable[[Any], Awaitable[Any]]
    limits: Limits = QUICK
    began: list[Any] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    acknowledged: list[Any] = field(default_factory=list)
    given_up: list[tuple[Any, Exception]] = field(default_factory=list)
    full: list[Any] = field(default_factory=list)
    ebbed: list[Any] = field(default_factory=list)
    refuse_to_give_up: int = 0

    def __post_init__(self) -> None:
        source = Source(self.acknowledged.append, self.full.append, self.ebbed.append)
        self.pool = KeyedPool[Any](self._handle, self._give_up, source, self.limits)
        self.pool.assign([P])
        self.position = 0

    async def _handle(self, payload: Any) -> Awaitable[None] | None:
        self.began.append(payload)
        later: Awaitable[None] | None = await self.does(payload)
        self.ended.append(payload)
        return later

    async def _give_up(self, payload: Any, failure: Exception) -> None:
        if self.refuse_to_give_up:
            self.refuse_to_give_up -= 1
            raise ConnectionError("nobody listens")
        self.given_up.append((payload, failure))

    def put(self, key: Any, payload: Any, partition: Any = P) -> bool:
        self.position += 1
        return self.pool.submit(partition, self.position, key, payload)

    async def until(self, ask: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not ask():  # noqa: ASYNC110 - what is waited for may be anywhere
                await asyncio.sleep(0.001)

    async def idle(self) -> None:
        await self.until(lambda: self.pool.pending == 0)


Follow = Callable[[Coroutine[Any, Any, None]], Awaitable[None]]


@pytest.fixture(params=["a coroutine", "a future"])
def follow(request: pytest.FixtureRequest) -> Follow:
    """In which form a handler returns what is to follow."""
    return asyncio.ensure_future if request.param == "a future" else lambda later: later


async def nothing(payload: Any) -> None:
    """A handler that has nothing to do."""


def gated() -> tuple[dict[Any, asyncio.Event], Callable[[Any], Awaitable[None]]]:
    """A handler that waits for the event of its payload."""
    gates: dict[Any, asyncio.Event] = defaultdict(asyncio.Event)

    async def wait(payload: Any) -> None:
        await gates[payload].wait()

    return gates, wait


async def test_items_of_one_key_are_handled_one_at_a_time_and_in_order() -> None:
    at_once = most = 0

    async def look(payload: Any) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1

    bench = Bench(look)
    for n in range(50):
        bench.put("a", n)
    await bench.idle()
    assert bench.ended == bench.acknowledged == list(range(50))
    assert most == 1


async def test_a_slow_item_holds_up_its_key_and_no_other() -> None:
    gates, wait = gated()
    bench = Bench(wait)
    bench.put("slow", "slow")
    bench.put("slow", "behind it")
    gates["behind it"].set()
    for n in range(20):
        gates[n].set()
        bench.put(n, n)
    await bench.until(lambda: len(bench.ended) == 20)
    assert "behind it" not in bench.began
    assert bench.acknowledged == []
    assert bench.pool.oldest() == ["slow"]
    assert bench.pool.first_pending(P) == 1
    gates["slow"].set()
    await bench.idle()
    assert bench.acknowledged == ["slow", "behind it", *range(20)]


async def test_no_more_keys_are_handled_at_once_than_allowed() -> None:
    gates, wait = gated()
    bench = Bench(wait, replace(QUICK, running=3))
    for n in range(10):
        bench.put(n, n)
    await bench.until(lambda: len(bench.began) == 3)
    for n in range(10):
        gates[n].set()
    await bench.idle()
    assert bench.acknowledged == list(range(10))


async def test_what_waits_for_its_next_attempt_holds_no_slot() -> None:
    tries = 0

    async def fail(payload: Any) -> None:
        nonlocal tries
        if payload == "bad":
            tries += 1
            raise ValueError(payload)

    bench = Bench(fail, replace(QUICK, running=1, backoff_first_s=60.0, backoff_max_s=60.0))
    bench.put("bad", "bad")
    for n in range(5):
        bench.put(n, n)
    await bench.until(lambda: len(bench.ended) == 5)
    assert tries == 1


async def test_a_failing_item_is_tried_again_with_growing_pauses_and_then_given_up() -> None:
    times: list[float] = []

    async def fail(payload: Any) -> None:
        times.append(asyncio.get_running_loop().time())
        raise ValueError("no")

    bench = Bench(fail, replace(QUICK, backoff_first_s=0.02, backoff_max_s=0.04, attempts=4))
    bench.put("a", "poison")
    bench.put("a", "poison too")
    await bench.idle()
    assert [payload for payload, _ in bench.given_up] == ["poison", "poison too"]
    assert bench.acknowledged == ["poison", "poison too"]
    assert len(times) == 8
    pauses = [later - earlier for earlier, later in pairwise(times[:4])]
    assert all(pause >= 0.5 * least for pause, least in zip(pauses, (0.02, 0.04, 0.04), strict=True))


async def test_an_outage_is_waited_for_however_long_it_takes() -> None:
    left = 40

    async def away(payload: Any) -> None:
        nonlocal left
        left -= 1
        if left:
            raise ConnectionError("away")

    bench = Bench(away)
    bench.put("a", 1)
    await bench.idle()
    assert (left, bench.given_up, bench.acknowledged) == (0, [], [1])


async def test_what_is_hopeless_is_given_up_at_once() -> None:
    tries = 0

    async def fail(payload: Any) -> None:
        nonlocal tries
        tries += 1
        raise Hopeless from ValueError("never")

    bench = Bench(fail)
    bench.put("a", 1)
    await bench.idle()
    assert tries == 1
    assert isinstance(bench.given_up[0][1].__cause__, ValueError)


async def test_giving_up_is_tried_until_it_succeeds() -> None:
    async def fail(payload: Any) -> None:
        raise ValueError("no")

    bench = Bench(fail, refuse_to_give_up=10)
    bench.put("a", 1)
    await bench.idle()
    assert len(bench.given_up) == 1


async def test_a_handler_cancelled_from_within_has_failed() -> None:
    async def cancelled(payload: Any) -> None:
        raise asyncio.CancelledError

    bench = Bench(cancelled)
    bench.put("a", 1)
    bench.put("b", 2)
    await bench.idle()
    assert len(bench.given_up) == 2


async def test_what_was_to_follow_and_was_cancelled_by_others_has_failed() -> None:
    async def publish(payload: Any) -> Awaitable[None]:
        later: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        later.cancel()
        return later

    bench = Bench(publish)
    bench.put("a", 1)
    await bench.idle()
    ((given_up, failure),) = bench.given_up
    assert (given_up, type(failure)) == (1, RuntimeError)


async def test_a_position_is_taken_once_and_never_backwards() -> None:
    bench = Bench(nothing)
    assert bench.pool.submit(P, 5, "a", 5)
    assert not bench.pool.submit(P, 5, "a", 5)
    assert not bench.pool.submit(P, 4, "a", 4)
    assert bench.pool.submit(P, 9, "a", 9)
    await bench.idle()
    assert bench.ended == bench.acknowledged == [5, 9]


async def test_nothing_is_taken_of_a_partition_that_is_not_ours() -> None:
    bench = Bench(nothing)
    assert not bench.put("a", 1, "other")
    assert not bench.pool.follow_up("other", "t", "a", 1)


async def test_a_partition_with_too_much_pending_is_paused_and_resumed() -> None:
    gates, wait = gated()
    bench = Bench(wait, replace(QUICK, pending=10))
    for n in range(12):
        bench.put(n, n)
    assert (bench.full, bench.ebbed) == ([P], [])
    for n in range(6):
        gates[n].set()
    await bench.until(lambda: len(bench.acknowledged) == 6)
    assert bench.ebbed == []
    gates[6].set()
    await bench.until(lambda: bench.ebbed == [P])
    for n in range(12):
        gates[n].set()
    await bench.idle()
    assert (bench.full, bench.ebbed) == ([P], [P])


async def test_what_is_to_follow_delays_the_acknowledgement_and_not_the_next_item(follow: Follow) -> None:
    gates: list[asyncio.Event] = [asyncio.Event() for _ in range(3)]

    async def publish(payload: int) -> Awaitable[None]:
        async def acknowledged() -> None:
            await gates[payload].wait()

        return follow(acknowledged())

    bench = Bench(publish)
    for n in range(3):
        bench.put("a", n)
    await bench.until(lambda: bench.ended == [0, 1, 2])
    gates[2].set()
    gates[1].set()
    assert bench.acknowledged == []
    gates[0].set()
    await bench.idle()
    assert bench.acknowledged == [0, 1, 2]


async def test_an_item_is_handled_again_when_what_was_to_follow_fails(follow: Follow) -> None:
    async def publish(payload: int) -> Awaitable[None]:
        async def refused() -> None:
            if len(bench.ended) < 2:
                raise ConnectionError("away")
            if len(bench.ended) < 3 or payload == 2:
                raise ValueError("too large")

        return follow(refused())

    bench = Bench(publish)
    bench.put("a", 1)
    await bench.idle()
    assert (bench.ended, bench.acknowledged, bench.given_up) == ([1, 1, 1], [1], [])
    bench.put("a", 2)
    await bench.idle()
    assert bench.acknowledged == [1, 2]
    assert [payload for payload, _ in bench.given_up] == [2]


async def test_a_follow_up_waits_for_its_key_and_is_taken_once_at_a_time() -> None:
    gates, wait = gated()
    bench = Bench(wait)
    bench.put("a", "first")
    assert bench.pool.follow_up(P, "token", "a", "follow-up")
    assert not bench.pool.follow_up(P, "token", "a", "follow-up")
    bench.put("a", "last")
    assert bench.pool.pending == 2
    for gate in ("last", "follow-up", "first"):
        gates[gate].set()
    await bench.idle()
    assert bench.ended == ["first", "follow-up", "last"]
    assert bench.acknowledged == ["first", "last"]
    assert bench.pool.follow_up(P, "token", "a", "follow-up")
    await bench.until(lambda: len(bench.ended) == 4)


async def test_a_revoked_partition_lets_what_runs_end_and_begins_nothing_more() -> None:
    gates, wait = gated()
    bench = Bench(wait)
    bench.put("a", "runs")
    bench.put("a", "waits")
    bench.put("b", "too slow")
    await bench.until(lambda: len(bench.began) == 2)
    revoking = asyncio.create_task(bench.pool.revoke([P], grace_s=0.2))
    await asyncio.sleep(0)
    assert not bench.put("c", "late")
    gates["runs"].set()
    assert await revoking == 1
    gates["too slow"].set()
    assert (bench.acknowledged, bench.pool.pending) == (["runs"], 0)
    assert "waits" not in bench.began
    assert "too slow" not in bench.ended
    # It comes again, from the first item that was not acknowledged.
    bench.pool.assign([P])
    assert bench.pool.submit(P, 2, "a", "waits")
    gates["waits"].set()
    await bench.idle()
    assert bench.acknowledged == ["runs", "waits"]


async def test_revoking_waits_for_what_is_to_follow(follow: Follow) -> None:
    acknowledged = asyncio.Event()

    async def publish(payload: Any) -> Awaitable[None]:
        async def wait() -> None:
            await acknowledged.wait()

        return follow(wait())

    bench = Bench(publish)
    bench.put("a", 1)
    await bench.until(lambda: bench.ended == [1])
    revoking = asyncio.create_task(bench.pool.revoke([P], grace_s=PATIENCE_S))
    await asyncio.sleep(0)
    acknowledged.set()
    assert await revoking == 0
    assert bench.acknowledged == [1]


async def test_a_pause_ends_when_its_partition_is_revoked() -> None:
    async def fail(payload: Any) -> None:
        raise ConnectionError("away")

    bench = Bench(fail, replace(QUICK, backoff_first_s=600.0, backoff_max_s=600.0))
    bench.put("a", 1)
    await bench.until(lambda: bench.began)
    async with asyncio.timeout(PATIENCE_S):
        assert await bench.pool.drain(grace_s=600.0) == 0
    assert bench.acknowledged == []


async def test_a_handler_that_takes_no_notice_of_its_end_acknowledges_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stream_processors.keyed_pool.CANCEL_S", 0.01)
    gate = asyncio.Event()

    async def deaf(payload: Any) -> None:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            await gate.wait()

    bench = Bench(deaf)
    bench.put("a", 1)
    await bench.until(lambda: bench.began)
    assert await bench.pool.revoke([P], grace_s=0.01) == 1
    gate.set()
    await bench.until(lambda: bench.ended)
    assert bench.acknowledged == []


# --- whatever happens

Item = tuple[int, int, int, str, bool]
KEYS = st.integers(0, 4)
ITEM = st.tuples(
    st.integers(0, 2),  # partition
    KEYS,
    st.integers(0, 4),  # how often it yields
    st.sampled_from(["ok", "ok", "ok", "outage", "fails once", "poison", "hopeless", "later", "later fails"]),
    st.booleans(),  # whether what is to follow is a future
)


@dataclass
class World:
    """Checks order and prefixes while it handles what Hypothesis made up."""

    items: list[Item]
    tries: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    running: set[tuple[int, int]] = field(default_factory=set)
    firsts: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    acknowledged: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    given_up: set[int] = field(default_factory=set)

    async def handle(self, n: int) -> Awaitable[None] | None:
        partition, key, yields, how, _ = self.items[n]
        assert (partition, key) not in self.running, "two of one key at once"
        self.running.add((partition, key))
        try:
            return await self._handle(n, yields, how)
        finally:
            self.running.remove((partition, key))

    async def _handle(self, n: int, yields: int, how: str) -> Awaitable[None] | None:
        partition, key, _, _, is_future = self.items[n]
        self.tries[n] += 1
        if self.tries[n] == 1:
            self.firsts[partition, key].append(n)
        for _ in range(yields):
            await asyncio.sleep(0)
        match how:
            case "outage" if self.tries[n] < 5:
                raise ConnectionError(str(n))
            case "fails once" if self.tries[n] < 2:
                raise ValueError(n)
            case "poison":
                raise ValueError(n)
            case "hopeless":
                raise Hopeless from ValueError(n)
            case "later" | "later fails":
                later = self._later(n, yields, how)
                return asyncio.ensure_future(later) if is_future else later
        return None

    async def _later(self, n: int, yields: int, how: str) -> None:
        for _ in range(yields):
            await asyncio.sleep(0)
        if how == "later fails" and self.tries[n] < 2:
            raise ConnectionError(str(n))

    async def give_up(self, n: int, failure: Exception) -> None:
        self.given_up.add(n)

    def acknowledge(self, n: int) -> None:
        self.acknowledged[self.items[n][0]].append(n)


@settings(max_examples=100, deadline=None)
@given(st.lists(ITEM, max_size=40), st.integers(1, 4), st.integers(2, 8))
def test_every_item_is_handled_in_the_order_of_its_key_and_acknowledged_in_that_of_its_partition(
    items: list[Item], running: int, pending: int
) -> None:
    world = World(items)

    async def run() -> None:
        limits = Limits(running, pending, 3, 0.0, 0.0, (ConnectionError,))
        pool = KeyedPool[int](world.handle, world.give_up, Source(world.acknowledge), limits)
        pool.assign(range(3))
        for n, (partition, key, yields, _, _) in enumerate(items):
            assert pool.submit(partition, n, key, n)
            if not yields:
                await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            while pool.pending:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)

    asyncio.run(run())
    for partition in range(3):
        assert world.acknowledged[partition] == [n for n, item in enumerate(items) if item[0] == partition]
        for key in range(5):
            of_key = [n for n, item in enumerate(items) if item[:2] == (partition, key)]
            assert world.firsts[partition, key] == of_key
    assert world.given_up == {n for n, item in enumerate(items) if item[3] in ("poison", "hopeless")}


@settings(max_examples=100, deadline=None)
@given(st.lists(ITEM, min_size=1, max_size=40), st.integers(0, 30), st.booleans())
def test_what_is_acknowledged_before_a_revocation_is_a_prefix_and_the_rest_comes_again(
    items: list[Item], turns: int, patient: bool
) -> None:
    world = World(items)

    async def run() -> None:
        limits = Limits(2, 10, 3, 0.0, 0.0, (ConnectionError,))
        pool = KeyedPool[int](world.handle, world.give_up, Source(world.acknowledge), limits)
        pool.assign(range(3))
        for n, (partition, key, _, _, _) in enumerate(items):
            pool.submit(partition, n, key, n)
        for _ in range(turns):
            await asyncio.sleep(0)
        await pool.revoke([0], grace_s=0.05 if patient else 0.0)
        before = list(world.acknowledged[0])
        of_partition = [n for n, item in enumerate(items) if item[0] == 0]
        assert before == of_partition[: len(before)]
        pool.assign([0])
        for n in of_partition[len(before) :]:
            assert pool.submit(0, n, items[n][1], n)
        async with asyncio.timeout(PATIENCE_S):
            while pool.pending:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
        for partition in range(3):
            assert world.acknowledged[partition] == [
                n for n, item in enumerate(items) if item[0] == partition
            ]

    asyncio.run(run())
