"""Producers and consumers of any Kafka cluster, with bounds, and quiet while a broker is away.

Delivery is at least once everywhere: idempotent producers, offsets committed by whoever consumes, no transactions.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import ProducerClosed

from adapters.kafka.faults import KafkaConfigInvalid
from adapters.kafka.quiet import quieten_clients
from schemas.topics import RECORD_BYTES_MAX

START_S = (
    10.0  # Finding the cluster; a broker that is away is known at once, one behind a closed door is not.
)
STOP_S = 5.0  # Sending what is left, and leaving the group.
REQUEST_MS = 40_000  # How long a record is tried for; an outage that is shorter loses no producer.
METADATA_AGE_MS = 60_000
FETCH_WAIT_MS = 500  # How long a broker holds a fetch at most, until something comes.
GATHER_BYTES = 64 * 1024  # what is worth being fetched before the time that records may wait for company
FETCH_BYTES_MAX = 16 * 1024 * 1024
BATCH_BYTES = 128 * 1024
SESSION_MS, HEARTBEAT_MS = 10_000, 2_000

PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL = "PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"

log_of = logging.getLogger(__name__)


class KafkaSettings(Protocol):
    """The settings that say how brokers are reached; see docs/reference/settings.md."""

    @property
    def kafka_bootstrap_servers(self) -> tuple[str, ...]: ...
    @property
    def kafka_security_protocol(self) -> str: ...
    @property
    def kafka_sasl_mechanism(self) -> str: ...
    @property
    def kafka_sasl_username(self) -> str | None: ...
    @property
    def kafka_sasl_password(self) -> str | None: ...
    @property
    def kafka_ssl_ca_file(self) -> Path | None: ...
    @property
    def kafka_ssl_cert_file(self) -> Path | None: ...
    @property
    def kafka_ssl_key_file(self) -> Path | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaConfig:
    """How brokers are reached: addresses, who we are, and whom we trust."""

    bootstrap_servers: tuple[str, ...]
    security_protocol: str = PLAINTEXT
    sasl_mechanism: str = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_ca_file: Path | None = None
    ssl_cert_file: Path | None = None
    ssl_key_file: Path | None = None

    @classmethod
    def of(cls, settings: KafkaSettings) -> Self:
        """What the settings say."""
        return cls(
            bootstrap_servers=settings.kafka_bootstrap_servers,
            security_protocol=settings.kafka_security_protocol,
            sasl_mechanism=settings.kafka_sasl_mechanism,
            sasl_username=settings.kafka_sasl_username,
            sasl_password=settings.kafka_sasl_password,
            ssl_ca_file=settings.kafka_ssl_ca_file,
            ssl_cert_file=settings.kafka_ssl_cert_file,
            ssl_key_file=settings.kafka_ssl_key_file,
        )

    @classmethod
    def at(cls, bootstrap_servers: str) -> Self:
        """Brokers without encryption or login, as on this machine: `host:port`, separated by commas."""
        return cls(bootstrap_servers=tuple(bootstrap_servers.split(",")))

    @property
    def is_sasl(self) -> bool:
        """Whether we log in."""
        return self.security_protocol in (SASL_PLAINTEXT, SASL_SSL)

    @property
    def is_encrypted(self) -> bool:
        """Whether brokers are spoken to under TLS."""
        return self.security_protocol in (SSL, SASL_SSL)

    def ssl_context(self) -> ssl.SSLContext | None:
        """Whom we trust and who we are, under TLS; None without.

        Raises:
            KafkaConfigInvalid: a file is missing, or is not what it should be.
        """
        if not self.is_encrypted:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca_file)
        except (OSError, ssl.SSLError) as fault:
            raise KafkaConfigInvalid(
                f"KAFKA_SSL_CA_FILE {str(self.ssl_ca_file)!r} cannot be used: {fault}; "
                "name a file of certificates in PEM form, or none for those of this system"
            ) from fault
        if self.ssl_cert_file is not None:
            # Without a handler OpenSSL would ask for a password at the terminal.
            try:
                context.load_cert_chain(self.ssl_cert_file, self.ssl_key_file, password=_no_password)
            except (OSError, ssl.SSLError, ValueError) as fault:
                raise KafkaConfigInvalid(
                    f"KAFKA_SSL_CERT_FILE {str(self.ssl_cert_file)!r} with KAFKA_SSL_KEY_FILE "
                    f"{str(self.ssl_key_file)!r} cannot be used: {fault}; name a certificate and its key, "
                    "both in PEM form and without a password"
                ) from fault
        return context

    def client_options(self) -> dict[str, Any]:
        """What every client of aiokafka is told of the brokers."""
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context(),
            "metadata_max_age_ms": METADATA_AGE_MS,
        }
        if self.is_sasl:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        return options

    def faust_broker(self) -> list[str]:
        """The brokers as a Faust app is told of them."""
        return [f"aiokafka://{server}" for server in self.bootstrap_servers]

    def faust_credentials(self) -> Any:
        """The login as a Faust app is told of it; None without."""
        if self.security_protocol == PLAINTEXT:
            return None
        from faust import SASLCredentials, SSLCredentials

        context = self.ssl_context()
        if not self.is_sasl:
            return SSLCredentials(context)
        return SASLCredentials(
            username=self.sasl_username,
            password=self.sasl_password,
            mechanism=self.sasl_mechanism,
            ssl_context=context,
        )


def _no_password() -> str:
    raise ValueError("the key asks for a password")


@asynccontextmanager
async def open_producer(
    config: KafkaConfig, client_id: str, *, linger_ms: int = 0, compression: str | None = "zstd"
) -> AsyncIterator[AIOKafkaProducer]:
    """A producer whose records arrive once and in order on each partition, for as long as it lives.

    Keys and values are bytes. `send` may wait `REQUEST_MS` for a topic's metadata, so callers bound it. What is not
    acknowledged when the block ends is waited for, at most `STOP_S`, and then fails.

    Raises:
        KafkaError, TimeoutError: no broker answered within `START_S`.
        KafkaConfigInvalid: see `KafkaConfig.ssl_context`.
    """
    quieten_clients()
    producer = AIOKafkaProducer(
        **config.client_options(),
        client_id=client_id,
        acks="all",
        enable_idempotence=True,
        compression_type=compression,
        linger_ms=linger_ms,
        max_batch_size=BATCH_BYTES,
        max_request_size=RECORD_BYTES_MAX,
        request_timeout_ms=REQUEST_MS,
    )
    try:
        async with asyncio.timeout(START_S):
            await producer.start()
        yield producer
    finally:
        await _stop_producer(producer)


@asynccontextmanager
async def open_consumer(  # noqa: PLR0913 - what differs between those that read
    config: KafkaConfig,
    client_id: str,
    *topics: str,
    group_id: str | None = None,
    group_instance_id: str | None = None,
    auto_offset_reset: str = "earliest",
    gather_ms: int = 0,
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer that commits nothing by itself; without `topics` the caller assigns or subscribes.

    `gather_ms`: how long records may wait for company, where a batch is worth more than haste.

    Keys and values are bytes. A group begins with the oldest record that is kept unless told otherwise.

    Raises:
        KafkaError, TimeoutError: no broker answered within `START_S`.
        KafkaConfigInvalid: see `KafkaConfig.ssl_context`.
    """
    quieten_clients()
    consumer = AIOKafkaConsumer(
        *topics,
        **config.client_options(),
        client_id=client_id,
        group_id=group_id,
        group_instance_id=group_instance_id,
        auto_offset_reset=auto_offset_reset,
        enable_auto_commit=False,
        isolation_level="read_uncommitted",
        fetch_max_wait_ms=gather_ms or FETCH_WAIT_MS,
        fetch_min_bytes=GATHER_BYTES if gather_ms else 1,
        fetch_max_bytes=FETCH_BYTES_MAX,
        max_partition_fetch_bytes=RECORD_BYTES_MAX,
        session_timeout_ms=SESSION_MS,
        heartbeat_interval_ms=HEARTBEAT_MS,
        request_timeout_ms=REQUEST_MS,
    )
    try:
        async with asyncio.timeout(START_S):
            await consumer.start()
        yield consumer
    finally:
        await _stop_consumer(consumer)


async def _stop_producer(producer: AIOKafkaProducer) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await producer.stop()
    except TimeoutError:
        log_of.warning("a producer was ended with records that the broker has not acknowledged")
        # `stop` waits for acknowledgements without end. Without a connection the sender gives its records back, and
        # those who wait for them are told.
        await _close(producer.client)
        await _bounded(producer._sender.close())
        producer._message_accumulator.fail_all(ProducerClosed())


async def _stop_consumer(consumer: AIOKafkaConsumer) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await consumer.stop()
    except TimeoutError:
        log_of.warning("a consumer was ended without a word to its group")
        await _close(consumer._client)


async def _close(client: AIOKafkaClient) -> None:
    await _bounded(client.close())


async def _bounded(closing: Any) -> None:
    try:
        async with asyncio.timeout(STOP_S):
            await closing
    except TimeoutError:
        log_of.warning("a client of the broker did not close in time")
