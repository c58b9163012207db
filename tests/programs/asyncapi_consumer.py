"""A consumer that knows nothing but an AsyncAPI document: reads every channel to its end, and judges every message.

`python asyncapi_consumer.py asyncapi.json host:port` prints how many messages of each name each channel has, or what
is wrong with the first one that is not as described.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, TopicPartition
from jsonschema import Draft7Validator, FormatChecker
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

DOCUMENT = "urn:document"
PATIENCE_S = 30.0


class Contract:
    """What the document says of messages."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        resource = Resource(contents=document, specification=DRAFT7)
        self._registry: Registry[Any] = Registry().with_resource(DOCUMENT, resource)

    def found(self, reference: str) -> Any:
        place: Any = self.document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
        return place

    def check(self, place: str, instance: Any) -> None:
        schema = {"$ref": f"{DOCUMENT}#/{place}"}
        Draft7Validator(schema, registry=self._registry, format_checker=FormatChecker()).validate(instance)

    def read(self, channel: dict[str, Any], message: Message) -> str:
        """The name of the message, which is as described; a message without a value needs none."""
        key, value = message.key().decode(), message.value()
        headers = {name: text.decode() for name, text in message.headers() or ()}
        if value is None:
            assert channel["bindings"]["kafka"]["topicConfiguration"]["cleanup.policy"] == ["compact"]
            return "nothing"
        name = headers["ce_type"]
        reference = channel["messages"][name]["$ref"]
        described = self.found(reference)
        place = reference.removeprefix("#/")
        assert headers["content-type"] == described["contentType"]
        self.check(f"{place}/headers", headers)
        self.check(f"{place}/payload", json.loads(value))
        self.check(f"{place}/bindings/kafka/key", key)
        return name


def main(file: str, servers: str) -> None:
    contract = Contract(json.loads(Path(file).read_text("utf-8")))
    found = {}
    for name, channel in contract.document["channels"].items():
        partitions, messages = read_all(servers, channel["address"])
        assert partitions == channel["bindings"]["kafka"]["partitions"]
        found[name] = Counter(contract.read(channel, message) for message in messages)
    sys.stdout.write(json.dumps(found))


def read_all(servers: str, topic: str) -> tuple[int, list[Message]]:
    """How many partitions a topic has, and everything that is on it now, each partition in order."""
    settings = {"bootstrap.servers": servers, "group.id": "unused", "enable.auto.commit": False}
    consumer = Consumer({**settings, "enable.partition.eof": True, "fetch.wait.max.ms": 50})
    try:
        partitions = set(consumer.list_topics(topic, timeout=PATIENCE_S).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        left, found = set(partitions), list[Message]()
        while left:
            message = consumer.poll(PATIENCE_S)
            assert message is not None, f"no word of {topic} partitions {left}"
            failure = message.error()
            if failure is None:
                found.append(message)
            else:
                assert failure.code() == KafkaError._PARTITION_EOF, failure
                left.discard(message.partition())
        return len(partitions), found
    finally:
        consumer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
