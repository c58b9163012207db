"""People are forgotten: logins, sessions and secrets are removed, and the keys to their texts destroyed.

Carried out from the due row that asking for it wrote; asks for `CompleteErasure`. Safe to repeat from the beginning:
what is gone stays gone.
"""

from __future__ import annotations

from commands.bus import LATEST
from commands.user import CompleteErasure
from domain.ids import UserId, derived
from domain.user import User
from stream_processors.processor import Erasing, Work

KEYS_DESTROYED = 2  # of the texts in the log, and of the secrets in the vault


async def erase(user_id: UserId, work: Work) -> None:
    """Forget a person who has asked for it."""
    if work.erasing is None:
        return
    user = await work.bus.read(User, user_id, user_id, LATEST)
    if user.erasure != "requested":
        return
    await forget(user_id, work.erasing)
    command = CompleteErasure(tenant_id=user_id, destroyed_keys=KEYS_DESTROYED)
    await work.ask(command, derived(user_id, "erased"), user_id)


async def forget(user_id: UserId, erasing: Erasing) -> None:
    """Remove what is outside the log, and make what is personal in it unreadable."""
    await erasing.logins.forget(user_id)
    await erasing.sessions.end_all(user_id)
    await erasing.vault.remove_all(user_id)
    await erasing.keys.destroy(user_id)
