"""Messages on public topics: CloudEvents 1.0 in Kafka's binary mode, the attributes in headers, the data as JSON.

Ids are deterministic: what is published again after a restart carries the ids it had before. `oshaanishard` and
`oshaaniposition` say where in the log the fact was recorded; per key, positions never fall but for what is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from re import compile as pattern_of
from typing import Any
from uuid import UUID

from domain.ids import derived
from domain.ports import PublicMessage
from schemas.codec import EVENT_TYPES, written
from schemas.public_facts import (
    FACT_NAMES,
    AgentState,
    CommandAccepted,
    CreditBalance,
    Fact,
    SpendAnomaly,
    ToolFailing,
)
from schemas.public_forms import NOUNS, data_of_event, data_of_fact, public_name
from schemas.records import AnyRecord
from schemas.topics import AGENT_STATE, CREDIT_BALANCE, PUBLIC

SCHEMAS_PATH = "/schemas/events"
CONTENT_TYPE = "application/json"
HEADERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ce_specversion": ("The version of CloudEvents.", {"const": "1.0"}),
    "ce_id": (
        "The same whenever the fact is published: drop what was seen before.",
        {"type": "string", "format": "uuid"},
    ),
    "ce_type": ("What happened, and the version of its form.", {"type": "string"}),
    "ce_source": ("The installation, by its base URL.", {"type": "string", "format": "uri-reference"}),
    "ce_subject": ("The aggregate it happened to.", {"type": "string", "format": "uuid"}),
    "ce_time": ("When it was recorded.", {"type": "string", "format": "date-time"}),
    "ce_dataschema": ("The JSON Schema of the data.", {"type": "string", "format": "uri"}),
    "ce_oshaanishard": ("The shard of the log.", {"type": "string", "pattern": "^[0-9]{1,2}$"}),
    "ce_oshaaniposition": ("The position in the shard.", {"type": "string", "pattern": "^[0-9]{1,19}$"}),
    "ce_oshaanitenant": ("Whose it is.", {"type": "string", "format": "uuid"}),
    "ce_correlationid": ("The turn or request it belongs to.", {"type": "string", "format": "uuid"}),
    "ce_causationid": ("The event it followed from, if any.", {"type": "string", "format": "uuid"}),
    "ce_traceparent": ("W3C trace context, if the request had one.", {"type": "string"}),
    "content-type": ("The form of the data.", {"const": CONTENT_TYPE}),
}
OPTIONAL_HEADERS = ("ce_causationid", "ce_traceparent")
# What belongs to no single record of the log, alerts and the states of agents, has none of these.
RECORD_HEADERS = ("ce_oshaanishard", "ce_oshaaniposition", "ce_correlationid", *OPTIONAL_HEADERS)
OF_NO_RECORD = (AgentState, SpendAnomaly, ToolFailing)
Headers = tuple[tuple[str, bytes], ...]
_TRACEPARENT = pattern_of(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context §3.2


@dataclass(frozen=True, slots=True)
class CloudEvents:
    """Makes the messages of one installation; `base_url` is where its API is."""

    base_url: str

    def of_event(self, record: AnyRecord, key: UUID) -> PublicMessage:
        """An event of the log, without what is not public. `key` is its aggregate, a turn's its conversation."""
        kind = EVENT_TYPES[record.type]
        topic = PUBLIC[NOUNS[kind.name.partition(".")[0]]].name
        headers = self._headers(public_name(kind), record.event_id, record.stream_id, record)
        return PublicMessage(topic, written(key).decode(), data_of_event(kind, record.event), headers)

    def of_fact(self, fact: Fact, record: AnyRecord, number: int = 0) -> PublicMessage:
        """A fact that follows from a record: the `number`-th of its kind."""
        name = FACT_NAMES[type(fact)]
        if isinstance(fact, CommandAccepted):
            subject, id = fact.command_id, derived(fact.command_id, name)
        else:
            subject, id = record.tenant_id, derived(record.event_id, name, number)
        topic = PUBLIC[name.partition(".")[0]].name
        return PublicMessage(
            topic, written(subject).decode(), data_of_fact(fact), self._headers(name, id, subject, record)
        )

    def of_balance(self, balance: CreditBalance, record: AnyRecord) -> PublicMessage:
        """The account's balance; the latest stays."""
        id = derived(balance.account_id, "balance", balance.version)
        headers = self._headers(FACT_NAMES[CreditBalance], id, balance.account_id, record)
        return PublicMessage(
            CREDIT_BALANCE.name, written(balance.account_id).decode(), data_of_fact(balance), headers
        )

    def of_agent(self, state: AgentState, at: datetime) -> PublicMessage:
        """What an agent is; the latest stays."""
        name, id = FACT_NAMES[AgentState], derived(state.agent_id, "state", state.version)
        headers = self._required(name, id, state.agent_id, state.tenant_id, at)
        return PublicMessage(AGENT_STATE.name, str(state.agent_id), data_of_fact(state), headers)

    def of_deleted_agent(self, agent_id: UUID) -> PublicMessage:
        """Takes an agent's state away."""
        return PublicMessage(AGENT_STATE.name, str(agent_id), None)

    def of_alert(self, alert: Fact, id: UUID, tenant_id: UUID, at: datetime) -> PublicMessage:
        """An alert about usage; it follows from many records, and belongs to none."""
        headers = self._required(FACT_NAMES[type(alert)], id, tenant_id, tenant_id, at)
        return PublicMessage(PUBLIC["usage"].name, str(tenant_id), data_of_fact(alert), headers)

    def _headers(self, name: str, id: UUID, subject: UUID, record: AnyRecord) -> Headers:
        headers = [
            *self._required(name, id, subject, record.tenant_id, record.recorded_at),
            ("ce_oshaanishard", b"%d" % record.shard),
            ("ce_oshaaniposition", b"%d" % record.position),
            ("ce_correlationid", written(record.correlation_id)),
        ]
        if record.causation_id is not None:
            headers.append(("ce_causationid", written(record.causation_id)))
        # It came from outside with a request; nothing else may travel in it.
        if record.traceparent is not None and _TRACEPARENT.fullmatch(record.traceparent):
            headers.append(("ce_traceparent", record.traceparent.encode()))
        return tuple(headers)

    def _required(self, name: str, id: UUID, subject: UUID, tenant_id: UUID, at: datetime) -> Headers:
        return (
            *_constant(self.base_url, name),
            ("ce_id", written(id)),
            ("ce_subject", written(subject)),
            ("ce_time", at.astimezone(UTC).isoformat().encode()),
            ("ce_oshaanitenant", written(tenant_id)),
        )


@cache
def _constant(base_url: str, name: str) -> Headers:
    """What all messages of a type have in common."""
    return (
        ("ce_specversion", b"1.0"),
        ("ce_type", name.encode()),
        ("ce_source", base_url.encode()),
        ("ce_dataschema", f"{base_url}{SCHEMAS_PATH}/{name}.json".encode()),
        ("content-type", CONTENT_TYPE.encode()),
    )
