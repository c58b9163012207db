"""What every vault agrees on: the form of a `secret_ref`, the limits of a secret, what it is bound to."""

from __future__ import annotations

import re
from uuid import UUID

SECRET_CHARS_MAX = 65_536
NAME_CHARS_MAX = 500
_SECRET_REF = re.compile(r"vault:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


def secret_ref_of(secret_id: UUID) -> str:
    """The name under which commands, events and read models know a secret; it tells nothing about it."""
    return f"vault:{secret_id}"


def secret_id_of(secret_ref: str) -> UUID | None:
    """The id in a well-formed reference, None for anything else."""
    match = _SECRET_REF.fullmatch(secret_ref)
    return None if match is None else UUID(match[1])


def secret_aad(tenant_id: UUID, secret_id: UUID) -> bytes:
    """tenant|table|row|field: a sealed secret copied to another place does not open there."""
    return f"{tenant_id}|vault_secret|{secret_id}|sealed".encode()


def checked_secret(name: str, secret: str) -> bytes:
    """`secret` as bytes.

    Raises:
        ValueError: a name or a secret that cannot be stored; the message does not contain the secret.
    """
    if not name or len(name) > NAME_CHARS_MAX or "\x00" in name:
        raise ValueError(f"a secret's name has 1 to {NAME_CHARS_MAX} characters and no U+0000")
    if len(secret) > SECRET_CHARS_MAX:
        raise ValueError(f"secret {name!r} has {len(secret)} characters, at most {SECRET_CHARS_MAX} fit")
    return secret.encode()
