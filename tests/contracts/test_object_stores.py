"""What every object store keeps."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.memory.object_store import MemoryObjectStore
from adapters.object_stores import BadObjectKey
from adapters.object_stores.files import ABANDONED_AFTER_S, INCOMING, FileObjectStore
from domain.ports import ObjectStore

KEY = "payloads/ab/abcdef_01-2"


@pytest.fixture(params=["files", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    if request.param == "memory":
        yield MemoryObjectStore()
        return
    files = FileObjectStore(tmp_path / "objects")
    yield files
    await files.close()


async def test_what_was_put_is_got(store: ObjectStore) -> None:
    await store.put(KEY, b"\x00bytes\xff")
    assert await store.get(KEY) == b"\x00bytes\xff"


async def test_an_unknown_key_gives_none(store: ObjectStore) -> None:
    assert await store.get(KEY) is None


async def test_putting_the_same_object_twice_is_harmless(store: ObjectStore) -> None:
    await asyncio.gather(*(store.put(KEY, b"same") for _ in range(20)))
    assert await store.get(KEY) == b"same"


async def test_a_deleted_object_is_gone_and_deleting_it_again_is_harmless(store: ObjectStore) -> None:
    await store.put(KEY, b"bytes")
    await store.delete(KEY)
    await store.delete(KEY)
    assert await store.get(KEY) is None


async def test_an_object_may_be_named_like_another_objects_folder(store: ObjectStore) -> None:
    await store.put("a/b", b"short")
    await store.put("a/b/c", b"long")
    await store.put("a", b"shortest")
    assert [await store.get(key) for key in ("a", "a/b", "a/b/c")] == [b"shortest", b"short", b"long"]


@pytest.mark.parametrize(
    "key",
    [
        *["", "/", "/a", "a/", "a//b", "..", "../a", "a/../b", "a.b", ".incoming/a"],
        *["A", "ä", "a b", "a\n", "a\x00", "a\\b", "a" * 129, "/".join(["a" * 100] * 6)],
    ],
)
async def test_a_key_that_could_leave_the_store_is_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(BadObjectKey):
        await store.put(key, b"bytes")
    with pytest.raises(BadObjectKey):
        await store.get(key)
    with pytest.raises(BadObjectKey):
        await store.delete(key)


async def test_files_left_by_a_writer_that_died_are_swept_and_fresh_ones_are_not(tmp_path: Path) -> None:
    store = FileObjectStore(tmp_path)
    incoming = tmp_path / INCOMING
    incoming.mkdir()
    (incoming / "old").write_bytes(b"half")
    (incoming / "new").write_bytes(b"half")
    long_ago = time.time() - ABANDONED_AFTER_S - 1
    os.utime(incoming / "old", (long_ago, long_ago))
    assert await store.sweep() == 1
    assert [file.name for file in incoming.iterdir()] == ["new"]
    await store.close()


async def test_nothing_is_left_aside_after_a_put(tmp_path: Path) -> None:
    store = FileObjectStore(tmp_path)
    await store.put(KEY, b"bytes")
    assert list((tmp_path / INCOMING).iterdir()) == []
    await store.close()
