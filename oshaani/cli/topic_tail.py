"""The records of a topic, for people and programs: the log's own rows, or messages for subscribers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from adapters.kafka.clients import KafkaConfig, open_consumer
from oshaani.cli import show
from oshaani.cli.event_view import Shown
from oshaani.cli.trouble import Failed
from schemas import wire

FETCH_MS = 500
READ_S = 20.0
DATA_CHARS_MAX = 220


async def records(config: KafkaConfig, topic: str, count: int, follow: bool) -> AsyncIterator[Shown]:
    """The last `count` records of a topic by time, oldest first; then whatever comes, for as long as somebody asks.

    Raises:
        Failed: there is no such topic, or no broker answers.
    """
    try:
        async with open_consumer(config, "oshaani-tail", topic, auto_offset_reset="latest") as consumer:
            partitions = [TopicPartition(topic, each) for each in consumer.partitions_for_topic(topic) or ()]
            if not partitions:
                raise Failed(f"there is no topic {topic!r}; see `oshaani topics show`")
            for record in await _latest(consumer, partitions, count):
                yield _view(record)
            while follow:
                found: dict[Any, list[ConsumerRecord]] = await consumer.getmany(timeout_ms=FETCH_MS)
                for record in (record for each in found.values() for record in each):
                    yield _view(record)
    except (KafkaError, TimeoutError) as failure:
        raise Failed(f"the broker does not answer: {failure!r}; see `oshaani doctor`") from failure


async def _latest(
    consumer: AIOKafkaConsumer, partitions: list[TopicPartition], count: int
) -> list[ConsumerRecord]:
    async with asyncio.timeout(READ_S):
        begins, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        for partition in partitions:
            consumer.seek(partition, max(begins[partition], ends[partition] - count))
        kept: list[ConsumerRecord] = []
        behind = set(partitions)
        while behind := {each for each in behind if await consumer.position(each) < ends[each]}:
            found = await consumer.getmany(timeout_ms=FETCH_MS)
            kept += [record for each in found.values() for record in each]
    kept.sort(key=lambda record: (record.timestamp, record.partition, record.offset))
    return kept[-count:] if count else []


def print_line(view: Shown) -> None:
    """One record on one line."""
    what = view["headers"].get("ce_type") or view.get("type") or ""
    place = f"{view['partition']}:{view['offset']}"
    data = orjson.dumps(view["value"], default=str).decode()
    show.line(f"{view['at']} {place:>9}  {what:<32} {view['key'] or '-'}  {show.plain(data, DATA_CHARS_MAX)}")


def _view(record: ConsumerRecord) -> Shown:
    headers = {name: value.decode("utf-8", "replace") for name, value in record.headers}
    view: Shown = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "at": datetime.fromtimestamp(record.timestamp / 1000, UTC).isoformat(timespec="milliseconds"),
        "key": _text(record.key),
        "headers": headers,
    }
    with suppress(wire.Malformed, wire.UnknownFormat):
        row = wire.unpack(record.value or b"")
        # What is personal stays sealed here as it is on the topic.
        kept = row._replace(payload=orjson.loads(row.payload), personal=None)._asdict()
        return view | {"type": row.type, "key": str(row.stream_id), "value": kept}
    return view | {"value": _value(record.value)}


def _value(value: bytes | None) -> Any:
    try:
        return None if value is None else orjson.loads(value)
    except orjson.JSONDecodeError:
        return _text(value)


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()
