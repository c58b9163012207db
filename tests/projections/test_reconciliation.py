"""The auditor finds every fault, or Postgres refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from domain.money import ncr
from projections.reconciliation import Violation, reconcile
from tests.projections.world import PLENTY, World, all_applied, life_of, person, running

SETTLED = "shard, position) = (SELECT shard, position FROM event WHERE type = 'CreditAccount.CreditsSettled' LIMIT 1)"
CHANGE_PAYLOAD = "UPDATE event SET payload = convert_to({change}, 'UTF8') WHERE ({which}"
JSON = "convert_from(payload, 'UTF8')::jsonb"
OPEN_HOLD = "(SELECT hold_id FROM credit_hold LIMIT 1)"

# What somebody might do to the store, and the check that tells.
FAULTS: dict[str, tuple[str, str]] = {
    "a lost ledger row": (
        "DELETE FROM credit_ledger WHERE ctid = (SELECT ctid FROM credit_ledger WHERE amount_ncr = 0 OR true LIMIT 1)",
        "8 the ledger is what the events say",
    ),
    "a tampered pair of entries that still balances": (
        f"UPDATE credit_entry SET amount_ncr = amount_ncr + CASE WHEN leg = 0 THEN 1 WHEN leg = 1 THEN -1 ELSE 0 END"
        f" WHERE ({SETTLED}",
        "8 the entries are the events' postings",
    ),
    "a tampered pair of postings that still balances": (
        CHANGE_PAYLOAD.format(
            which=SETTLED,
            change=f"""jsonb_set(jsonb_set({JSON},
                '{{postings,0,amount_ncr}}', to_jsonb(({JSON} #>> '{{postings,0,amount_ncr}}')::bigint + 1)),
                '{{postings,1,amount_ncr}}', to_jsonb(({JSON} #>> '{{postings,1,amount_ncr}}')::bigint - 1))::text""",
        ),
        "2 balances follow from postings",
    ),
    "an edited balance": (
        "UPDATE credit_account SET available_ncr = available_ncr + 1",
        "8 the balances are what the events and the ledger say",
    ),
    "two edited balances that still sum": (
        "UPDATE credit_account SET available_ncr = available_ncr + 1, held_ncr = held_ncr - 1",
        "8 the balances are what the events and the ledger say",
    ),
    "a payment that was granted twice": (
        CHANGE_PAYLOAD.format(
            which="type) = ('CreditAccount.CreditsGranted')",
            change=f"jsonb_set({JSON}, '{{payment_ref}}', '\"pi\"')::text",
        ),
        "10 a payment is granted once",
    ),
    "a deleted event": (f"DELETE FROM event WHERE ({SETTLED}", "the log has no gap and nothing twice"),
    "a deleted last event": (
        "DELETE FROM event e USING shard s WHERE e.shard = s.shard AND e.position = s.head",
        "the log has no gap and nothing twice",
    ),
    "a doubled event at the end of the log": (
        f"""
        WITH head AS (UPDATE shard SET head = head + 1 WHERE head > 0 RETURNING shard, head)
        INSERT INTO event
        SELECT e.shard, h.head, tenant_id, stream_id,
               1 + (SELECT max(stream_version) FROM event v WHERE v.stream_id = e.stream_id), type, schema_version,
               payload, personal, subject_id, command_id, correlation_id, causation_id, actor, traceparent, recorded_at
          FROM event e JOIN head h USING (shard) WHERE ({SETTLED.replace("shard, position) =", "e.shard, e.position) =")}
        """,
        "4 a hold ends once",
    ),
    "an unbalanced event": (
        CHANGE_PAYLOAD.format(
            which=SETTLED, change=f"jsonb_set({JSON}, '{{postings,0,amount_ncr}}', '-1')::text"
        ),
        "1 postings sum to zero",
    ),
    "an overdraft in an event": (
        CHANGE_PAYLOAD.format(
            which=SETTLED, change=f"jsonb_set({JSON}, '{{available_after_ncr}}', '-1')::text"
        ),
        "2 nothing below zero",
    ),
    "an overdraft in a row": (
        "ALTER TABLE credit_account DROP CONSTRAINT credit_account_available_ncr_check;"
        " UPDATE credit_account SET available_ncr = -1",
        "2 nothing below zero",
    ),
    "a second free grant": (
        "DROP INDEX credit_grant_free_once; INSERT INTO credit_grant"
        " SELECT gen_random_uuid(), account_id, kind, granted_ncr, 0, granted_at FROM credit_grant WHERE kind = 'free'",
        "3 an id has one effect",
    ),
    "a line mispriced in the event": (
        CHANGE_PAYLOAD.format(
            which=SETTLED, change=f"jsonb_set({JSON}, '{{lines,0,unit_price_ncr}}', '1')::text"
        ),
        "7 a line is quantity times its card's price",
    ),
    "a line mispriced in the ledger": (
        "UPDATE credit_ledger SET unit_price_ncr = 1 WHERE kind = 'charge'",
        "7 a line is quantity times its card's price",
    ),
    "a line charged under another meter": (
        "UPDATE credit_ledger SET meter = 'api_call' WHERE kind = 'charge'",
        "8 the ledger is what the events say",
    ),
    "a hold closed without release": (
        f"DELETE FROM credit_hold WHERE hold_id = {OPEN_HOLD}",
        "6 open holds are the rows and sum to held",
    ),
    "a hold ended with less than was held": (
        CHANGE_PAYLOAD.format(
            which="type) = ('CreditAccount.HoldReleased')",
            change=f"jsonb_set({JSON}, '{{released_ncr}}', '1')::text",
        ),
        "4 a hold ends once",
    ),
    "more captured than held": (
        CHANGE_PAYLOAD.format(
            which=SETTLED, change=f"jsonb_set({JSON}, '{{captured_ncr}}', '{ncr('999')}')::text"
        ),
        "5 captured is at most held",
    ),
    "work without a hold": (
        CHANGE_PAYLOAD.format(
            which="type) = ('Turn.Accepted')",
            change=f"jsonb_set({JSON}, '{{hold_id}}', to_jsonb(gen_random_uuid()))::text",
        ),
        "9 no work without a hold",
    ),
    "a purchase that nobody asked for": (
        "DELETE FROM command USING event WHERE event.command_id = command.command_id"
        " AND event.type = 'CreditAccount.CreditsGranted'",
        "10 a grant was asked for by a recorded command",
    ),
    "a drifted grant": (
        "UPDATE credit_grant SET remaining_ncr = remaining_ncr + 1 WHERE kind = 'free'",
        "6 remaining grants sum to the settled balance",
    ),
    "a doubled ledger row": (
        "ALTER TABLE credit_ledger DROP CONSTRAINT credit_ledger_pkey; DROP INDEX credit_ledger_once_per_hold;"
        " INSERT INTO credit_ledger SELECT * FROM credit_ledger WHERE kind = 'charge' LIMIT 1",
        "8 the ledger is what the events say",
    ),
    "a ledger row too many": (
        "DROP INDEX credit_ledger_once_per_hold; INSERT INTO credit_ledger"
        " SELECT shard, position, 99, account_id, stream_version, tenant_id, kind, grant_kind, amount_ncr,"
        " balance_after_ncr, meter, quantity, unit_price_ncr, rate_card_id, tool, grant_id, hold_id, agent_id, turn_id,"
        " actor, recorded_at FROM credit_ledger WHERE kind = 'charge' LIMIT 1",
        "8 the ledger is what the events say",
    ),
    "edited usage": (
        "UPDATE usage SET quantity = quantity + 1",
        "8 usage is the sum of the events' lines",
    ),
    "revenue that no line explains": (
        CHANGE_PAYLOAD.format(which=SETTLED, change=f"jsonb_set({JSON}, '{{lines}}', '[]')::text"),
        "7 revenue is the sum of usage lines",
    ),
}

# What Postgres itself does not let happen.
REFUSED: dict[str, str] = {
    "an event twice in a shard": "INSERT INTO event SELECT * FROM event LIMIT 1",
    "a version twice in a stream": """
        INSERT INTO event SELECT shard, position + 1000000, tenant_id, stream_id, stream_version, type, schema_version,
               payload, personal, subject_id, command_id, correlation_id, causation_id, actor, traceparent, recorded_at
          FROM event LIMIT 1
    """,
    "an overdraft": "UPDATE credit_account SET available_ncr = -1",
    "held below zero": "UPDATE credit_account SET held_ncr = -1",
    "a grant below zero": "UPDATE credit_grant SET remaining_ncr = -1",
    "a second free grant": """
        INSERT INTO credit_grant
        SELECT gen_random_uuid(), account_id, kind, granted_ncr, 0, granted_at FROM credit_grant WHERE kind = 'free'
    """,
    "a grant twice": "INSERT INTO credit_grant SELECT * FROM credit_grant LIMIT 1",
    "a ledger row twice": "INSERT INTO credit_ledger SELECT * FROM credit_ledger LIMIT 1",
    "a charge of the same hold twice": """
        INSERT INTO credit_ledger
        SELECT shard, position + 1000000, line, account_id, stream_version, tenant_id, kind, grant_kind, amount_ncr,
               balance_after_ncr, meter, quantity, unit_price_ncr, rate_card_id, tool, grant_id, hold_id, agent_id,
               turn_id, actor, recorded_at FROM credit_ledger WHERE kind = 'charge' LIMIT 1
    """,
}


@dataclass
class Undone:
    """Lets the auditor look at what a transaction has done that will be undone."""

    connection: psycopg.AsyncConnection[Any]

    @asynccontextmanager
    async def snapshot(self, limit_s: float) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        yield self.connection


async def audited_after(world: World, fault: str) -> list[Violation]:
    async with world.pool.connection() as connection, connection.transaction(force_rollback=True):
        for statement in fault.split(";"):
            await connection.execute(statement.encode(), prepare=False)
        return await reconcile(Undone(connection))


async def test_every_fault_is_found_or_refused(world: World) -> None:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        someone = person(world, 1)
        await life_of(someone)
        await someone.asks("Is this one still open?", conversation=None)
        await all_applied(world, runner)
    assert await reconcile(world.db(runner)) == []
    for fault, (statements, check) in FAULTS.items():
        found = await audited_after(world, statements)
        assert check in {violation.check for violation in found}, f"{fault}: {found}"
    for fault, statement in REFUSED.items():
        with pytest.raises(psycopg.IntegrityError):
            await world.query(statement)
            pytest.fail(f"Postgres took {fault}")
    assert await reconcile(world.db(runner)) == []


async def test_a_charge_beyond_the_balance_is_booked_as_uncollected(world: World) -> None:
    runner = world.runner()
    world.bus.on_commit = runner.offer
    async with running(runner):
        someone = person(world, 1)
        await someone.signs_up()
        await someone.makes_agent()
        late = await someone.asks("late")
        await someone.model_starts(late)
        await someone.model_says(late, "Done.")
        await someone.hold_expires(late)
        rest = (PLENTY.free_credits_ncr - ncr("1.5")) // ncr("3")
        await asyncio.gather(*(someone.is_answered(f"{n}", "yes") for n in range(rest)))
        await someone.settles(late, "message")
        await all_applied(world, runner)
        lines = await world.query(
            "SELECT kind, amount_ncr, balance_after_ncr FROM credit_ledger ORDER BY position, line"
        )
        assert lines[-2:] == [("uncollected", ncr("1.5"), ncr("3")), ("charge", -ncr("3"), 0)]
        assert sum(amount for _, amount, _ in lines) == 0
        assert await reconcile(world.db(runner)) == []
