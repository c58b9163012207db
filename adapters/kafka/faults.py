"""What goes wrong with Kafka and is nobody's bug; each text is one line with the fix, meant for an operator.

KafkaFault
├── KafkaConfigInvalid    what was configured cannot be used
├── KafkaUnavailable      the cluster did not do what it was asked
├── PartitionsFixed       topics have another number of partitions, where that cannot be changed
└── EmbeddedKafkaFault    the development broker cannot serve
    ├── KafkaProgramsMissing    Java, Maven or Kafka's jars are not there and cannot be had
    ├── KafkaFolderUnusable     its folder cannot be made or written, or another process works in it
    ├── KafkaPortTaken          another program listens on the port that it was told to use
    └── KafkaDidNotStart        it ended, or did not answer in time; the text carries its last words
"""

from __future__ import annotations


class KafkaFault(Exception):
    """Something is wrong with Kafka, or with how it is reached."""


class KafkaConfigInvalid(KafkaFault):
    """What was configured cannot be used."""


class KafkaUnavailable(KafkaFault):
    """The cluster did not do what it was asked; the text says which and why."""


class PartitionsFixed(KafkaFault):
    """Topics that have another number of partitions than they should, where that cannot be changed."""


class EmbeddedKafkaFault(KafkaFault):
    """The development broker cannot serve."""


class KafkaProgramsMissing(EmbeddedKafkaFault):
    """Java, Maven or Kafka's jars are not there and cannot be had."""


class KafkaFolderUnusable(EmbeddedKafkaFault):
    """The broker's folder cannot be made or written, or another process works in it."""


class KafkaPortTaken(EmbeddedKafkaFault):
    """Another program listens on the port that the broker was told to use."""


class KafkaDidNotStart(EmbeddedKafkaFault):
    """The broker ended, or did not answer in time; the text carries its last words."""
