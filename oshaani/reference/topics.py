"""The page of topics: every one that is made, and what others read on the public ones."""

from __future__ import annotations

from collections.abc import Iterator

from oshaani.reference.markdown import code, page, table
from schemas.asyncapi import KEYS, STATES, topic_of
from schemas.cloud_events import HEADERS, OPTIONAL_HEADERS, RECORD_HEADERS
from schemas.public_forms import WITHHELD, public_forms
from schemas.topics import PUBLIC, TOPICS, Topic

_INTRODUCTION = """
`oshaani topics apply` makes these; no process that produces or consumes does. Everything on them follows from the log,
which is the record. How to read the public ones: [subscribe](../how-to/subscribe.md).
"""
_PUBLIC = """
## Public topics

CloudEvents 1.0 in Kafka's binary mode. `GET /asyncapi.json` describes them for programs (AsyncAPI 3, also in
`schemas/asyncapi.json`), and `GET /schemas/events/<type>.json` serves each schema. Per key, messages are in the order of
the log; each comes at least once, and a repeated one has the same `ce_id`.

Amounts are decimal strings of credits: `amount_ncr` of the log is `amount_credits` here. Fields are added, never renamed
or reused; what would break a consumer is a new type, published beside the old one for 90 days.
"""
_REFUSED = """
## What is not published

Refused commands: they have no events, and stand in the log's table of commands only. Callbacks: they hold addresses of
callers' servers. Everything marked **personal** in [Events](events.md), and these fields, which people wrote or which
tell about such texts:
"""


def topics_page() -> str:
    """The whole page."""
    return page("Topics", _INTRODUCTION, _all(), _PUBLIC, _headers(), *_types(), _REFUSED, _withheld())


def _all() -> str:
    rows = [
        (code(topic.name), str(topic.partitions), _kept(topic), topic.description)
        for topic in TOPICS
        if not topic.name.endswith(".dlq")
    ]
    letters = "Beside each work topic is its `<topic>.<group>.dlq` for what could not be handled: 1 partition, 30 days."
    return table(("topic", "partitions", "kept", ""), rows) + f"\n\n{letters}"


def _kept(topic: Topic) -> str:
    if topic.retention_s is None:
        return "the latest of each key"
    for unit, seconds in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if topic.retention_s % seconds == 0:
            count = topic.retention_s // seconds
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{topic.retention_s} s"


def _headers() -> str:
    rows = [
        (code(name), description + (f" `{schema['const']}`." if "const" in schema else ""), _when(name))
        for name, (description, schema) in HEADERS.items()
    ]
    return f"### Headers\n\n{table(('header', '', ''), rows)}"


def _when(name: str) -> str:
    if name in OPTIONAL_HEADERS:
        return "if there is one"
    return "not of alerts and the states of agents" if name in RECORD_HEADERS else ""


def _types() -> Iterator[str]:
    forms = public_forms().values()
    for topic in (*PUBLIC.values(), *STATES.values()):
        rows = [
            (
                f"[{code(form.name)}](../../schemas/public/{form.name}.json)",
                form.schema().get("description", ""),
            )
            for form in forms
            if topic_of(form) == topic
        ]
        yield f"### {topic.name}\n\nKey: {KEYS[topic.name]}\n\n{table(('type', ''), rows)}"


def _withheld() -> str:
    rows = [(code(name), ", ".join(map(code, fields))) for name, fields in sorted(WITHHELD.items())]
    return table(("event", "not published"), rows)
