from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from adapters.crypto import (
    KEY_BYTES,
    MasterKey,
    NotAuthentic,
    UnknownMasterKey,
    derive,
    new_key,
    seal,
    unseal,
)

MASTER = bytes(range(32))


@given(st.binary(max_size=300), st.binary(max_size=50))
def test_whatever_was_sealed_opens_with_its_key_and_its_associated_data(plaintext: bytes, aad: bytes) -> None:
    cipher = AESGCM(new_key())
    assert unseal(cipher, seal(cipher, plaintext, aad), aad) == plaintext


@given(st.binary(max_size=80))
def test_bytes_nobody_sealed_never_open(sealed: bytes) -> None:
    with pytest.raises(NotAuthentic):
        unseal(AESGCM(bytes(32)), sealed, b"")


def test_labels_give_keys_of_their_own() -> None:
    keys = {derive(MASTER, label) for label in ("a", "b", "")} | {MASTER}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {KEY_BYTES}


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_master_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        MasterKey(bytes(length))


def test_old_and_new_master_keys_work_side_by_side() -> None:
    old, new = MasterKey(MASTER), MasterKey(bytes(32), [MASTER])
    wrapped = old.wrap(b"k" * 32, b"row 1")
    assert new.unwrap(wrapped, b"row 1") == b"k" * 32
    assert old.wrapped(wrapped)
    assert not new.wrapped(wrapped)
    with pytest.raises(UnknownMasterKey):
        old.unwrap(new.wrap(b"k" * 32, b"row 1"), b"row 1")
    with pytest.raises(NotAuthentic):
        new.unwrap(wrapped, b"row 2")
