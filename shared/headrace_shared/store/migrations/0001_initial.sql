-- Headrace's record of everything that must not be lost.
--
-- A job is a row of `jobs`. Its insertion's commit is the promise to the producer;
-- its `state` is the only truth about where it stands. Redis holds ids of queued rows
-- so that workers find them quickly, and may lose them at any time.
--
--     queued --claim--> running --finish--> succeeded | failed | cancelled | expired
--        ^                 |
--        +---- retry, snooze, lost lease
--
-- `run` counts the claims of a row and is the only fencing token: each write of a worker
-- names the run it was given, and changes nothing when the row has moved on. `attempts`
-- counts calls that failed for a reason of their own: a crash, a deploy and a snooze
-- cost none.
--
-- Each provider call is first an intent in `calls` (state `open`), committed before the
-- request is sent, and is concluded once: `answered`, `failed`, or in `suspense` when
-- nobody can know whether it was billed. `calls` is therefore the journal, the ledger and
-- the place of the answers; a job points at the one that is its result.
--
-- `spend` sums the ledger by scope and window, in shards so that workers do not queue for
-- one row. It is written in the transaction that concludes a call. What Redis counts for
-- budgets is rebuilt from `spend` and the open calls, never from a scan of the ledger.
-- `money.epoch` says which rebuild is in force: an intent names the epoch of its hold and
-- is refused under any other.
--
-- A callback (`deliveries`) is written by a trigger when a job ends, whatever statement
-- ended it, so that there is a delivery exactly when there is an ending.
--
-- jobs, attempts and calls are ranges of UUIDv7 job ids, a week each, with a default
-- partition that stays empty: retention drops a week. All time is headrace.now().

CREATE TABLE headrace.clock (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    shift interval NOT NULL DEFAULT '0'
);
INSERT INTO headrace.clock DEFAULT VALUES;

-- The one clock of the store; tests move it by clock.shift.
CREATE FUNCTION headrace.now() RETURNS timestamptz LANGUAGE sql STABLE
AS $$ SELECT clock_timestamp() + shift FROM headrace.clock $$;

-- The smallest UUIDv7 of a moment (PostgreSQL 15 has no uuidv7()).
CREATE FUNCTION headrace.id_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE
AS $$ SELECT (lpad(to_hex(floor(extract(epoch FROM moment) * 1000)::bigint), 12, '0')
              || '00000000000000000000')::uuid $$;

-- The moment a UUIDv7 was made.
CREATE FUNCTION headrace.id_time(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE
AS $$ SELECT to_timestamp(('x' || substr(replace(id::text, '-', ''), 1, 12))::bit(48)::bigint / 1000.0) $$;

-- Refuse ids that were not made within five minutes of the store's clock: they would
-- land in a partition that does not exist yet, or in one that retention is about to drop.
CREATE FUNCTION headrace.require_recent(ids uuid[]) RETURNS timestamptz LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    moment timestamptz := headrace.now();
BEGIN
    IF EXISTS (SELECT FROM unnest(ids) AS id
               WHERE headrace.id_time(id) NOT BETWEEN moment - interval '5 minutes'
                                                  AND moment + interval '5 minutes') THEN
        RAISE EXCEPTION 'a job id is more than 5 minutes from the time of the database'
            USING ERRCODE = 'HR001';
    END IF;
    RETURN moment;
END $$;

CREATE TABLE headrace.configurations (
    version int PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    document jsonb NOT NULL,
    source text NOT NULL,
    applied_at timestamptz NOT NULL
);

CREATE TABLE headrace.batches (
    id uuid PRIMARY KEY,
    tenant text NOT NULL,
    digest bytea NOT NULL,
    generation int NOT NULL,
    name text NOT NULL,
    total int NOT NULL CHECK (total >= 0),
    created_at timestamptz NOT NULL,
    UNIQUE (tenant, digest, generation)
);

CREATE TABLE headrace.jobs (
    id uuid NOT NULL,
    tenant text NOT NULL,
    lane text NOT NULL,
    route text NOT NULL,
    state text NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired')),
    run int NOT NULL DEFAULT 0 CHECK (run >= 0),
    attempts int NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    crashes int NOT NULL DEFAULT 0 CHECK (crashes >= 0),
    max_attempts int NOT NULL CHECK (max_attempts >= 1),
    run_at timestamptz NOT NULL,
    lease_until timestamptz,
    worker text,
    cancel_requested boolean NOT NULL DEFAULT false,
    waiting_for text,
    created_at timestamptz NOT NULL,
    started_at timestamptz,
    ended_at timestamptz,
    result_run int,
    result_call int,
    error_class text,
    error text,
    endpoint text NOT NULL,
    body bytea NOT NULL,
    webhook text,
    metadata jsonb,
    traceparent text,
    batch_id uuid,
    line int,
    custom_id text,
    PRIMARY KEY (id),
    CHECK ((state IN ('queued', 'running')) = (ended_at IS NULL)),
    CHECK ((state = 'running') = (lease_until IS NOT NULL AND worker IS NOT NULL)),
    CHECK ((state = 'succeeded') = (result_run IS NOT NULL AND result_call IS NOT NULL)),
    CHECK ((state IN ('failed', 'expired')) <= (error_class IS NOT NULL AND error IS NOT NULL)),
    CHECK ((batch_id IS NULL) = (line IS NULL))
) PARTITION BY RANGE (id);

-- The feeder reads a queue in this order; the first three columns are the queue's name.
CREATE INDEX jobs_queued ON headrace.jobs (lane, route, tenant, run_at, id) WHERE state = 'queued';
CREATE INDEX jobs_leases ON headrace.jobs (lease_until) WHERE state = 'running';
CREATE INDEX jobs_batch ON headrace.jobs (batch_id, line) WHERE batch_id IS NOT NULL;
CREATE INDEX jobs_tenant ON headrace.jobs (tenant, id);

CREATE TABLE headrace.attempts (
    job_id uuid NOT NULL,
    run int NOT NULL,
    number int NOT NULL CHECK (number >= 1),
    call int,
    outcome text NOT NULL CHECK (outcome IN ('succeeded', 'retried', 'failed')),
    error_class text,
    error text,
    worker text NOT NULL,
    ended_at timestamptz NOT NULL,
    PRIMARY KEY (job_id, run, number),
    CHECK ((outcome = 'succeeded') = (error_class IS NULL))
) PARTITION BY RANGE (job_id);

CREATE TABLE headrace.calls (
    job_id uuid NOT NULL,
    run int NOT NULL,
    call int NOT NULL CHECK (call >= 1),
    tenant text NOT NULL,
    endpoint text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'answered', 'failed', 'suspense')),
    hold_id text NOT NULL,
    held_nano bigint NOT NULL CHECK (held_nano >= 0),
    held_at timestamptz NOT NULL,
    scopes text[] NOT NULL,
    epoch bigint NOT NULL,
    price_version text NOT NULL,
    opened_at timestamptz NOT NULL,
    ended_at timestamptz,
    latency interval,
    status int,
    error_class text,
    request_id text,
    prompt_tokens bigint NOT NULL DEFAULT 0 CHECK (prompt_tokens >= 0),
    cached_tokens bigint NOT NULL DEFAULT 0 CHECK (cached_tokens >= 0),
    cache_write_tokens bigint NOT NULL DEFAULT 0 CHECK (cache_write_tokens >= 0),
    completion_tokens bigint NOT NULL DEFAULT 0 CHECK (completion_tokens >= 0),
    reasoning_tokens bigint NOT NULL DEFAULT 0 CHECK (reasoning_tokens >= 0),
    cost_nano bigint NOT NULL DEFAULT 0 CHECK (cost_nano >= 0),
    suspense_nano bigint NOT NULL DEFAULT 0 CHECK (suspense_nano >= 0),
    answer bytea,
    PRIMARY KEY (job_id, run, call),
    CHECK ((state = 'open') = (ended_at IS NULL)),
    CHECK ((state = 'answered') <= (answer IS NOT NULL)),
    CHECK ((suspense_nano > 0) <= (state = 'suspense')),
    CHECK ((cost_nano > 0) <= (state = 'answered'))
) PARTITION BY RANGE (job_id);
-- An answer is written once and read whole: compressing it on the hot path buys little.
ALTER TABLE headrace.calls ALTER COLUMN answer SET STORAGE EXTERNAL;

CREATE INDEX calls_open ON headrace.calls (job_id) WHERE state = 'open';
CREATE INDEX calls_suspense ON headrace.calls (ended_at) WHERE state = 'suspense';

CREATE TABLE headrace.idempotency (
    tenant text NOT NULL,
    key text NOT NULL,
    job_id uuid NOT NULL,
    digest bytea NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, key)
);
CREATE INDEX idempotency_expiry ON headrace.idempotency (expires_at);

CREATE TABLE headrace.money (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    epoch bigint NOT NULL DEFAULT 1
);
INSERT INTO headrace.money DEFAULT VALUES;

CREATE TABLE headrace.budgets (
    scope text NOT NULL CHECK (scope = 'global' OR scope ~ '^tenant:.+$'),
    window_kind text NOT NULL CHECK (window_kind IN ('total', 'day', 'month')),
    limit_nano bigint NOT NULL CHECK (limit_nano BETWEEN 0 AND 9000000000000000),
    policy text NOT NULL CHECK (policy IN ('wait', 'reject')),
    changed_at timestamptz NOT NULL,
    PRIMARY KEY (scope, window_kind)
);

CREATE TABLE headrace.spend (
    scope text NOT NULL,
    window_name text NOT NULL,
    shard int NOT NULL,
    settled_nano bigint NOT NULL DEFAULT 0,
    suspense_nano bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (scope, window_name, shard)
) WITH (fillfactor = 50);

-- The windows that a moment falls into, in UTC. The text is the window's name everywhere.
CREATE FUNCTION headrace.windows(moment timestamptz) RETURNS text[] LANGUAGE sql IMMUTABLE
AS $$ SELECT ARRAY['total',
                   'day:' || to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM-DD'),
                   'month:' || to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM')] $$;

-- True when `expected` is the epoch in force, and then it stays in force until this
-- transaction ends: a rebuild takes the same lock exclusively before it raises the epoch.
-- A function, because each of its statements sees what was committed before it: the
-- epoch must be read after the lock was granted.
CREATE FUNCTION headrace.epoch_holds(expected bigint) RETURNS boolean LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(4850, 1);
    RETURN (SELECT epoch = expected FROM headrace.money);
END $$;

CREATE FUNCTION headrace.raise_epoch() RETURNS bigint LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    raised bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(4850, 1);
    UPDATE headrace.money SET epoch = epoch + 1 RETURNING epoch INTO raised;
    RETURN raised;
END $$;

CREATE TABLE headrace.workers (
    id text PRIMARY KEY,
    host text NOT NULL,
    slots int NOT NULL,
    lanes text[] NOT NULL,
    started_at timestamptz NOT NULL,
    alive_until timestamptz NOT NULL
);

-- Who does the work that only one process should do at a time. Losing one is harmless.
CREATE TABLE headrace.leaders (
    role text PRIMARY KEY,
    holder text NOT NULL,
    until timestamptz NOT NULL
);

CREATE TABLE headrace.deliveries (
    id uuid PRIMARY KEY,
    job_id uuid NOT NULL,
    tenant text NOT NULL,
    url text NOT NULL,
    event_type text NOT NULL,
    payload text NOT NULL,
    traceparent text,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'exhausted', 'gone')),
    attempts int NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    next_attempt_at timestamptz NOT NULL,
    lease_until timestamptz,
    claim int NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL,
    ended_at timestamptz,
    CHECK ((state = 'pending') = (ended_at IS NULL))
);
CREATE INDEX deliveries_due ON headrace.deliveries (next_attempt_at) WHERE state = 'pending';
-- A receiver's share of what is due is found without reading what others wait for.
CREATE INDEX deliveries_receiver ON headrace.deliveries (split_part(url, '/', 3), next_attempt_at)
    WHERE state = 'pending';
CREATE INDEX deliveries_job ON headrace.deliveries (job_id);

CREATE TABLE headrace.delivery_attempts (
    delivery_id uuid NOT NULL REFERENCES headrace.deliveries ON DELETE CASCADE,
    number int NOT NULL CHECK (number >= 1),
    at timestamptz NOT NULL,
    duration interval NOT NULL,
    status int,
    error_class text,
    snippet text,
    PRIMARY KEY (delivery_id, number)
);

-- The callback of an ending, in the ending's own transaction. The payload is thin: what
-- happened, what it cost, and the caller's own metadata; the answer is fetched by id.
CREATE FUNCTION headrace.announce_ending() RETURNS trigger LANGUAGE plpgsql
AS $$
DECLARE
    moment timestamptz := headrace.now();
    bill record;
BEGIN
    SELECT coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
           coalesce(sum(completion_tokens), 0) AS completion_tokens,
           coalesce(sum(cost_nano), 0) AS cost_nano
    INTO bill FROM headrace.calls WHERE job_id = NEW.id;
    INSERT INTO headrace.deliveries
        (id, job_id, tenant, url, event_type, payload, traceparent, next_attempt_at, created_at)
    VALUES (gen_random_uuid(), NEW.id, NEW.tenant, NEW.webhook, 'job.' || NEW.state,
            jsonb_build_object(
                'type', 'job.' || NEW.state,
                'timestamp', to_char(NEW.ended_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                'data', jsonb_strip_nulls(jsonb_build_object(
                    'id', NEW.id,
                    'status', NEW.state,
                    'tenant', NEW.tenant,
                    'endpoint', NEW.endpoint,
                    'model', NEW.route,
                    'attempts', NEW.attempts + (NEW.state = 'succeeded')::int,
                    'error', CASE WHEN NEW.error_class IS NOT NULL THEN
                        jsonb_build_object('class', NEW.error_class, 'message', NEW.error) END,
                    'usage', jsonb_build_object(
                        'prompt_tokens', bill.prompt_tokens,
                        'completion_tokens', bill.completion_tokens,
                        'cost_nano_usd', bill.cost_nano),
                    'batch_id', NEW.batch_id,
                    'custom_id', NEW.custom_id,
                    'metadata', NEW.metadata)))::text,
            NEW.traceparent, moment, moment);
    RETURN NULL;
END $$;

CREATE TRIGGER jobs_announce AFTER UPDATE ON headrace.jobs FOR EACH ROW
    WHEN (NEW.webhook IS NOT NULL AND NEW.ended_at IS NOT NULL AND OLD.ended_at IS NULL)
    EXECUTE FUNCTION headrace.announce_ending();

CREATE TABLE headrace.jobs_default PARTITION OF headrace.jobs DEFAULT;
CREATE TABLE headrace.attempts_default PARTITION OF headrace.attempts DEFAULT;
CREATE TABLE headrace.calls_default PARTITION OF headrace.calls DEFAULT;

-- Make the weekly partitions from the week of `moment` to `ahead` weeks later. Harmless
-- to repeat, and from several processes at once.
CREATE FUNCTION headrace.make_partitions(moment timestamptz, ahead int) RETURNS int LANGUAGE plpgsql
AS $$
DECLARE
    week timestamptz;
    parent text;
    name text;
    made int := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(4850, 2);
    FOR n IN 0..ahead LOOP
        week := date_trunc('week', moment AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' + n * interval '7 days';
        FOREACH parent IN ARRAY ARRAY['jobs', 'attempts', 'calls'] LOOP
            name := parent || '_' || to_char(week AT TIME ZONE 'UTC', 'IYYY"w"IW');
            CONTINUE WHEN to_regclass('headrace.' || name) IS NOT NULL;
            EXECUTE format(
                'CREATE TABLE headrace.%I PARTITION OF headrace.%I FOR VALUES FROM (%L) TO (%L) '
                'WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, '
                'autovacuum_vacuum_insert_scale_factor = 0.2)',
                name, parent, headrace.id_floor(week), headrace.id_floor(week + interval '7 days'));
            made := made + 1;
        END LOOP;
    END LOOP;
    RETURN made;
END $$;

-- Drop the weeks that ended before `before`, unless one of them still holds a job that
-- has not ended or a call that is not settled. Returns the names of what was dropped.
CREATE FUNCTION headrace.drop_partitions(before timestamptz) RETURNS SETOF text LANGUAGE plpgsql
AS $$
DECLARE
    week text;
    open boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(4850, 2);
    FOR week IN
        SELECT substr(c.relname, 6) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'headrace.jobs'::regclass AND c.relname ~ '^jobs_\d{4}w\d{2}$'
          AND to_date(substr(c.relname, 6), 'IYYY"w"IW') + 7 <= (before AT TIME ZONE 'UTC')::date
        ORDER BY 1
    LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM headrace.%I WHERE ended_at IS NULL) '
                       'OR EXISTS (SELECT FROM headrace.%I WHERE state IN (''open'', ''suspense''))',
                       'jobs_' || week, 'calls_' || week) INTO open;
        CONTINUE WHEN open;
        EXECUTE format('DROP TABLE headrace.%I, headrace.%I, headrace.%I',
                       'jobs_' || week, 'attempts_' || week, 'calls_' || week);
        RETURN NEXT week;
    END LOOP;
END $$;

SELECT headrace.make_partitions(headrace.now(), 4);
