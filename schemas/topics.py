"""The topics: what each carries, how it is divided, and how long it is kept.

The log in Postgres is the record; every topic can be written again from it. `oshaani topics apply` makes them, no
process that produces or consumes does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from domain.ids import SHARDS

PREFIX = "oshaani."
PRIVATE_PARTITIONS = (
    8  # a machine's worth of consumers; each partition costs every client and a small broker CPU
)
PUBLIC_PARTITIONS = 12
RECORD_BYTES_MAX = 1024 * 1024  # a row of the log with both its parts at their bounds is 0.5 MiB
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
SEGMENT_S_MAX = DAY_S


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic. `retention_s` is None where the latest record of each key is kept for ever (`compacted`).

    `by_shard`: its partition follows from the shard, so the number of partitions is for ever. `public`: others read it.
    """

    name: str
    partitions: int
    retention_s: int | None
    compacted: bool
    description: str
    by_shard: bool = False
    public: bool = False

    @property
    def settings(self) -> dict[str, str]:
        """Kafka's topic settings, but for those that follow from the size of the cluster."""
        settings = {"compression.type": "producer", "max.message.bytes": str(RECORD_BYTES_MAX)}
        if self.retention_s is None:
            # A segment that is still written to is never compacted.
            return settings | {"cleanup.policy": "compact", "segment.ms": str(SEGMENT_S_MAX * 1000)}
        # Only closed segments are dropped: one stays open for at most half of what is kept.
        segment_s = min(SEGMENT_S_MAX, max(MINUTE_S, self.retention_s // 2))
        return settings | {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_s * 1000),
            "segment.ms": str(segment_s * 1000),
            # Kept from the moment it was written here: what is written again from the log stays as long as what is new.
            "message.timestamp.type": "CreateTime" if self.public else "LogAppendTime",
        }


PROCESSORS = (
    "agent_turns",
    "tool_calls",
    "credit_debits",
    "notifications",
    "public_topics",
    "usage_analytics",
)
"""The processors that have a work topic."""


def _work_name(processor: str) -> str:
    return f"{PREFIX}work.{processor}.v1"


_NOUNS = {
    "agent": "Agents made, changed and removed.",
    "conversation": "Conversations opened and closed, messages accepted.",
    "turn": "Turns and their model and tool calls; keyed by conversation.",
    "credit": "Credits granted, held, captured and released.",
    "usage": "What was used and what it cost, and alerts about it.",
    "identity": "Users and keys made, changed and removed.",
    "command": "What was asked, and what became of it.",
}

LOG = Topic(
    f"{PREFIX}log.v1",
    PRIVATE_PARTITIONS,
    7 * DAY_S,
    False,
    "Every row of the log, by shard and in order; private, with sealed personal parts.",
    by_shard=True,
)
TURN_STREAM = Topic(
    f"{PREFIX}turn.stream.v1",
    PRIVATE_PARTITIONS,
    10 * MINUTE_S,
    False,
    "Pieces of answers while they are written; private.",
)
PUBLIC: Mapping[str, Topic] = MappingProxyType(
    {
        noun: Topic(
            f"{PREFIX}{noun}.events.v1", PUBLIC_PARTITIONS, 30 * DAY_S, False, description, public=True
        )
        for noun, description in _NOUNS.items()
    }
)
AGENT_STATE = Topic(
    f"{PREFIX}agent.state.v1", PUBLIC_PARTITIONS, None, True, "The latest state of each agent.", public=True
)
CREDIT_BALANCE = Topic(
    f"{PREFIX}credit.balance.v1",
    PUBLIC_PARTITIONS,
    None,
    True,
    "The latest balance of each account.",
    public=True,
)
USAGE_TABLE = Topic(
    f"{PREFIX}usage.table.v1",
    PRIVATE_PARTITIONS,  # as the work topic of usage_analytics, whose records its rows follow from
    None,
    True,
    "What usage_analytics has counted, so that another worker can go on; private.",
    by_shard=True,
)


def work_topic(processor: str) -> Topic:
    """The records that one processor handles, and no others."""
    description = f"The rows of the log that {processor} handles; private."
    return Topic(_work_name(processor), PRIVATE_PARTITIONS, DAY_S, False, description, by_shard=True)


def group_of(processor: str) -> str:
    """The consumer group in which all processes of a processor share its work topic."""
    return f"{PREFIX}{processor}"


def dead_letters(topic: str, group: str) -> Topic:
    """What a group could not handle of a topic, with the cause; a copy for people, nothing reads it by itself."""
    description = f"What {group} could not handle of {topic}; private."
    return Topic(f"{topic}.{group}.dlq", 1, 30 * DAY_S, False, description)


READ_BY: Mapping[str, str] = MappingProxyType({group_of(each): _work_name(each) for each in PROCESSORS})
"""Each group of ours, and the topic it reads."""

TOPICS: tuple[Topic, ...] = (
    LOG,
    *(work_topic(processor) for processor in PROCESSORS),
    *(dead_letters(_work_name(processor), group_of(processor)) for processor in PROCESSORS),
    TURN_STREAM,
    *PUBLIC.values(),
    AGENT_STATE,
    CREDIT_BALANCE,
    USAGE_TABLE,
)
"""Everything that `oshaani topics apply` makes, as divided by default."""


def divided(topics: Iterable[Topic], partitions: int) -> tuple[Topic, ...]:
    """`topics` with those that follow the shards divided into `partitions`.

    Raises:
        ValueError: the shards do not go evenly into that many.
    """
    if partitions < 1 or SHARDS % partitions:
        raise ValueError(f"{partitions!r} partitions do not divide {SHARDS} shards evenly")
    return tuple(replace(each, partitions=partitions) if each.by_shard else each for each in topics)


def partition_of(shard: int, partitions: int) -> int:
    """The partition that carries a shard, on every topic that follows the shards."""
    return shard % partitions
