-- The log. A position is dense and in commit order within its shard, because every append locks the shard's row.
-- 32 shards for ever; all unique keys start with the shard, so that the tables can be distributed by it.

CREATE TABLE IF NOT EXISTS shard (
    shard smallint PRIMARY KEY,
    head  bigint   NOT NULL DEFAULT 0                    -- the last position given out
) WITH (fillfactor = 10);                                -- every append updates a row in place

INSERT INTO shard (shard) SELECT generate_series(0, 31) ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS event (
    shard          smallint    NOT NULL,
    position       bigint      NOT NULL,
    tenant_id      uuid        NOT NULL,
    stream_id      uuid        NOT NULL,
    stream_version integer     NOT NULL,
    type           text        NOT NULL,
    schema_version smallint    NOT NULL,
    payload        bytea       NOT NULL,                 -- JSON, or a reference to an object
    personal       bytea,                                -- sealed under the key of subject_id
    subject_id     uuid,
    command_id     uuid        NOT NULL,
    correlation_id uuid        NOT NULL,
    causation_id   uuid,
    actor          text        NOT NULL,
    traceparent    text,
    recorded_at    timestamptz NOT NULL,
    PRIMARY KEY (shard, position),
    UNIQUE (shard, stream_id, stream_version)
);

-- What became of every command, accepted or refused: audit trail and idempotency key.
CREATE TABLE IF NOT EXISTS command (
    shard       smallint    NOT NULL,
    command_id  uuid        NOT NULL,
    tenant_id   uuid        NOT NULL,
    type        text        NOT NULL,
    actor       text        NOT NULL,
    digest      bytea       NOT NULL,
    outcome     text        NOT NULL,
    remembered  boolean     NOT NULL,                    -- false: a refusal that may be tried again
    position    bigint      NOT NULL,                    -- of its last event, 0 without any
    result      bytea       NOT NULL,
    attempts    integer     NOT NULL DEFAULT 1,
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (shard, command_id)
);
CREATE INDEX IF NOT EXISTS command_by_tenant ON command (tenant_id, recorded_at DESC);

-- States of long streams: a cache, which may be emptied at any time.
CREATE TABLE IF NOT EXISTS snapshot (
    shard          smallint NOT NULL,
    stream_id      uuid     NOT NULL,
    stream_version integer  NOT NULL,
    tenant_id      uuid     NOT NULL,
    schema         text     NOT NULL,
    state          bytea    NOT NULL,
    PRIMARY KEY (shard, stream_id)
);

-- What must happen even if nobody hears of it, written by the append that makes it necessary.
CREATE TABLE IF NOT EXISTS due (
    shard      smallint    NOT NULL,
    kind       text        NOT NULL,
    id         uuid        NOT NULL,
    stream_id  uuid        NOT NULL,
    tenant_id  uuid        NOT NULL,
    due_at     timestamptz NOT NULL,
    claimed_by text        NOT NULL,
    kept_until timestamptz NOT NULL DEFAULT '-infinity', -- a sweeper has found it and is at it until then
    PRIMARY KEY (shard, id)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS due_at ON due (due_at);

CREATE TABLE IF NOT EXISTS worker (
    worker  text        PRIMARY KEY,                     -- slot/incarnation
    beat_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- How far readers of the log have come, one row for each shard they have seen anything of.
CREATE TABLE IF NOT EXISTS reader (
    reader   text     NOT NULL,
    shard    smallint NOT NULL,
    position bigint   NOT NULL,
    PRIMARY KEY (reader, shard)
) WITH (fillfactor = 30);

-- What an append brings, one value a row. The client writes them in binary form: columns, order and types are fixed.
DO $$ BEGIN
    CREATE TYPE new_event AS (
        shard smallint, position bigint, tenant_id uuid, stream_id uuid, stream_version integer, type text,
        schema_version smallint, payload bytea, personal bytea, subject_id uuid, command_id uuid, correlation_id uuid,
        causation_id uuid, actor text, traceparent text
    );
    CREATE TYPE new_command AS (
        shard smallint, command_id uuid, tenant_id uuid, type text, actor text, digest bytea, outcome text,
        remembered boolean, position bigint, result bytea
    );
    CREATE TYPE due_change AS (
        shard smallint, kind text, id uuid, stream_id uuid, tenant_id uuid, due_at timestamptz, claimed_by text
    );
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;

-- Whether others have changed one of these streams since the shards' heads were `p_heads`; also if they did so much that
-- looking is not worth it. For whoever has locked the shards, which have been moved on by `p_moved`.
CREATE OR REPLACE FUNCTION changed_since(p_shards smallint[], p_heads bigint[], p_moved bigint[], p_streams uuid[])
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN 2000 < ANY (p_moved) OR EXISTS (
        SELECT 1 FROM unnest(p_shards, p_heads, p_moved) p(shard, head, n)
         CROSS JOIN LATERAL (SELECT stream_id FROM event WHERE event.shard = p.shard AND position > p.head
                              ORDER BY position LIMIT p.n) e
         WHERE e.stream_id = ANY (p_streams));
END $$;

-- One append. The events' positions follow `p_heads`. When others have moved a head on, the positions are moved on by as
-- much, but only if what others did changed none of the streams that all of it was based on; else nothing is written.
-- Returns the time of record in microseconds since 1970 and, if anything was moved, by how much on each shard.
-- Shards are locked in ascending order, in which they are given, so that two appends cannot deadlock.
CREATE OR REPLACE FUNCTION append(
    p_shards smallint[], p_heads bigint[], p_counts bigint[],
    p_events new_event[], p_commands new_command[], p_due due_change[], p_based_on uuid[]
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    at         timestamptz;
    heads      bigint[];
    moved      bigint[];
    is_written boolean := false;
    row_count  bigint;
BEGIN
    IF cardinality(p_shards) = 1 THEN
        UPDATE shard SET head = head + p_counts[1] WHERE shard = p_shards[1] AND head = p_heads[1];
        is_written := FOUND;
    END IF;
    IF NOT is_written THEN
        heads := ARRAY(SELECT s.head FROM (SELECT shard, head FROM shard WHERE shard = ANY (p_shards)
                                            ORDER BY shard FOR UPDATE) s ORDER BY s.shard);
        IF heads <> p_heads THEN
            moved := ARRAY(SELECT h.now - h.before FROM unnest(heads, p_heads) h(now, before));
            IF p_based_on IS NULL OR 0 > ANY (moved) OR changed_since(p_shards, p_heads, moved, p_based_on) THEN
                RAISE EXCEPTION 'head moved' USING ERRCODE = 'OS001';
            END IF;
            p_events := ARRAY(
                SELECT (e.shard, e.position + m.n, e.tenant_id, e.stream_id, e.stream_version, e.type, e.schema_version,
                        e.payload, e.personal, e.subject_id, e.command_id, e.correlation_id, e.causation_id, e.actor,
                        e.traceparent)::new_event
                  FROM unnest(p_events) e JOIN unnest(p_shards, moved) m(shard, n) ON m.shard = e.shard);
            p_commands := ARRAY(
                SELECT (c.shard, c.command_id, c.tenant_id, c.type, c.actor, c.digest, c.outcome, c.remembered,
                        CASE c.position WHEN 0 THEN 0 ELSE c.position + m.n END, c.result)::new_command
                  FROM unnest(p_commands) c JOIN unnest(p_shards, moved) m(shard, n) ON m.shard = c.shard);
        END IF;
        UPDATE shard s SET head = s.head + p.n FROM unnest(p_shards, p_counts) p(shard, n) WHERE s.shard = p.shard;
    END IF;
    at := clock_timestamp();                             -- under the lock: time never runs backwards within a shard
    INSERT INTO command AS c
    SELECT k.*, 1, at FROM unnest(p_commands) k
        ON CONFLICT (shard, command_id) DO UPDATE
       SET tenant_id = excluded.tenant_id, type = excluded.type, actor = excluded.actor, digest = excluded.digest,
           outcome = excluded.outcome, remembered = excluded.remembered, position = excluded.position,
           result = excluded.result, recorded_at = excluded.recorded_at, attempts = c.attempts + 1
     WHERE NOT c.remembered;
    GET DIAGNOSTICS row_count = ROW_COUNT;
    IF row_count <> cardinality(p_commands) THEN
        RAISE EXCEPTION 'command seen' USING ERRCODE = 'OS002';
    END IF;
    IF cardinality(p_events) > 0 THEN
        INSERT INTO event SELECT e.*, at FROM unnest(p_events) e;
    END IF;
    IF cardinality(p_due) > 0 THEN
        DELETE FROM due USING unnest(p_due) d
         WHERE due.shard = d.shard AND due.id = d.id AND d.due_at IS NULL;
        INSERT INTO due (shard, kind, id, stream_id, tenant_id, due_at, claimed_by)
        SELECT d.* FROM unnest(p_due) d WHERE d.due_at IS NOT NULL
            ON CONFLICT (shard, id) DO UPDATE
           SET due_at = excluded.due_at, claimed_by = excluded.claimed_by, kept_until = '-infinity';
    END IF;
    RETURN (extract(epoch FROM at) * 1000000)::bigint || moved;
END $$;
