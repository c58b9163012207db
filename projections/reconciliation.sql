-- What `reconcile` looks at, all of one instant: the credit events as they were recorded, taken apart.
-- `applied` says whether the read models have seen the event already; rows are compared for those only.

CREATE TEMP TABLE moved ON COMMIT DROP AS
SELECT e.shard, e.position, e.stream_id AS account_id, e.stream_version AS version, e.tenant_id, e.command_id,
       e.recorded_at, substr(e.type, 15) AS type, convert_from(e.payload, 'UTF8')::jsonb AS p,
       e.position <= coalesce((SELECT c.positions[e.shard + 1] FROM checkpoint c
                                WHERE c.projection = 'credit_ledger'), 0) AS applied,
       e.position <= coalesce((SELECT c.positions[e.shard + 1] FROM checkpoint c
                                WHERE c.projection = 'usage'), 0) AS counted
  FROM event e WHERE e.type LIKE 'CreditAccount.%';

CREATE TEMP TABLE posting ON COMMIT DROP AS
SELECT m.shard, m.position, x.ordinality - 1 AS leg, m.account_id, x.v ->> 'book' AS book,
       (x.v ->> 'amount_ncr')::bigint AS amount_ncr, m.applied
  FROM moved m, jsonb_array_elements(m.p -> 'postings') WITH ORDINALITY x(v, ordinality);

-- Charge lines of settlements and late charges.
CREATE TEMP TABLE charge ON COMMIT DROP AS
SELECT m.shard, m.position, m.account_id, m.tenant_id, m.recorded_at, m.applied, m.counted,
       x.ordinality - 1 + CASE WHEN coalesce((m.p ->> 'uncollected_ncr')::bigint, 0) > 0 THEN 1 ELSE 0 END AS line,
       x.v ->> 'meter' AS meter, (x.v ->> 'quantity')::bigint AS quantity,
       (x.v ->> 'unit_price_ncr')::bigint AS unit_price_ncr, x.v ->> 'rate_card_id' AS rate_card_id,
       (m.p ->> 'hold_id')::uuid AS hold_id, (m.p #>> '{origin,agent_id}')::uuid AS agent_id,
       m.p #>> '{origin,actor}' AS actor
  FROM moved m, jsonb_array_elements(m.p -> 'lines') WITH ORDINALITY x(v, ordinality);

-- The ledger as it must be.
CREATE TEMP TABLE expected ON COMMIT DROP AS
SELECT l.*, (SELECT (m.p ->> 'available_after_ncr')::bigint + (m.p ->> 'held_after_ncr')::bigint
               FROM moved m WHERE m.shard = l.shard AND m.position = l.position)
            - coalesce(sum(l.amount_ncr) OVER (PARTITION BY l.shard, l.position ORDER BY l.line DESC
                                               ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)
            AS balance_after_ncr
  FROM (
    SELECT shard, position, line, account_id, 'charge' AS kind, -quantity * unit_price_ncr AS amount_ncr, meter, quantity
      FROM charge WHERE applied
    UNION ALL
    SELECT shard, position, 0, account_id, 'uncollected', (p ->> 'uncollected_ncr')::bigint, NULL, NULL
      FROM moved WHERE applied AND type = 'LateCharge' AND (p ->> 'uncollected_ncr')::bigint > 0
    UNION ALL
    SELECT shard, position, 0, account_id, 'grant', (p #>> '{grant,remaining_ncr}')::bigint, NULL, NULL
      FROM moved WHERE applied AND type = 'CreditsGranted'
    UNION ALL
    SELECT shard, position, 0, account_id, 'expiry', -(p ->> 'expired_ncr')::bigint, NULL, NULL
      FROM moved WHERE applied AND type = 'GrantExpired') l;

-- Every hold: what was set aside, and how it ended.
CREATE TEMP TABLE held ON COMMIT DROP AS
SELECT (p ->> 'hold_id')::uuid AS hold_id, min(account_id::text)::uuid AS account_id,
       count(*) FILTER (WHERE type = 'CreditsHeld') AS begins,
       count(*) FILTER (WHERE type IN ('CreditsSettled', 'HoldReleased', 'HoldExpired')) AS ends,
       count(*) FILTER (WHERE type = 'HoldExpired') AS expiries,
       count(*) FILTER (WHERE type = 'LateCharge') AS late_charges,
       coalesce(sum((p ->> 'amount_ncr')::bigint) FILTER (WHERE type IN ('CreditsHeld', 'HoldExtended')), 0) AS amount_ncr,
       coalesce(sum((p ->> 'captured_ncr')::bigint) FILTER (WHERE type = 'CreditsSettled'), 0) AS captured_ncr,
       coalesce(sum((p ->> 'released_ncr')::bigint)
                FILTER (WHERE type IN ('CreditsSettled', 'HoldReleased', 'HoldExpired')), 0) AS released_ncr,
       coalesce(sum((p ->> 'amount_ncr')::bigint)
                FILTER (WHERE applied AND type IN ('CreditsHeld', 'HoldExtended')), 0) AS amount_applied_ncr,
       count(*) FILTER (WHERE applied AND type IN ('CreditsSettled', 'HoldReleased', 'HoldExpired')) AS ends_applied,
       bool_or(applied) AS applied
  FROM moved WHERE p ? 'hold_id' GROUP BY 1;

-- Every grant: what is left of it.
CREATE TEMP TABLE granted ON COMMIT DROP AS
SELECT grant_id, min(account_id::text)::uuid AS account_id, sum(amount_ncr) AS remaining_ncr, sum(given) AS given,
       min(kind) AS kind
  FROM (
    SELECT (p #>> '{grant,grant_id}')::uuid AS grant_id, account_id, (p #>> '{grant,remaining_ncr}')::bigint AS amount_ncr,
           1 AS given, p #>> '{grant,kind}' AS kind
      FROM moved WHERE applied AND type = 'CreditsGranted'
    UNION ALL
    SELECT (s ->> 'grant_id')::uuid, account_id, -(s ->> 'amount_ncr')::bigint, 0, NULL
      FROM moved, jsonb_array_elements(p -> 'slices') s WHERE applied
    UNION ALL
    SELECT (p ->> 'grant_id')::uuid, account_id, -(p ->> 'expired_ncr')::bigint, 0, NULL
      FROM moved WHERE applied AND type = 'GrantExpired') g
 GROUP BY 1;

CREATE TEMP TABLE worked ON COMMIT DROP AS
SELECT e.shard, e.position, e.stream_id, e.type, convert_from(e.payload, 'UTF8')::jsonb AS p
  FROM event e
 WHERE e.type IN ('Turn.Accepted', 'Turn.ToolCallStarted', 'Turn.Completed', 'Turn.Failed', 'Turn.TimedOut',
                  'Turn.Cancelled', 'Agent.Created')
   AND NOT e.payload LIKE '{"$object":"%';

ANALYZE moved; ANALYZE posting; ANALYZE charge; ANALYZE expected; ANALYZE held; ANALYZE granted; ANALYZE worked;
