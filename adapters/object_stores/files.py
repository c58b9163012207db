"""Objects as files below one folder: the object store of a single machine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from adapters.object_stores import checked_key

THREAD_COUNT = 4
ABANDONED_AFTER_S = 3600.0
INCOMING = ".incoming"
SUFFIX = ".object"  # Keys have no dot: no object's file can be another object's folder, or lie in INCOMING.

Result = TypeVar("Result")


class FileObjectStore:
    """Each object is one file, complete or absent: written aside, fsynced, renamed, its folder fsynced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._threads = ThreadPoolExecutor(THREAD_COUNT, thread_name_prefix="object-store")

    async def put(self, key: str, content: bytes) -> None:
        path = self._path(key)
        await self._in_thread(lambda: self._write(path, content))

    async def get(self, key: str) -> bytes | None:
        path = self._path(key)
        return await self._in_thread(lambda: _read(path))

    async def delete(self, key: str) -> None:
        path = self._path(key)
        await self._in_thread(lambda: _remove(path))

    async def sweep(self) -> int:
        """Remove what writers left behind that died more than an hour ago; how many files that were."""
        return await self._in_thread(self._remove_abandoned)

    async def close(self) -> None:
        """Wait for what is being written and let the threads go."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _path(self, key: str) -> Path:
        return self._root / (checked_key(key) + SUFFIX)

    def _write(self, path: Path, content: bytes) -> None:
        self._make_folder(self._root / INCOMING)
        self._make_folder(path.parent)
        aside = self._root / INCOMING / uuid4().hex
        try:
            with aside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        if folder != self._root:
            self._make_folder(folder.parent)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sync_folder(folder.parent)

    def _remove_abandoned(self) -> int:
        folder = self._root / INCOMING
        if not folder.is_dir():
            return 0
        old = [file for file in folder.iterdir() if file.stat().st_mtime < time.time() - ABANDONED_AFTER_S]
        for file in old:
            file.unlink(missing_ok=True)
        return len(old)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
