"""The topics of a cluster: made as they should be, compared with it, and how far their groups are behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from adapters.kafka.clients import START_S, STOP_S, KafkaConfig, open_consumer
from adapters.kafka.faults import KafkaUnavailable, PartitionsFixed
from adapters.kafka.quiet import quieten_clients
from schemas.topics import PRIVATE_PARTITIONS, TOPICS, Topic, divided

CLIENT_ID = "oshaani-topics"
ADMIN_S = 60.0  # everything that is asked of a cluster at once
REQUEST_MS = 20_000
POLL_S = 0.05
REPLICAS_MAX = 3
_SET_ON_THE_TOPIC = 1  # Kafka's protocol guide, DescribeConfigs: config_source


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that was done to a topic."""

    topic: str
    change: str


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic as it is. `partitions` is 0 where it is not there; the offsets are of its partitions, in order."""

    topic: str
    partitions: int
    replicas: int
    settings: Mapping[str, str]
    differences: tuple[str, ...]
    first_offsets: tuple[int, ...]
    end_offsets: tuple[int, ...]
    description: str

    @property
    def records(self) -> int:
        """How many are kept; more than there are where a topic is compacted."""
        return sum(self.end_offsets) - sum(self.first_offsets)


@dataclass(frozen=True, slots=True)
class GroupLag:
    """How far a group is behind on one partition. `committed` is None where it has committed nothing."""

    group: str
    topic: str
    partition: int
    committed: int | None
    end: int
    lag: int


@dataclass(frozen=True, slots=True)
class _Found:
    """What the cluster says of a topic."""

    partitions: int
    replicas: int
    has_leaders: bool


async def apply(
    config: KafkaConfig, topics: Iterable[Topic] = TOPICS, partitions: int = PRIVATE_PARTITIONS
) -> list[Change]:
    """Make the topics that are missing, and correct the settings of the others; nothing is ever deleted or shrunk.

    Topics that follow the shards get `partitions`. A second call does nothing. Several may run at once.

    Raises:
        PartitionsFixed: before anything is done; one that follows the shards has another number of partitions.
        KafkaUnavailable: the cluster cannot be reached, or refuses.
    """
    wanted = {topic.name: topic for topic in divided(topics, partitions)}
    async with _admin(config) as admin:
        found = await _found(admin, wanted)
        _refuse_other_partitions(wanted, found)
        brokers_count = len((await admin.describe_cluster())["brokers"])
        changes = await _create([wanted[name] for name in wanted if name not in found], brokers_count, admin)
        return changes + await _correct(admin, {name: wanted[name] for name in found}, found)


async def show(
    config: KafkaConfig, topics: Iterable[Topic] = TOPICS, partitions: int = PRIVATE_PARTITIONS
) -> list[TopicState]:
    """Each topic as it is, and what differs from how it should be.

    Raises:
        KafkaUnavailable: the cluster cannot be reached.
    """
    wanted = {topic.name: topic for topic in divided(topics, partitions)}
    async with _admin(config) as admin, _reader(config) as reader:
        found = await _found(admin, wanted)
        settings = await _settings(admin, found)
        first, end = await _offsets(reader, {name: each.partitions for name, each in found.items()})
        states = []
        for name, topic in wanted.items():
            each = found.get(name, _Found(0, 0, False))
            its = [TopicPartition(name, number) for number in range(each.partitions)]
            own = {key: value for key, (value, _) in settings.get(name, {}).items()}
            states.append(
                TopicState(
                    name,
                    each.partitions,
                    each.replicas,
                    {key: own[key] for key in _settings_of(topic, each.replicas) if key in own},
                    _differences(topic, each, own),
                    tuple(first[one] for one in its),
                    tuple(end[one] for one in its),
                    topic.description,
                )
            )
        return states


async def group_lags(config: KafkaConfig, groups: Mapping[str, str]) -> list[GroupLag]:
    """How far each group is behind on each partition of the topic it reads (`groups`: group to topic).

    A topic that is not there has no lines. A group that has committed nothing is behind by all that is kept.

    Raises:
        KafkaUnavailable: the cluster cannot be reached.
    """
    async with _admin(config) as admin, _reader(config) as reader:
        found = await _found(admin, set(groups.values()))
        first, end = await _offsets(reader, {name: each.partitions for name, each in found.items()})
        lags = []
        for group, topic in groups.items():
            committed = await _committed(admin, group)
            for number in range(found[topic].partitions if topic in found else 0):
                one = TopicPartition(topic, number)
                at = committed.get(one)
                behind = end[one] - max(first[one], at or 0)
                lags.append(GroupLag(group, topic, number, at, end[one], max(0, behind)))
        return lags


@asynccontextmanager
async def _admin(config: KafkaConfig) -> AsyncIterator[AIOKafkaAdminClient]:
    """A connection for as long as the block runs, at most `ADMIN_S`."""
    quieten_clients()
    where = ",".join(config.bootstrap_servers)
    admin = AIOKafkaAdminClient(**config.client_options(), client_id=CLIENT_ID, request_timeout_ms=REQUEST_MS)
    try:
        async with asyncio.timeout(ADMIN_S):
            async with asyncio.timeout(START_S):
                await admin.start()
            yield admin
    except KafkaError as fault:
        raise KafkaUnavailable(f"Kafka at {where} cannot be used: {fault}") from fault
    except (TimeoutError, OSError) as fault:
        raise KafkaUnavailable(f"Kafka at {where} does not answer in time: {fault!r}") from fault
    finally:
        async with asyncio.timeout(STOP_S):
            await admin.close()


@asynccontextmanager
async def _reader(config: KafkaConfig) -> AsyncIterator[AIOKafkaConsumer]:
    async with open_consumer(config, CLIENT_ID) as consumer:
        yield consumer


async def _found(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, _Found]:
    """Those of `names` that the cluster has."""
    found = {}
    for each in await admin.describe_topics(list(names)):
        if for_code(each["error_code"]).retriable and not each["partitions"]:
            continue  # It is not known (yet).
        parts = each["partitions"]
        found[each["topic"]] = _Found(
            len(parts),
            min((len(part["replicas"]) for part in parts), default=0),
            bool(parts) and all(part["leader"] >= 0 for part in parts),
        )
    return found


def _refuse_other_partitions(wanted: Mapping[str, Topic], found: Mapping[str, _Found]) -> None:
    others = [
        f"{name} has {each.partitions} partitions, not {wanted[name].partitions}"
        for name, each in found.items()
        if wanted[name].by_shard and each.partitions != wanted[name].partitions
    ]
    if others:
        raise PartitionsFixed(
            f"{'; '.join(others)}. What follows the shards cannot be divided anew, because the order of each shard would "
            "be lost: set OSHAANI_KAFKA_PARTITIONS to what is there, or stop all processes, delete these topics, and "
            "have them written again from the log"
        )


async def _create(missing: Sequence[Topic], brokers_count: int, admin: AIOKafkaAdminClient) -> list[Change]:
    if not missing:
        return []
    replicas = min(REPLICAS_MAX, brokers_count)
    new = [
        NewTopic(topic.name, topic.partitions, replicas, topic_configs=_settings_of(topic, replicas))
        for topic in missing
    ]
    response = (await admin.create_topics(new)).to_object()
    for each in response["topic_errors"]:
        kind = for_code(each["error_code"])
        if each["error_code"] and kind is not TopicAlreadyExistsError:
            raise KafkaUnavailable(
                f"topic {each['topic']} cannot be made: {each.get('error_message') or kind}"
            )
    await _until_led(admin, [topic.name for topic in missing])
    return [
        Change(topic.name, f"made with {topic.partitions} partitions and {replicas} replicas")
        for topic in missing
    ]


async def _until_led(admin: AIOKafkaAdminClient, names: Sequence[str]) -> None:
    """A topic that was made is known to every broker a moment later; a producer would meet errors until then."""
    while True:
        found = await _found(admin, names)
        if len(found) == len(names) and all(each.has_leaders for each in found.values()):
            return
        await asyncio.sleep(POLL_S)


async def _correct(
    admin: AIOKafkaAdminClient, wanted: Mapping[str, Topic], found: Mapping[str, _Found]
) -> list[Change]:
    current = await _settings(admin, found)
    changes: list[Change] = []
    altered: list[ConfigResource] = []
    for name, topic in wanted.items():
        should = _settings_of(topic, found[name].replicas)
        wrong = {key: value for key, value in should.items() if _value(current[name], key) != value}
        if not wrong:
            continue
        # The request replaces all settings of the topic, so those that others have set go with ours.
        others = {key: value for key, (value, source) in current[name].items() if source == _SET_ON_THE_TOPIC}
        altered.append(ConfigResource(ConfigResourceType.TOPIC, name, configs={**others, **should}))
        changes += [
            Change(name, f"{key} set to {value}, was {_value(current[name], key)}")
            for key, value in wrong.items()
        ]
    for response in await admin.alter_configs(altered) if altered else ():
        for code, message, _, name in response.resources:
            if code:
                raise KafkaUnavailable(f"the settings of topic {name} cannot be changed: {message}")
    await _until_set(admin, {each.name: each.configs for each in altered})
    return changes


async def _until_set(admin: AIOKafkaAdminClient, wanted: Mapping[str, Mapping[str, str]]) -> None:
    """A change has been written down when it is answered; brokers follow a moment later."""
    while True:
        current = await _settings(admin, wanted)
        if all(
            _value(current[name], key) == should[key] for name, should in wanted.items() for key in should
        ):
            return
        await asyncio.sleep(POLL_S)


async def _settings(
    admin: AIOKafkaAdminClient, names: Iterable[str]
) -> dict[str, dict[str, tuple[str, int]]]:
    """Each topic's settings in force: value, and where it comes from (Kafka's protocol guide, DescribeConfigs)."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    found: dict[str, dict[str, tuple[str, int]]] = {}
    for response in await admin.describe_configs(resources) if resources else ():
        for code, message, _, name, entries in response.resources:
            if code:
                raise KafkaUnavailable(f"the settings of topic {name} cannot be read: {message}")
            found[name] = {entry[0]: (entry[1], entry[3]) for entry in entries}
    return found


def _value(settings: Mapping[str, tuple[str, int]], key: str) -> str | None:
    return settings[key][0] if key in settings else None


def _settings_of(topic: Topic, replicas: int) -> dict[str, str]:
    """With three replicas one may be away for writing; with fewer all that is there must do."""
    return topic.settings | {"min.insync.replicas": str(max(1, replicas - 1))}


def _differences(topic: Topic, found: _Found, settings: Mapping[str, str]) -> tuple[str, ...]:
    if not found.partitions:
        return ("missing",)
    differences = []
    if found.partitions != topic.partitions:
        differences.append(f"{found.partitions} partitions, not {topic.partitions}")
    for key, value in _settings_of(topic, found.replicas).items():
        if settings.get(key) != value:
            differences.append(f"{key} is {settings.get(key)}, not {value}")
    return tuple(differences)


async def _offsets(
    reader: AIOKafkaConsumer, topics: Mapping[str, int]
) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    """The first and the next offset of every partition."""
    everything = [TopicPartition(name, number) for name, count in topics.items() for number in range(count)]
    if not everything:
        return {}, {}
    # Asked for together; it would ask for the leaders of one topic after the other, a tenth of a second each.
    await reader._client.set_topics(topics)
    return await reader.beginning_offsets(everything), await reader.end_offsets(everything)


async def _committed(admin: AIOKafkaAdminClient, group: str) -> dict[TopicPartition, int]:
    while True:
        try:
            found: Mapping[Any, Any] = await admin.list_consumer_group_offsets(group)
        except KafkaError as fault:
            if not fault.retriable:
                raise
            await asyncio.sleep(POLL_S)  # A cluster that never had a group makes the place for offsets now.
        else:
            return {one: at.offset for one, at in found.items() if at.offset >= 0}
