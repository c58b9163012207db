"""The AsyncAPI 3 document of the public topics: for each its key, its retention, and every message with its schema.

It says all that a consumer needs to know, and is the same for every installation. `python -m schemas.generate` writes
it to schemas/asyncapi.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from schemas.cloud_events import (
    CONTENT_TYPE,
    HEADERS,
    OF_NO_RECORD,
    OPTIONAL_HEADERS,
    RECORD_HEADERS,
    SCHEMAS_PATH,
)
from schemas.public_facts import FACT_NAMES, AgentState, CreditBalance
from schemas.public_forms import PublicForm, public_forms
from schemas.topics import AGENT_STATE, CREDIT_BALANCE, PREFIX, PUBLIC, Topic

FILE: Path = Path(__file__).parent / "asyncapi.json"
VERSION = "1.0.0"  # of the contract; forms of messages have versions of their own
BINDING = "0.5.0"  # of Kafka's part of the document
STATES: Mapping[str, Topic] = {FACT_NAMES[AgentState]: AGENT_STATE, FACT_NAMES[CreditBalance]: CREDIT_BALANCE}
KEYS: Mapping[str, str] = {
    PUBLIC["agent"].name: "The agent.",
    PUBLIC["conversation"].name: "The conversation.",
    PUBLIC["turn"].name: "The conversation of the turn; the turn itself when it has none.",
    PUBLIC["credit"].name: "The credit account.",
    PUBLIC["usage"].name: "The tenant: the user who owns, and pays for, what was used.",
    PUBLIC["identity"].name: "The user.",
    PUBLIC["command"].name: "The command.",
    AGENT_STATE.name: "The agent. A message without a value says that it is gone.",
    CREDIT_BALANCE.name: "The credit account.",
}
DESCRIPTION = (
    "What happened, as CloudEvents 1.0 in Kafka's binary mode: attributes in headers, data as JSON. Nothing personal is "
    "published. Messages come at least once; a repeated one has the same `ce_id`. Messages with the same key are in the "
    "order of the log, so that whatever has a `ce_oshaaniposition` not above the last one of its key was seen before. "
    "Amounts are credits as decimal strings. Fields are added, never renamed; what would break a consumer is a new type "
    f"beside the old one. Each `ce_dataschema` is served by the API under {SCHEMAS_PATH}/."
)


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    forms = public_forms()
    topics = (*PUBLIC.values(), AGENT_STATE, CREDIT_BALANCE)
    return {
        "asyncapi": "3.0.0",
        "id": "urn:oshaani:events",
        "info": {
            "title": "Oshaani events",
            "version": VERSION,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "kafka": {
                "host": "{host}:{port}",
                "protocol": "kafka",
                "description": "Any broker of the cluster, one of KAFKA_BOOTSTRAP_SERVERS.",
                "variables": {"host": {"default": "127.0.0.1"}, "port": {"default": "9092"}},
            }
        },
        "channels": {_channel_name(topic): _channel(topic, forms) for topic in topics},
        "operations": {f"publish.{_channel_name(topic)}": _operation(topic, forms) for topic in topics},
        "components": {
            "messages": {name: _message(form) for name, form in forms.items()},
            "schemas": dict(_schemas(forms)),
        },
    }


def topic_of(form: PublicForm) -> Topic:
    """Where messages of this form are."""
    return STATES.get(form.name) or PUBLIC[form.noun]


def written() -> str:
    """The document as its file has it."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def _channel_name(topic: Topic) -> str:
    return topic.name.removeprefix(PREFIX).rpartition(".")[0]


def _channel(topic: Topic, forms: Mapping[str, PublicForm]) -> dict[str, Any]:
    configuration: dict[str, Any] = {"cleanup.policy": ["compact" if topic.compacted else "delete"]}
    if topic.retention_s is not None:
        configuration["retention.ms"] = topic.retention_s * 1000
    return {
        "address": topic.name,
        "description": f"{topic.description} Key: {KEYS[topic.name]}",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _names(topic, forms)},
        "servers": [{"$ref": "#/servers/kafka"}],
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": configuration,
                "bindingVersion": BINDING,
            }
        },
    }


def _operation(topic: Topic, forms: Mapping[str, PublicForm]) -> dict[str, Any]:
    channel = f"#/channels/{_channel_name(topic)}"
    return {
        "action": "send",
        "channel": {"$ref": channel},
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in _names(topic, forms)],
    }


def _names(topic: Topic, forms: Mapping[str, PublicForm]) -> list[str]:
    return [name for name, form in forms.items() if topic_of(form) == topic]


def _message(form: PublicForm) -> dict[str, Any]:
    described = form.schema().get("description")
    plain = form.name in {FACT_NAMES[fact] for fact in OF_NO_RECORD}
    headers = "PlainHeaders" if plain else "RecordHeaders"
    return {
        "name": form.name,
        "title": form.name,
        **({"summary": described} if described else {}),
        "contentType": CONTENT_TYPE,
        "headers": {
            "allOf": [
                {"$ref": f"#/components/schemas/{headers}"},
                {"type": "object", "properties": {"ce_type": {"const": form.name}}},
            ]
        },
        "payload": {"$ref": f"#/components/schemas/{form.name}"},
        "bindings": {
            "kafka": {
                "key": {"type": "string", "format": "uuid", "description": KEYS[topic_of(form).name]},
                "bindingVersion": BINDING,
            }
        },
    }


def _schemas(forms: Mapping[str, PublicForm]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "RecordHeaders", _headers(set(HEADERS) - set(OPTIONAL_HEADERS))
    yield "PlainHeaders", _headers(set(HEADERS) - set(RECORD_HEADERS))
    for name, form in forms.items():
        schema = form.schema()
        definitions = schema.pop("$defs", {})
        for key in ("$schema", "$id", "x-personal"):
            schema.pop(key)
        yield name, _moved(schema, name)
        for inner, definition in definitions.items():
            yield f"{name}.{inner}", _moved(definition, name)


def _headers(required: set[str]) -> dict[str, Any]:
    """Values are texts in UTF-8."""
    return {
        "type": "object",
        "properties": {
            name: {"description": description, **schema} for name, (description, schema) in HEADERS.items()
        },
        "required": [name for name in HEADERS if name in required],
    }


def _moved(schema: Any, name: str) -> Any:
    """A schema whose definitions are components of the document."""
    if isinstance(schema, list):
        return [_moved(each, name) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: member.replace("#/$defs/", f"#/components/schemas/{name}.")
        if key == "$ref"
        else _moved(member, name)
        for key, member in schema.items()
    }
