"""Hints between processes: heard soon, merged when there are many, and alive again after an outage."""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg

from adapters.postgres import hints as hints_module
from adapters.postgres.hints import CHANNEL, Hints, Sealing, listen
from schemas.hints import Hint, Serving, written

PATIENCE_S = 10.0
KEY, OTHER_KEY = bytes(32), bytes(31) + b"1"
LOOK_S = 0.01


class Ear:
    """What a listener was told last of each shard, and how often it was told anything."""

    def __init__(self) -> None:
        self.heads: dict[int, int] = {}
        self.count = 0

    def __call__(self, hint: Hint) -> None:
        self.heads.update(hint.heads)
        self.count += 1


@asynccontextmanager
async def running(*all_hints: Hints) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(hints.run()) for hints in all_hints]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def eventually(happened: Callable[[], bool], again: Callable[[], Any] = lambda: None) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not happened():
            again()
            await asyncio.sleep(LOOK_S)


def committed(shard: int, position: int) -> Any:
    return SimpleNamespace(shard=shard, position=position, event=None)


async def test_another_process_hears_which_shards_grew(database_url: str):
    teller, listener, ear = Hints(database_url, KEY), Hints(database_url, KEY), Ear()
    listener.on_hint(ear)
    async with running(teller, listener):
        await eventually(
            lambda: ear.heads == {3: 7, 4: 9}, lambda: teller.tell([committed(3, 7), committed(4, 9)])
        )


async def test_a_burst_of_commits_becomes_few_hints_and_the_last_head_arrives(database_url: str):
    teller, listener, ear = Hints(database_url, KEY), Hints(database_url, KEY), Ear()
    listener.on_hint(ear)
    async with running(teller, listener):
        await eventually(lambda: ear.count > 0, lambda: teller.tell([committed(0, 1)]))
        before = ear.count
        for position in range(2, 2_002):
            teller.tell([committed(0, position)])
        await eventually(lambda: ear.heads[0] == 2_001)
    assert ear.count - before <= 3


async def test_hints_come_again_after_their_connections_were_cut(database_url: str, monkeypatch: Any):
    monkeypatch.setattr(hints_module, "PAUSE_S", 0.05)
    teller, listener, ear = Hints(database_url, KEY), Hints(database_url, KEY), Ear()
    listener.on_hint(ear)
    async with running(teller, listener):
        await eventually(lambda: ear.count > 0, lambda: teller.tell([committed(0, 1)]))
        admin = urlunsplit(urlsplit(database_url)._replace(path="/postgres"))
        with psycopg.connect(admin, autocommit=True) as connection:
            name = urlsplit(database_url).path.lstrip("/")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
            )
        await eventually(lambda: ear.heads.get(5) == 8, lambda: teller.tell([committed(5, 8)]))


async def test_what_anybody_else_says_on_the_channel_ends_nothing(database_url: str):
    teller, listener, ear = Hints(database_url, KEY), Hints(database_url, KEY), Ear()
    listener.on_hint(ear)
    async with running(teller, listener):
        await eventually(lambda: ear.count > 0, lambda: teller.tell([committed(0, 1)]))
        with psycopg.connect(database_url, autocommit=True) as connection:
            sealed = Sealing(OTHER_KEY).written(written(Hint({1: 2}, None, ())))
            for said in ("nonsense", "", "AAAA", sealed, Sealing(KEY).written(b"nonsense")):
                connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, said))
        await eventually(lambda: ear.heads.get(3) == 4, lambda: teller.tell([committed(3, 4)]))
        assert 1 not in ear.heads


def test_what_was_sealed_is_read_by_those_who_have_the_key_as_long_as_nothing_is_changed():
    here, there, stranger = Sealing(KEY), Sealing(KEY), Sealing(OTHER_KEY)
    text = here.written(b"news")
    assert [each.read(text) for each in (here, there, stranger)] == [b"news", b"news", None]
    assert here.written(b"news") != text != there.written(b"news")
    raw = b64decode(text)
    changed = [raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1 :] for n in range(len(raw))]
    assert [there.read(b64encode(each).decode()) for each in changed] == [None] * len(raw)


async def test_a_worker_says_what_it_serves_again_and_again_and_with_its_news(
    database_url: str, monkeypatch: Any
):
    monkeypatch.setattr(hints_module, "ANNOUNCE_S", 0.02)
    teller, listener = Hints(database_url, KEY), Hints(database_url, KEY)
    heard: list[Serving] = []
    news: list[Hint] = []
    listener.on_serving(heard.append)
    listener.on_hint(news.append)
    shards = [(1, 2), (3,)]
    teller.announce(lambda: Serving("one/1", shards[0]))
    async with running(teller, listener):
        await eventually(lambda: len(heard) > 3)
        assert not news, "nothing has happened"
        teller.tell([committed(3, 7)])
        await eventually(lambda: len(news) == 1)
        assert (news[0].heads, news[0].serving) == ({3: 7}, Serving("one/1", (1, 2)))
        assert set(heard) == {Serving("one/1", (1, 2))}
        del shards[0]
        teller.wake()
        await eventually(lambda: heard[-1] == Serving("one/1", (3,)))
        assert len(news) == 1


async def test_a_channel_is_heard_whatever_is_said_and_after_an_outage(database_url: str, monkeypatch: Any):
    monkeypatch.setattr(hints_module, "PAUSE_S", 0.05)
    heard: list[str] = []

    async def hear(said: str) -> None:
        heard.append(said)

    listening = asyncio.create_task(listen(database_url, "elsewhere", hear))
    try:
        with psycopg.connect(database_url, autocommit=True) as connection:
            for word in ("", "é"):
                await eventually(
                    lambda word=word: word in heard,
                    lambda word=word: connection.execute("SELECT pg_notify('elsewhere', %s)", (word,)),
                )
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN elsewhere'"
                )
    finally:
        listening.cancel()
        await asyncio.wait({listening})
