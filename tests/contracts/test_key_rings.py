"""What every key ring keeps."""

from __future__ import annotations

import asyncio
import os
import timeit
from uuid import uuid4

import pytest

from adapters.crypto import NotAuthentic, UnknownMasterKey
from adapters.memory.key_ring import MemoryKeyRing
from adapters.postgres.key_ring import Pool, PostgresKeyRing, rewrap
from domain.ports import KeyNotLoaded, KeyRing, SubjectErased
from tests.peers.secret_tables import tables

__all__ = ["tables"]

MASTER_KEY = bytes(range(32))
NEW_MASTER_KEY = bytes(range(32, 64))
TEXT = "Zażółć gęślą jaźń 🦊".encode()
AAD = b"stream|1|content"


@pytest.fixture(params=["memory", "postgres"])
def ring(request: pytest.FixtureRequest) -> KeyRing:
    if request.param == "memory":
        return MemoryKeyRing()
    return PostgresKeyRing(request.getfixturevalue("tables"), MASTER_KEY)


async def test_sealed_content_opens_again(ring: KeyRing) -> None:
    subject = uuid4()
    await ring.ensure([subject])
    sealed = ring.seal(subject, TEXT, AAD)
    assert TEXT not in sealed
    assert ring.open(subject, sealed, AAD) == TEXT


async def test_the_same_text_is_sealed_differently_each_time(ring: KeyRing) -> None:
    subject = uuid4()
    await ring.ensure([subject])
    assert ring.seal(subject, TEXT, AAD) != ring.seal(subject, TEXT, AAD)


async def test_sealed_content_does_not_open_elsewhere_or_after_a_change(ring: KeyRing) -> None:
    subject, other = uuid4(), uuid4()
    await ring.ensure([subject, other, subject])
    sealed = ring.seal(subject, TEXT, AAD)
    for who, what, aad in [
        (other, sealed, AAD),
        (subject, sealed, b"stream|2|content"),
        (subject, sealed[:-1] + bytes([sealed[-1] ^ 1]), AAD),
        (subject, b"\x02" + sealed[1:], AAD),
        (subject, sealed[:9], AAD),
        (subject, b"", AAD),
    ]:
        with pytest.raises(NotAuthentic):
            ring.open(who, what, aad)


async def test_a_destroyed_key_opens_and_seals_nothing_ever_again(ring: KeyRing) -> None:
    subject = uuid4()
    await ring.ensure([subject])
    sealed = ring.seal(subject, TEXT, AAD)
    await ring.destroy(subject)
    await ring.destroy(subject)
    await ring.ensure([subject])
    assert ring.open(subject, sealed, AAD) is None
    with pytest.raises(SubjectErased):
        ring.seal(subject, TEXT, AAD)


async def test_a_subject_destroyed_before_it_had_a_key_never_gets_one(ring: KeyRing) -> None:
    subject = uuid4()
    await ring.destroy(subject)
    await ring.ensure([subject])
    with pytest.raises(SubjectErased):
        ring.seal(subject, TEXT, AAD)


async def test_a_subject_nobody_asked_to_have_at_hand_is_a_bug_with_a_name(ring: KeyRing) -> None:
    with pytest.raises(KeyNotLoaded):
        ring.seal(uuid4(), TEXT, AAD)
    with pytest.raises(KeyNotLoaded):
        ring.open(uuid4(), b"", AAD)


async def test_processes_that_meet_a_subject_at_once_agree_on_its_key(tables: Pool) -> None:
    subjects = [uuid4() for _ in range(40)]
    rings = [PostgresKeyRing(tables, MASTER_KEY) for _ in range(8)]
    await asyncio.gather(
        *(ring.ensure(subjects[::step]) for ring, step in zip(rings, [1, -1] * 4, strict=True))
    )
    for subject in subjects:
        sealed = rings[0].seal(subject, TEXT, AAD)
        assert {ring.open(subject, sealed, AAD) for ring in rings} == {TEXT}


async def test_a_destruction_elsewhere_is_noticed_when_the_cached_key_has_aged(tables: Pool) -> None:
    subject = uuid4()
    aging, lasting = PostgresKeyRing(tables, MASTER_KEY, cache_ttl_s=0), PostgresKeyRing(tables, MASTER_KEY)
    for ring in (aging, lasting):
        await ring.ensure([subject])
    sealed = aging.seal(subject, TEXT, AAD)
    await PostgresKeyRing(tables, MASTER_KEY).destroy(subject)
    for ring in (aging, lasting):
        await ring.ensure([subject])
    assert aging.open(subject, sealed, AAD) is None
    assert lasting.open(subject, sealed, AAD) == TEXT
    lasting.forget(subject)
    await lasting.ensure([subject])
    assert lasting.open(subject, sealed, AAD) is None


async def test_the_cache_stays_within_its_limit_and_keeps_what_was_asked_for_last(tables: Pool) -> None:
    ring = PostgresKeyRing(tables, MASTER_KEY, cache_count_max=3)
    first, *others = [uuid4() for _ in range(4)]
    await ring.ensure([first])
    await ring.ensure(others)
    with pytest.raises(KeyNotLoaded):
        ring.seal(first, TEXT, AAD)
    await ring.ensure([first, *others[:2]])
    for subject in (first, *others[:2]):
        ring.seal(subject, TEXT, AAD)
    with pytest.raises(ValueError, match="4 subjects at once"):
        await ring.ensure([first, *others])


async def test_a_stored_key_is_of_no_use_without_the_master_key_or_in_another_row(tables: Pool) -> None:
    subject, thief = uuid4(), uuid4()
    await PostgresKeyRing(tables, MASTER_KEY).ensure([subject, thief])
    with pytest.raises(UnknownMasterKey):
        await PostgresKeyRing(tables, NEW_MASTER_KEY).ensure([subject])
    async with tables.connection() as connection:
        await connection.execute(
            "UPDATE data_key SET wrapped = (SELECT wrapped FROM data_key WHERE subject_id = %s)"
            " WHERE subject_id = %s",
            [subject, thief],
        )
    with pytest.raises(NotAuthentic):
        await PostgresKeyRing(tables, MASTER_KEY).ensure([thief])


async def test_the_master_key_is_replaced_while_the_ring_is_in_use(tables: Pool) -> None:
    old = PostgresKeyRing(tables, MASTER_KEY, [NEW_MASTER_KEY])
    subject, erased = uuid4(), uuid4()
    await old.ensure([subject, erased, *(uuid4() for _ in range(600))])
    sealed = old.seal(subject, TEXT, AAD)
    await old.destroy(erased)

    both = PostgresKeyRing(tables, NEW_MASTER_KEY, [MASTER_KEY])
    await both.ensure([subject])
    assert both.open(subject, sealed, AAD) == TEXT

    assert await rewrap(tables, [MASTER_KEY], NEW_MASTER_KEY) >= 601
    assert await rewrap(tables, [MASTER_KEY], NEW_MASTER_KEY) == 0

    new = PostgresKeyRing(tables, NEW_MASTER_KEY)
    await new.ensure([subject, erased])
    assert new.open(subject, sealed, AAD) == TEXT
    assert new.open(erased, sealed, AAD) is None
    old.forget(subject)
    await old.ensure([subject])
    assert old.open(subject, sealed, AAD) == TEXT


async def test_sealing_a_message_costs_microseconds(ring: KeyRing) -> None:
    subject = uuid4()
    await ring.ensure([subject])
    content = os.urandom(200)
    seconds = min(timeit.repeat(lambda: ring.seal(subject, content, AAD), number=2_000, repeat=5)) / 2_000
    assert seconds < 50e-6  # 3 µs on a quiet core; a shared one may take ten times that.
