"""What every vault keeps."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from adapters.crypto import NotAuthentic, UnknownMasterKey
from adapters.memory.vault import MemoryVault
from adapters.postgres.key_ring import Pool, rewrap
from adapters.postgres.vault import VAULT_KEYS, PostgresVault
from adapters.vault import SECRET_CHARS_MAX
from domain.ports import Vault
from tests.peers.secret_tables import tables

__all__ = ["tables"]

MASTER_KEY = bytes(range(32))
NEW_MASTER_KEY = bytes(range(32, 64))
SECRET = "sk-canary-0123456789"


@pytest.fixture(params=["memory", "postgres"])
def vault(request: pytest.FixtureRequest) -> Vault:
    if request.param == "memory":
        return MemoryVault()
    return PostgresVault(request.getfixturevalue("tables"), MASTER_KEY)


async def test_a_secret_is_got_by_its_reference_which_tells_nothing(vault: Vault) -> None:
    tenant = uuid4()
    ref = await vault.put(tenant, "custom_tool:weather:x-api-key", SECRET)
    assert await vault.get(tenant, ref) == SECRET
    kind, _, secret_id = ref.partition(":")
    assert kind == "vault"
    assert str(UUID(secret_id)) == secret_id


async def test_replacing_a_secret_keeps_its_reference(vault: Vault) -> None:
    tenant = uuid4()
    ref = await vault.put(tenant, "name", "first")
    assert await vault.put(tenant, "name", "second") == ref
    assert await vault.get(tenant, ref) == "second"


async def test_writers_of_one_name_leave_one_readable_secret(vault: Vault) -> None:
    tenant = uuid4()
    refs = set(await asyncio.gather(*(vault.put(tenant, "name", f"secret {n}") for n in range(10))))
    assert len(refs) == 1
    assert str(await vault.get(tenant, refs.pop())).startswith("secret ")


async def test_a_reference_of_another_tenant_gives_nothing_and_removes_nothing(vault: Vault) -> None:
    tenant, other = uuid4(), uuid4()
    ref = await vault.put(tenant, "name", SECRET)
    assert await vault.get(other, ref) is None
    await vault.remove(other, ref)
    assert await vault.get(tenant, ref) == SECRET


async def test_a_removed_secret_is_gone_and_its_reference_never_comes_back(vault: Vault) -> None:
    tenant = uuid4()
    ref = await vault.put(tenant, "name", SECRET)
    await vault.remove(tenant, ref)
    await vault.remove(tenant, ref)
    assert await vault.get(tenant, ref) is None
    assert await vault.put(tenant, "name", SECRET) != ref
    assert await vault.get(tenant, ref) is None


async def test_all_secrets_of_a_tenant_go_and_new_ones_may_come(vault: Vault) -> None:
    tenant, other = uuid4(), uuid4()
    refs = [await vault.put(tenant, f"name {n}", "secret") for n in range(3)]
    kept = await vault.put(other, "name", "theirs")
    await vault.remove_all(tenant)
    await vault.remove_all(tenant)
    assert [await vault.get(tenant, ref) for ref in refs] == [None, None, None]
    assert await vault.get(other, kept) == "theirs"
    assert await vault.get(tenant, await vault.put(tenant, "name 0", "new")) == "new"


@pytest.mark.parametrize(
    "ref", ["", "vault:", "vault:x", "vault:' OR 1=1", f"file:{UUID(int=1)}", f"vault:{UUID(int=1)} "]
)
async def test_what_is_no_reference_names_no_secret(vault: Vault, ref: str) -> None:
    assert await vault.get(uuid4(), ref) is None
    await vault.remove(uuid4(), ref)


async def test_a_secret_too_long_is_refused_without_repeating_it(vault: Vault) -> None:
    with pytest.raises(ValueError, match="at most") as refused:
        await vault.put(uuid4(), "name", SECRET * SECRET_CHARS_MAX)
    assert SECRET not in str(refused.value)


async def test_no_row_shows_a_secret_and_no_row_opens_in_anothers_place(tables: Pool) -> None:
    vault = PostgresVault(tables, MASTER_KEY)
    tenant = uuid4()
    first, second = await vault.put(tenant, "first", SECRET), await vault.put(tenant, "second", "other")
    async with tables.connection() as connection:
        cursor = await connection.execute("SELECT vault_secret::text, sealed FROM vault_secret")
        for text, sealed in await cursor.fetchall():
            assert SECRET not in text
            assert SECRET.encode() not in bytes(sealed)
        await connection.execute(
            "UPDATE vault_secret SET sealed = (SELECT sealed FROM vault_secret WHERE secret_id = %s)"
            " WHERE secret_id = %s",
            [UUID(first.removeprefix("vault:")), UUID(second.removeprefix("vault:"))],
        )
    with pytest.raises(NotAuthentic):
        await vault.get(tenant, second)


async def test_the_master_key_is_replaced_while_the_vault_is_in_use(tables: Pool) -> None:
    tenant = uuid4()
    ref = await PostgresVault(tables, MASTER_KEY).put(tenant, "name", SECRET)
    assert await PostgresVault(tables, NEW_MASTER_KEY, [MASTER_KEY]).get(tenant, ref) == SECRET
    assert await rewrap(tables, [MASTER_KEY], NEW_MASTER_KEY, VAULT_KEYS) >= 1
    assert await PostgresVault(tables, NEW_MASTER_KEY).get(tenant, ref) == SECRET
    with pytest.raises(UnknownMasterKey):
        await PostgresVault(tables, MASTER_KEY).get(tenant, ref)
