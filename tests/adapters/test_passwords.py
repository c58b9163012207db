from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from adapters.passwords import PASSWORD_CHARS_MAX, Argon2Passwords
from domain.ports import Busy

PASSWORD = "correct horse battery staple"


@pytest.fixture
async def passwords() -> AsyncIterator[Argon2Passwords]:
    hasher = Argon2Passwords()
    yield hasher
    await hasher.close()


async def test_a_password_verifies_against_its_own_hash_only(passwords: Argon2Passwords) -> None:
    stored = await passwords.hash(PASSWORD)
    assert PASSWORD not in stored
    assert await passwords.verify(stored, PASSWORD)
    assert not await passwords.verify(stored, PASSWORD + " ")
    assert not await passwords.verify(stored, "")


async def test_hashes_are_argon2id_with_19_mib_and_two_passes(passwords: Argon2Passwords) -> None:
    assert (await passwords.hash(PASSWORD)).startswith("$argon2id$v=19$m=19456,t=2,p=1$")


async def test_nobodys_password_never_verifies_and_takes_as_long(passwords: Argon2Passwords) -> None:
    stored = await passwords.hash(PASSWORD)

    async def fastest_s(password_hash: str | None) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert not await passwords.verify(password_hash, "wrong")
            times.append(time.perf_counter() - start)
        return min(times)

    known_s, unknown_s = await fastest_s(stored), await fastest_s(None)
    assert 0.3 < unknown_s / known_s < 3
    assert not await passwords.verify(None, "the password of an unknown user")


@pytest.mark.parametrize("stored", ["", "plain", "$argon2id$v=19$m=19456,t=2,p=1$", "$2b$12$abc"])
async def test_what_is_no_hash_matches_nothing(passwords: Argon2Passwords, stored: str) -> None:
    assert not await passwords.verify(stored, "")
    assert not await passwords.verify(stored, "the password of an unknown user")


async def test_accents_may_be_typed_composed_or_not(passwords: Argon2Passwords) -> None:
    stored = await passwords.hash("caf\u00e9")
    assert await passwords.verify(stored, "cafe\u0301")


async def test_odd_and_long_passwords_are_no_accident(passwords: Argon2Passwords) -> None:
    stored = await passwords.hash("\ud800\x00🦊")
    assert await passwords.verify(stored, "\ud800\x00🦊")
    longest = await passwords.hash("x" * PASSWORD_CHARS_MAX)
    assert not await passwords.verify(longest, "x" * (PASSWORD_CHARS_MAX + 1))
    with pytest.raises(ValueError, match="1 to 1024"):
        await passwords.hash("x" * (PASSWORD_CHARS_MAX + 1))


async def test_more_logins_than_may_wait_are_refused_at_once() -> None:
    passwords = Argon2Passwords(waiting_count_max=1)
    outcomes = await asyncio.gather(*(passwords.hash(PASSWORD) for _ in range(6)), return_exceptions=True)
    assert sum(isinstance(outcome, Busy) for outcome in outcomes) == 3
    assert await passwords.hash(PASSWORD)
    await passwords.close()
