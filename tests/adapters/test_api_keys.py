from __future__ import annotations

import pytest

from adapters.api_keys import DIGEST_BYTES, KeyKind, digest, matches, mint, parse, pepper_of

PEPPER, OTHER_PEPPER = pepper_of(bytes(32)), pepper_of(bytes(range(32)))


@pytest.mark.parametrize("kind", ["user", "agent"])
def test_a_minted_key_parses_into_its_parts(kind: KeyKind) -> None:
    for _ in range(200):
        key_id, key = mint(kind)
        parsed = parse(key)
        assert parsed is not None
        assert parsed[:2] == (kind, key_id)
        assert key == f"osh_{kind}_{key_id}_{parsed[2]}"
        assert len(parsed[2]) == 43


def test_no_two_keys_are_alike() -> None:
    assert len({mint("user") for _ in range(500)}) == 500


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
    assert parse(KEY) is not None
    assert parse(text) is None


def test_a_key_matches_its_own_digest_under_its_own_pepper_only() -> None:
    _, key = mint("agent")
    _, other = mint("agent")
    stored = digest(PEPPER, key)
    assert len(stored) == DIGEST_BYTES
    assert matches([PEPPER], key, stored)
    assert matches([OTHER_PEPPER, PEPPER], key, stored)
    assert not matches([OTHER_PEPPER], key, stored)
    assert not matches([PEPPER], other, stored)
    assert not matches([PEPPER], key, None)
    assert not matches([PEPPER], key, b"")
    assert not matches([], key, stored)


def test_the_pepper_does_not_tell_the_master_key() -> None:
    assert PEPPER not in (bytes(32), OTHER_PEPPER)
