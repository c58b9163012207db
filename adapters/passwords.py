"""Password hashes: argon2id with the parameters of OWASP's password storage cheat sheet."""

from __future__ import annotations

import asyncio
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

from domain.ports import Busy

MEMORY_KIB = 19 * 1024
TIME_COST = 2
PARALLELISM = 1
THREAD_COUNT = 2
WAITING_COUNT_MAX = 32
PASSWORD_CHARS_MAX = 1024

Result = TypeVar("Result")


class Argon2Passwords:
    """Hashes in two threads of its own, with a bounded queue: a flood of logins is refused, not queued."""

    def __init__(self, waiting_count_max: int = WAITING_COUNT_MAX) -> None:
        self._hasher = PasswordHasher(TIME_COST, MEMORY_KIB, PARALLELISM, type=Type.ID)
        self._nobody = self._hasher.hash(secrets.token_bytes(16))
        self._threads = ThreadPoolExecutor(THREAD_COUNT, thread_name_prefix="passwords")
        self._work_count_max = THREAD_COUNT + waiting_count_max
        self._work_count = 0

    async def hash(self, password: str) -> str:
        if not 0 < len(password) <= PASSWORD_CHARS_MAX:
            raise ValueError(f"a password has 1 to {PASSWORD_CHARS_MAX} characters, this one {len(password)}")
        return await self._in_thread(lambda: self._hasher.hash(_canonical(password)))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        possible = bool(password_hash) and len(password) <= PASSWORD_CHARS_MAX
        against = password_hash if possible and password_hash else self._nobody
        same = await self._in_thread(lambda: self._same(against, _canonical(password[:PASSWORD_CHARS_MAX])))
        return possible and same

    async def close(self) -> None:
        """Let the threads go; what waits is cancelled."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def _same(self, password_hash: str, password: bytes) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        if self._work_count >= self._work_count_max:
            raise Busy(f"{self._work_count} passwords are being hashed already")
        self._work_count += 1
        future = self._threads.submit(work)
        # Counted until the thread is done with it: a caller that went away does not make it free.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self._work_count -= 1


def _canonical(password: str) -> bytes:
    # The same password typed on two systems may arrive composed or decomposed (RFC 8265 §4.2.1).
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")
