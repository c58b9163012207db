"""The auditor of the log: proves on the live system what must always be true of it (security reference, "Reliability").

Sees one instant of the whole store and may run beside everything else. The laws of credits are those of
`projections.reconciliation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import psycopg

from domain.event_log import EventLog
from projections.catching_up import CheckpointWatch
from projections.read_side import Pool, ReadSide
from projections.reconciliation import SHOWN_MAX, Violation, reconcile

LIMIT_S = 600.0
CATCH_UP_S = 5.0  # how long read models may take for what was in the log when the audit began
GRACE_S = 30.0  # beyond a turn's deadline, until somebody must have ended it
SETTLED_S = 60.0  # from a turn's end to its settlement

Deadline = Callable[[psycopg.AsyncConnection[Any], float], AbstractContextManager[None]]

# Turns taken apart, once for all queries: when they began to work, when they ended.
_TURNS = """
    CREATE TEMP TABLE audited_turn ON COMMIT DROP AS
    SELECT a.stream_id AS turn_id, a.shard, a.position AS accepted, (p ->> 'conversation_id')::uuid AS conversation_id,
           (p #>> '{limits,deadline_at}')::timestamptz AS deadline_at, w.began, e.ended, e.ends
      FROM (SELECT stream_id, shard, position, convert_from(payload, 'UTF8')::jsonb AS p
              FROM event WHERE type = 'Turn.Accepted') a
      LEFT JOIN LATERAL (SELECT min(position) AS began FROM event
                          WHERE shard = a.shard AND stream_id = a.stream_id AND type = 'Turn.ModelCallStarted') w ON true
      LEFT JOIN LATERAL (SELECT max(position) AS ended, count(*) AS ends FROM event
                          WHERE shard = a.shard AND stream_id = a.stream_id
                            AND type IN ('Turn.Completed', 'Turn.Failed', 'Turn.TimedOut', 'Turn.Cancelled')) e ON true
"""

# Each query gives (key, detail) of what violates it.
CHECKS: dict[str, str] = {
    "positions are dense and heads equal counts": """
        SELECT s.shard::text, format('head %s, but %s events, the last at %s', s.head, e.n, e.last)
          FROM shard s LEFT JOIN LATERAL (
               SELECT count(*) n, coalesce(min(position), 1) AS first, coalesce(max(position), 0) AS last
                 FROM event WHERE event.shard = s.shard) e ON true
         WHERE (e.n, e.first, e.last) IS DISTINCT FROM (s.head, 1::bigint, s.head)
    """,
    "stream versions are dense": """
        SELECT stream_id::text, format('%s events, versions %s to %s', count(*), min(stream_version), max(stream_version))
          FROM event GROUP BY shard, stream_id
        HAVING min(stream_version) <> 1 OR max(stream_version) <> count(*)
    """,
    "a stream is one tenant's": """
        SELECT stream_id::text, count(DISTINCT tenant_id) || ' tenants' FROM event
         GROUP BY stream_id HAVING count(DISTINCT tenant_id) > 1 OR count(DISTINCT shard) > 1
    """,
    "time does not run backwards within a shard": """
        SELECT shard || ':' || position, format('%s after %s', recorded_at, before)
          FROM (SELECT shard, position, recorded_at,
                       lag(recorded_at) OVER (PARTITION BY shard ORDER BY position) AS before FROM event) t
         WHERE recorded_at < before
    """,
    "every command's events are there": """
        SELECT c.command_id::text, format('%s says it ends at %s:%s', c.type, c.shard, c.position)
          FROM command c LEFT JOIN event e
            ON e.shard = c.shard AND e.position = c.position AND e.command_id = c.command_id
         WHERE c.position > 0 AND e.command_id IS NULL
    """,
    "every event has its command": """
        SELECT e.shard || ':' || e.position, 'command ' || e.command_id
          FROM event e LEFT JOIN command c ON c.shard = e.shard AND c.command_id = e.command_id
         WHERE c.command_id IS NULL OR c.position < e.position
    """,
    "a turn ends once": """
        SELECT turn_id::text, ends || ' ends' FROM audited_turn WHERE ends > 1
    """,
    "a turn ends within its deadline": f"""
        SELECT turn_id::text, 'should have ended by ' || deadline_at FROM audited_turn
         WHERE ended IS NULL AND deadline_at < clock_timestamp() - make_interval(secs => {GRACE_S})
    """,  # noqa: S608 - our own number
    "somebody looks after every running turn": """
        SELECT t.turn_id::text, 'no due work' FROM audited_turn t
         WHERE t.ended IS NULL AND NOT EXISTS (SELECT FROM due d WHERE d.shard = t.shard AND d.stream_id = t.turn_id)
    """,
    "one turn of a conversation works at a time": """
        SELECT turn_id::text, format('began at %s:%s while another was at work until %s', shard, began, before)
          FROM (SELECT turn_id, shard, began, lag(coalesce(ended, 9223372036854775807))
                         OVER (PARTITION BY conversation_id ORDER BY began) AS before
                  FROM audited_turn WHERE conversation_id IS NOT NULL AND began IS NOT NULL) t
         WHERE began < before
    """,
    "unsafe tool calls ran at most once": """
        SELECT tool_call_id, tool || ' was started ' || n || ' times'
          FROM (SELECT r.p ->> 'tool_call_id' AS tool_call_id, r.p ->> 'tool' AS tool, count(*) AS n
                  FROM (SELECT shard, stream_id, convert_from(payload, 'UTF8')::jsonb AS p
                          FROM event WHERE type = 'Turn.ToolCallRequested') r
                  JOIN event s ON s.shard = r.shard AND s.stream_id = r.stream_id AND s.type = 'Turn.ToolCallStarted'
                   AND convert_from(s.payload, 'UTF8')::jsonb ->> 'tool_call_id' = r.p ->> 'tool_call_id'
                 WHERE r.p ->> 'effect' = 'unsafe' GROUP BY 1, 2) t
         WHERE n > 1
    """,
    "ended turns are settled": f"""
        SELECT turn_id::text, 'its hold is open since it ended at ' || turn_ended_at FROM credit_hold
         WHERE turn_ended_at < clock_timestamp() - make_interval(secs => {SETTLED_S})
    """,  # noqa: S608 - our own number
    "read models pass over no stream": """
        SELECT projection || ' ' || stream_id, error FROM parked
    """,
}


@dataclass(frozen=True, slots=True)
class Checked:
    """A law, and what violates it; at most `SHOWN_MAX` violations of each."""

    law: str
    violations: tuple[Violation, ...]


async def verify(
    log: EventLog, pool: Pool, deadline: Deadline, catch_up_s: float = CATCH_UP_S
) -> list[Checked]:
    """Check every law, the laws of credits among them; `catch_up_s` is what the read models get to follow.

    Raises:
        LogUnavailable, ReadSideUnavailable: nothing was proven.
    """
    watch = CheckpointWatch(pool, deadline)
    db = ReadSide(pool, deadline, watch)
    found = [await _read_models_follow(log, watch, catch_up_s)]
    async with db.snapshot(LIMIT_S) as connection:
        await connection.execute(_TURNS.encode(), prepare=False)
        for law, query in CHECKS.items():
            limited = f"SELECT * FROM ({query}) v LIMIT {SHOWN_MAX}"  # noqa: S608 - our own queries
            cursor = await connection.execute(limited.encode(), prepare=False)
            rows = await cursor.fetchall()
            found.append(Checked(law, tuple(Violation(law, key, detail or "") for key, detail in rows)))
    credit = "credits obey their laws"
    return [*found, Checked(credit, tuple(await reconcile(db)))]


async def _read_models_follow(log: EventLog, watch: CheckpointWatch, limit_s: float) -> Checked:
    """What was in the log when the audit began must reach every read model soon."""
    law = "read models are level with the log"
    heads = {shard: head for shard, head in (await log.heads()).items() if head}
    reached = await asyncio.gather(*(watch(shard, head, limit_s) for shard, head in heads.items()))
    late = [shard for shard, there in zip(heads, reached, strict=True) if not there]
    return Checked(
        law,
        tuple(
            Violation(law, str(shard), f"some are behind {heads[shard]} after {limit_s:g} s")
            for shard in late
        ),
    )
