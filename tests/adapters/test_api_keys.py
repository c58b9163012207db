from __future__ import annotations

import pytest

from adapters.api_keys import HmacApiKeys
from domain.ports import ApiKeys, KeyKind

OLD, NEW = bytes(32), bytes(range(32))
KEYS: ApiKeys = HmacApiKeys(OLD)


@pytest.mark.parametrize("kind", ["user", "agent"])
def test_a_minted_key_parses_into_its_parts(kind: KeyKind) -> None:
    for _ in range(200):
        key_id, key = KEYS.mint(kind)
        parsed = KEYS.parse(key)
        assert parsed is not None
        assert parsed[:2] == (kind, key_id)
        assert key == f"osh_{kind}_{key_id}_{parsed[2]}"
        assert len(parsed[2]) == 43


def test_no_two_keys_are_alike() -> None:
    assert len({KEYS.mint("user") for _ in range(500)}) == 500


KEY = "osh_user_abcdefgh01234567_" + "A" * 43


@pytest.mark.parametrize(
    "text",
    [
        *["", "osh_", "null", "Bearer " + KEY, KEY + " ", KEY + "\n", KEY[:-1], KEY + "A", KEY.upper()],
        KEY.replace("user", "admin"),
        KEY.replace("abcd", "ab'--"),
        KEY.replace("abcd", "ABCD"),
        KEY.replace("AAAA", "AA_A"),
        KEY.replace("0", "٠"),
        "x" * 1_000_000,
    ],
)
def test_what_cannot_be_a_key_is_refused_by_its_form(text: str) -> None:
    assert KEYS.parse(KEY) is not None
    assert KEYS.parse(text) is None


def test_a_key_matches_its_own_digest_under_its_own_pepper_only() -> None:
    _, key = KEYS.mint("agent")
    _, other = KEYS.mint("agent")
    stored = KEYS.digest(key)
    assert len(bytes.fromhex(stored)) == 32
    assert KEYS.matches(key, stored)
    assert not HmacApiKeys(NEW).matches(key, stored)
    assert not KEYS.matches(other, stored)
    for nothing in (None, "", "é", stored[:-1], stored.upper()):
        assert not KEYS.matches(key, nothing)


def test_keys_go_on_working_while_and_after_the_master_key_is_replaced() -> None:
    replaced = HmacApiKeys(NEW, [OLD])
    _, key = KEYS.mint("user")
    assert replaced.matches(key, KEYS.digest(key))
    assert replaced.digest(key) == HmacApiKeys(NEW).digest(key) != KEYS.digest(key)
