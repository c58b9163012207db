"""The auditor: proves over the whole store what must always be true of credits (billing reference, laws 1 to 10).

Reads the events as they were recorded and compares them with each other and with every row the read models made of
them. One violation for each thing that is not as it must be; no violation means that all of it was proven.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.resources import files
from typing import Protocol

from projections.read_side import Connection

LIMIT_S = 600.0
SHOWN_MAX = 1_000  # violations of one check


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be. `key` names the row or event, `detail` what is wrong with it."""

    check: str
    key: str
    detail: str


class Snapshots(Protocol):
    """What the auditor needs of a `ReadSide`."""

    def snapshot(self, limit_s: float) -> AbstractAsyncContextManager[Connection]:
        """A connection that sees one instant, and whose writes are undone."""


# Each query gives (key, detail) of what violates it.
CHECKS: dict[str, str] = {
    "the log has no gap and nothing twice": """
        SELECT s.shard::text, format('head %s, %s events, %s positions, last %s', s.head, e.n, e.positions, e.last)
          FROM shard s LEFT JOIN LATERAL (
               SELECT count(*) n, count(DISTINCT position) positions, coalesce(max(position), 0) AS last
                 FROM event WHERE event.shard = s.shard) e ON true
         WHERE (e.n, e.positions, e.last) IS DISTINCT FROM (s.head, s.head, s.head)
    """,
    "an account's events follow each other": """
        SELECT account_id::text, format('%s events, versions %s to %s', count(*), min(version), max(version)) FROM moved
         GROUP BY account_id HAVING (min(version), max(version)::bigint) <> (1, count(*))
    """,
    "1 postings sum to zero": """
        SELECT shard || ':' || position, sum(amount_ncr)::text FROM posting GROUP BY shard, position
        HAVING sum(amount_ncr) <> 0
        UNION ALL
        SELECT shard || ':' || position, 'entries ' || sum(amount_ncr) FROM credit_entry GROUP BY shard, position
        HAVING sum(amount_ncr) <> 0
    """,
    "2 nothing below zero": """
        SELECT shard || ':' || position, format('available %s, held %s', p ->> 'available_after_ncr', p ->> 'held_after_ncr')
          FROM moved WHERE (p ->> 'available_after_ncr')::bigint < 0 OR (p ->> 'held_after_ncr')::bigint < 0
        UNION ALL
        SELECT account_id::text, format('available %s, held %s', available_ncr, held_ncr)
          FROM credit_account WHERE available_ncr < 0 OR held_ncr < 0
    """,
    "2 balances follow from postings": """
        SELECT shard || ':' || position, format('available %s, must be %s; held %s, must be %s', available, a, held, h)
          FROM (SELECT m.shard, m.position, (m.p ->> 'available_after_ncr')::numeric available,
                       (m.p ->> 'held_after_ncr')::numeric held,
                       sum(coalesce(x.a, 0)) OVER w AS a, sum(coalesce(x.h, 0)) OVER w AS h
                  FROM moved m LEFT JOIN (
                       SELECT shard, position, sum(amount_ncr) FILTER (WHERE book = 'available') a,
                              sum(amount_ncr) FILTER (WHERE book = 'held') h
                         FROM posting GROUP BY shard, position) x USING (shard, position)
                 WHERE m.p ? 'available_after_ncr'
                WINDOW w AS (PARTITION BY m.account_id ORDER BY m.version)) b
         WHERE (available, held) IS DISTINCT FROM (a, h)
    """,
    "3 an id has one effect": """
        SELECT hold_id::text, 'held ' || begins || ' times' FROM held WHERE begins <> 1
        UNION ALL
        SELECT p ->> 'extension_id', 'extended ' || count(*) || ' times' FROM moved WHERE type = 'HoldExtended'
         GROUP BY account_id, p ->> 'hold_id', p ->> 'extension_id' HAVING count(*) > 1
        UNION ALL
        SELECT grant_id::text, 'granted ' || given || ' times' FROM granted WHERE given <> 1
        UNION ALL
        SELECT grant_id, 'granted to ' || count(*) || ' rows' FROM (
               SELECT grant_id::text FROM credit_grant) g GROUP BY grant_id HAVING count(*) > 1
        UNION ALL
        SELECT account_id::text, count(*) || ' free grants' FROM moved
         WHERE type = 'CreditsGranted' AND p #>> '{grant,kind}' = 'free' GROUP BY account_id HAVING count(*) > 1
        UNION ALL
        SELECT account_id::text, count(*) || ' rows of free grants' FROM credit_grant WHERE kind = 'free'
         GROUP BY account_id HAVING count(*) > 1
    """,
    "4 a hold ends once": """
        SELECT hold_id::text, format('%s ends, %s expiries, %s late charges', ends, expiries, late_charges) FROM held
         WHERE ends > 1 OR late_charges > expiries
        UNION ALL
        SELECT h.hold_id::text, format('held %s ncr, captured %s, released %s', amount_ncr, captured_ncr, released_ncr)
          FROM held h WHERE ends = 1 AND captured_ncr + released_ncr <> amount_ncr
    """,
    "5 captured is at most held": """
        SELECT hold_id::text, format('held %s ncr, captured %s', amount_ncr, captured_ncr) FROM held
         WHERE captured_ncr > amount_ncr
    """,
    "6 open holds are the rows and sum to held": """
        SELECT coalesce(e.hold_id, h.hold_id)::text, format('events %s, row %s', e.amount_applied_ncr, h.amount_ncr)
          FROM (SELECT * FROM held WHERE applied AND ends_applied = 0) e FULL JOIN credit_hold h USING (hold_id)
         WHERE (e.amount_applied_ncr, e.account_id) IS DISTINCT FROM (h.amount_ncr::numeric, h.account_id)
        UNION ALL
        SELECT a.account_id::text, format('held %s, open holds %s', a.held_ncr, coalesce(sum(h.amount_ncr), 0))
          FROM credit_account a LEFT JOIN credit_hold h USING (account_id) GROUP BY a.account_id, a.held_ncr
        HAVING a.held_ncr <> coalesce(sum(h.amount_ncr), 0)
    """,
    "6 remaining grants sum to the settled balance": """
        SELECT coalesce(e.grant_id, g.grant_id)::text, format('events %s, row %s', e.remaining_ncr, g.remaining_ncr)
          FROM granted e FULL JOIN credit_grant g USING (grant_id)
         WHERE (e.remaining_ncr, e.account_id, e.kind) IS DISTINCT FROM (g.remaining_ncr::numeric, g.account_id, g.kind)
        UNION ALL
        SELECT a.account_id::text,
               format('settled %s, grants %s', a.available_ncr + a.held_ncr, coalesce(sum(g.remaining_ncr), 0))
          FROM credit_account a LEFT JOIN credit_grant g USING (account_id)
         GROUP BY a.account_id, a.available_ncr, a.held_ncr
        HAVING a.available_ncr + a.held_ncr <> coalesce(sum(g.remaining_ncr), 0)
    """,
    "7 revenue is the sum of usage lines": """
        SELECT shard || ':' || position, format('revenue %s, lines %s', coalesce(r.ncr, 0), coalesce(c.ncr, 0))
          FROM (SELECT shard, position, sum(amount_ncr) ncr FROM posting WHERE book = 'revenue' GROUP BY 1, 2) r
          FULL JOIN (SELECT shard, position, sum(quantity * unit_price_ncr) ncr FROM charge GROUP BY 1, 2) c
         USING (shard, position) WHERE coalesce(r.ncr, 0) <> coalesce(c.ncr, 0)
    """,
    "7 a line is quantity times its card's price": """
        SELECT c.shard || ':' || c.position || '/' || c.line,
               format('%s: %s ncr, the card says %s', c.meter, c.unit_price_ncr, r.unit_price_ncr)
          FROM charge c LEFT JOIN rate_card r USING (rate_card_id, meter)
         WHERE r.unit_price_ncr IS DISTINCT FROM c.unit_price_ncr OR c.quantity < 0
        UNION ALL
        SELECT l.shard || ':' || l.position || '/' || l.line,
               format('row: %s of %s for %s ncr, the card says %s', l.quantity, l.meter, -l.amount_ncr, r.unit_price_ncr)
          FROM credit_ledger l LEFT JOIN rate_card r USING (rate_card_id, meter)
         WHERE l.kind = 'charge'
           AND (l.unit_price_ncr, -l.amount_ncr) IS DISTINCT FROM (r.unit_price_ncr, l.quantity * r.unit_price_ncr)
    """,
    "8 the ledger is what the events say": """
        SELECT format('%s:%s/%s', coalesce(e.shard, l.shard), coalesce(e.position, l.position), coalesce(e.line, l.line)),
               format('events %s %s, row %s %s', e.kind, e.amount_ncr, l.kind, l.amount_ncr)
          FROM expected e FULL JOIN credit_ledger l USING (shard, position, line)
         WHERE (e.account_id, e.kind, e.amount_ncr, e.meter, e.quantity, e.balance_after_ncr) IS DISTINCT FROM
               (l.account_id, l.kind, l.amount_ncr, l.meter, l.quantity, l.balance_after_ncr::numeric)
        UNION ALL
        SELECT format('%s:%s/%s', shard, position, line), count(*) || ' rows' FROM credit_ledger
         GROUP BY shard, position, line HAVING count(*) > 1
    """,
    "8 the entries are the events' postings": """
        SELECT format('%s:%s/%s', coalesce(p.shard, e.shard), coalesce(p.position, e.position), coalesce(p.leg, e.leg)),
               format('events %s %s, row %s %s', p.book, p.amount_ncr, e.book, e.amount_ncr)
          FROM (SELECT * FROM posting WHERE applied) p FULL JOIN credit_entry e USING (shard, position, leg)
         WHERE (p.account_id, p.book, p.amount_ncr) IS DISTINCT FROM (e.account_id, e.book, e.amount_ncr)
        UNION ALL
        SELECT format('%s:%s/%s', shard, position, leg), count(*) || ' rows' FROM credit_entry
         GROUP BY shard, position, leg HAVING count(*) > 1
    """,
    "8 the balances are what the events and the ledger say": """
        SELECT coalesce(a.account_id, e.account_id)::text,
               format('row %s + %s, events %s + %s, ledger %s', a.available_ncr, a.held_ncr, e.available, e.held, l.ncr)
          FROM credit_account a
          FULL JOIN (SELECT account_id, coalesce(sum(amount_ncr) FILTER (WHERE book = 'available'), 0) available,
                            coalesce(sum(amount_ncr) FILTER (WHERE book = 'held'), 0) held
                       FROM moved LEFT JOIN posting USING (shard, position, account_id)
                      WHERE moved.applied GROUP BY account_id) e USING (account_id)
          LEFT JOIN (SELECT account_id, sum(amount_ncr) ncr FROM credit_ledger GROUP BY account_id) l USING (account_id)
         WHERE (a.available_ncr::numeric, a.held_ncr::numeric, (a.available_ncr + a.held_ncr)::numeric)
               IS DISTINCT FROM (e.available, e.held, coalesce(l.ncr, 0))
    """,
    "8 usage is the sum of the events' lines": """
        SELECT format('%s %s %s %s %s', tenant_id, day, meter, agent_id, actor),
               format('events %s for %s ncr, row %s for %s', e.quantity, e.ncr, u.quantity, u.charged_ncr)
          FROM (SELECT tenant_id, (recorded_at AT TIME ZONE 'UTC')::date AS day, meter,
                       coalesce(agent_id, '00000000-0000-0000-0000-000000000000') AS agent_id, actor,
                       sum(quantity) AS quantity, sum(quantity * unit_price_ncr) AS ncr
                  FROM charge WHERE counted GROUP BY 1, 2, 3, 4, 5) e
          FULL JOIN usage u USING (tenant_id, day, meter, agent_id, actor)
         WHERE (e.quantity, e.ncr) IS DISTINCT FROM (u.quantity::numeric, u.charged_ncr::numeric)
    """,
    "9 no work without a hold": """
        SELECT w.stream_id::text, 'the turn has no hold' FROM worked w
         WHERE w.type = 'Turn.Accepted'
           AND NOT EXISTS (SELECT 1 FROM held h WHERE h.hold_id = (w.p ->> 'hold_id')::uuid AND h.begins > 0)
        UNION ALL
        SELECT w.stream_id::text, 'tool call ' || (w.p ->> 'tool_call_id') || ' has no hold' FROM worked w
          JOIN worked t ON t.stream_id = w.stream_id AND t.type = 'Turn.Accepted' AND t.p ->> 'invoked' = 'false'
         WHERE w.type = 'Turn.ToolCallStarted' AND w.p ->> 'attempt' = '1'
           AND NOT EXISTS (SELECT 1 FROM moved m WHERE m.type = 'HoldExtended' AND m.shard = w.shard
                              AND m.p ->> 'extension_id' = w.p ->> 'tool_call_id')
        UNION ALL
        SELECT w.stream_id::text, 'the agent was not paid for' FROM worked w
         WHERE w.type = 'Agent.Created'
           AND NOT EXISTS (SELECT 1 FROM charge c WHERE c.meter = 'agent_create' AND c.agent_id = w.stream_id)
    """,
    "9 a turn is charged what it came to": """
        SELECT w.stream_id::text, format('the turn came to %s ncr, charged %s', w.p ->> 'charged_ncr', c.ncr) FROM worked w
          JOIN (SELECT m.p ->> 'hold_id' AS hold_id, sum((m.p ->> 'captured_ncr')::bigint
                       + coalesce((m.p ->> 'uncollected_ncr')::bigint, 0)) AS ncr
                  FROM moved m WHERE m.type IN ('CreditsSettled', 'LateCharge') GROUP BY 1) c
            ON c.hold_id = w.p ->> 'hold_id'
         WHERE w.type IN ('Turn.Completed', 'Turn.Failed', 'Turn.TimedOut', 'Turn.Cancelled')
           AND (w.p ->> 'charged_ncr')::bigint <> c.ncr
    """,
    "10 a grant was asked for by a recorded command": """
        SELECT m.p #>> '{grant,grant_id}', m.p #>> '{grant,kind}' FROM moved m
          LEFT JOIN command c ON c.shard = m.shard AND c.command_id = m.command_id AND c.outcome = 'accepted'
         WHERE m.type = 'CreditsGranted' AND c.command_id IS NULL
    """,
    "10 a payment is granted once": """
        SELECT p ->> 'payment_ref', 'granted ' || count(*) || ' times' FROM moved
         WHERE type = 'CreditsGranted' AND p ->> 'payment_ref' IS NOT NULL GROUP BY 1 HAVING count(*) > 1
    """,
    "no stream of the ledger waits": """
        SELECT projection || ' ' || stream_id, error FROM parked WHERE projection IN ('credit_ledger', 'usage')
    """,
}


async def reconcile(db: Snapshots) -> list[Violation]:
    """Everything that violates a law, in the order of `CHECKS`; at most `SHOWN_MAX` of each.

    Sees one instant of the whole store, and may run beside everything else.

    Raises:
        ReadSideUnavailable: nothing was proven.
    """
    found: list[Violation] = []
    script = files(__package__).joinpath("reconciliation.sql").read_text("utf-8")
    async with db.snapshot(LIMIT_S) as connection:
        await connection.execute(script.encode(), prepare=False)
        for check, query in CHECKS.items():
            cursor = await connection.execute(
                f"SELECT * FROM ({query}) v LIMIT {SHOWN_MAX}".encode(), prepare=False
            )
            found += [Violation(check, key, detail) for key, detail in await cursor.fetchall()]
    return found
