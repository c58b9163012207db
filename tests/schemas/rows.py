"""Any rows of a log, for Hypothesis."""

from __future__ import annotations

from datetime import UTC

from hypothesis import strategies as st

from domain.event_log import StoredEvent
from domain.ids import SHARDS

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
rows = st.builds(
    StoredEvent,
    shard=st.integers(0, SHARDS - 1),
    position=st.integers(1, 2**63 - 1),
    tenant_id=st.uuids(),
    stream_id=st.uuids(),
    stream_version=st.integers(1, 2**31 - 1),
    type=texts,
    schema_version=st.integers(1, 2**15 - 1),
    payload=st.binary(max_size=300),
    personal=st.none() | st.binary(max_size=300),
    subject_id=st.none() | st.uuids(),
    command_id=st.uuids(),
    correlation_id=st.uuids(),
    causation_id=st.none() | st.uuids(),
    actor=texts,
    traceparent=st.none() | texts,
    recorded_at=st.none() | st.datetimes(timezones=st.just(UTC)),
)
