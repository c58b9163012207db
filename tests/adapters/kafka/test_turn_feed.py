"""Pieces of an answer on their way between processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import uuid4

from adapters.kafka.clients import KafkaConfig, open_producer
from adapters.kafka.following import follow_topic
from adapters.kafka.turn_feed import KafkaTurnFeed
from domain.ids import TurnId
from schemas.topics import TURN_STREAM
from schemas.turn_feed import Token
from tests.peers.brokers import PrivateTopics

PATIENCE_S = 20.0
WARM_UP = "…"


@asynccontextmanager
async def api_and_worker(
    broker: str, topic: str, apis: int = 1
) -> AsyncIterator[tuple[list[KafkaTurnFeed], KafkaTurnFeed]]:
    """Processes that have followers, and one that runs turns; all are connected."""
    config = KafkaConfig.at(broker)
    feeds, worker = [KafkaTurnFeed(topic) for _ in range(apis)], KafkaTurnFeed(topic)
    async with open_producer(config, "worker") as producer:
        tasks = [asyncio.create_task(follow_topic(config, "api", topic, feed.take)) for feed in feeds]
        tasks.append(asyncio.create_task(worker.send(producer)))
        try:
            await asyncio.gather(*(heard(feed, worker) for feed in feeds))
            yield feeds, worker
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def heard(feed: KafkaTurnFeed, worker: KafkaTurnFeed) -> None:
    """Until a consumer is there, what is sent is not for it."""
    turn_id = TurnId(uuid4())
    with feed.follow(turn_id) as follower:
        async with asyncio.timeout(PATIENCE_S):
            worker.token(turn_id, 1, 1, WARM_UP)
            while await follower.next(0.2) is None:
                worker.token(turn_id, 1, 1, WARM_UP)


async def text_of(feed: KafkaTurnFeed, turn_id: TurnId, length: int) -> str:
    """What a follower who begins now puts together."""
    with feed.follow(turn_id) as follower:
        text = follower.partial.text if follower.partial else ""
        async with asyncio.timeout(PATIENCE_S):
            while len(text) < length:
                item = await follower.next(1.0)
                if isinstance(item, Token):
                    assert item.start <= len(text)
                    text = text[: item.start] + item.text
    return text


def stream_topic(topics: PrivateTopics) -> str:
    (topic,) = topics.create(replace(TURN_STREAM, partitions=2))
    return topic.name


async def test_every_process_hears_an_answer_while_it_is_written(broker: str, topics: PrivateTopics):
    async with api_and_worker(broker, stream_topic(topics), apis=2) as (feeds, worker):
        turn_id, words = TurnId(uuid4()), [f"word{n} " for n in range(200)]
        whole = "".join(words)
        listening = [asyncio.create_task(text_of(feed, turn_id, len(whole))) for feed in feeds]
        for word in words:
            worker.token(turn_id, 1, 1, word)
            await asyncio.sleep(0)
        assert await asyncio.gather(*listening) == [whole, whole]


async def test_whoever_comes_late_is_given_what_was_written_so_far(broker: str, topics: PrivateTopics):
    async with api_and_worker(broker, stream_topic(topics)) as ((feed,), worker):
        turn_id = TurnId(uuid4())
        early = asyncio.create_task(text_of(feed, turn_id, 12))
        worker.token(turn_id, 1, 1, "The first ")
        worker.token(turn_id, 1, 1, "ha")
        assert await early == "The first ha"
        late = asyncio.create_task(text_of(feed, turn_id, 14))
        await asyncio.sleep(0)
        worker.token(turn_id, 1, 1, "lf")
        assert await late == "The first half"


async def test_a_new_attempt_starts_its_text_anew(broker: str, topics: PrivateTopics):
    async with api_and_worker(broker, stream_topic(topics)) as ((feed,), worker):
        turn_id = TurnId(uuid4())
        with feed.follow(turn_id) as follower:
            worker.token(turn_id, 1, 1, "Never mi")
            assert await follower.next(PATIENCE_S) == Token(turn_id, 1, 1, 0, "Never mi")
            worker.token(turn_id, 1, 2, "Hello")
            worker.token(turn_id, 1, 2, "!")
            assert await follower.next(PATIENCE_S) == Token(turn_id, 1, 2, 0, "Hello!")


async def test_pieces_of_which_the_beginning_is_not_known_are_no_partial_text():
    feed, turn_id = KafkaTurnFeed("nowhere"), TurnId(uuid4())
    with feed.follow(turn_id) as follower:
        feed._local.pass_on(Token(turn_id, 1, 1, 7, "half"))
        assert await follower.next(1.0) == Token(turn_id, 1, 1, 7, "half")
    with feed.follow(turn_id) as late:
        assert late.partial is None


async def test_what_is_no_piece_of_text_is_passed_over():
    feed = KafkaTurnFeed("nowhere")
    await feed.take([b"", b"\xc1", b"{}"])
