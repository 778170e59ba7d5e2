-- What recovery needs: expiry, lone runs, checkpoints of handlers, retries of dead letters,
-- decisions about suspense, and holds for the time without Redis.
--
-- Everything here is added; nothing that older code reads or writes changes its meaning. A
-- worker of the version before runs on this schema until it is replaced.

ALTER TABLE headrace.jobs
    -- What a worker must know beyond the endpoint to run this job; one that does not puts it back.
    ADD COLUMN needs text[] NOT NULL DEFAULT '{}',
    -- How long it may be due before it is claimed for the first time, and until when that is; the
    -- latter is gone once it was claimed.
    ADD COLUMN ttl interval CHECK (ttl > interval '0'),
    ADD COLUMN start_by timestamptz,
    -- Until when it must have ended; a timeout is added to it by the first claim.
    ADD COLUMN end_by timestamptz,
    ADD COLUMN timeout interval CHECK (timeout > interval '0'),
    -- Whether the present run, or the last one, had a process of its own.
    ADD COLUMN alone boolean NOT NULL DEFAULT false,
    ADD COLUMN progress real CHECK (progress BETWEEN 0 AND 1),
    ADD COLUMN progress_note text,
    -- A retried dead letter and the job that was made of it.
    ADD COLUMN replaces uuid,
    ADD COLUMN replaced_by uuid;

CREATE INDEX idempotency_job ON headrace.idempotency (job_id);
CREATE INDEX jobs_expiry ON headrace.jobs (least(start_by, end_by))
    WHERE state = 'queued' AND (start_by IS NOT NULL OR end_by IS NOT NULL);
CREATE INDEX jobs_dead ON headrace.jobs (ended_at)
    WHERE state IN ('failed', 'expired') AND replaced_by IS NULL;

-- The result of a handler is a checkpoint and not a call.
ALTER TABLE headrace.jobs DROP CONSTRAINT jobs_check2;
ALTER TABLE headrace.jobs ADD CONSTRAINT jobs_result
    CHECK ((state = 'succeeded') = (result_run IS NOT NULL) AND (result_call IS NULL OR result_run IS NOT NULL));

-- Two failures with one fingerprint differ at most in numbers, ids and quoted words.
CREATE FUNCTION headrace.fingerprint(error_class text, error text) RETURNS text LANGUAGE sql IMMUTABLE
AS $$ SELECT left(md5(error_class || E'\n' || regexp_replace(
          error, '[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}|"[^"]*"|''[^'']*''|[0-9]+([.,][0-9]+)*', '#', 'g')), 12) $$;

ALTER TABLE headrace.calls
    -- Which call of a handler it is, and what it asked for: a later run finds the answer by them.
    ADD COLUMN step text,
    ADD COLUMN digest bytea,
    -- Who decided what a call in suspense came to: `rule`, or an operator's words.
    ADD COLUMN settled_by text;
ALTER TABLE headrace.calls DROP CONSTRAINT calls_state_check;
ALTER TABLE headrace.calls ADD CONSTRAINT calls_state_check
    CHECK (state IN ('open', 'answered', 'failed', 'suspense', 'settled'));
ALTER TABLE headrace.calls DROP CONSTRAINT calls_check3;
ALTER TABLE headrace.calls ADD CONSTRAINT calls_cost CHECK ((cost_nano > 0) <= (state IN ('answered', 'settled')));
ALTER TABLE headrace.calls ADD CONSTRAINT calls_settled CHECK ((state = 'settled') <= (settled_by IS NOT NULL));

-- What a handler had finished when its run was interrupted: each by its name, and its result under ''.
CREATE TABLE headrace.checkpoints (
    job_id uuid NOT NULL,
    name text NOT NULL,
    run int NOT NULL,
    value bytea NOT NULL,
    made_at timestamptz NOT NULL,
    PRIMARY KEY (job_id, name)
) PARTITION BY RANGE (job_id);
ALTER TABLE headrace.checkpoints ALTER COLUMN value SET STORAGE EXTERNAL;
CREATE TABLE headrace.checkpoints_default PARTITION OF headrace.checkpoints DEFAULT;

CREATE OR REPLACE FUNCTION headrace.make_partitions(moment timestamptz, ahead int) RETURNS int LANGUAGE plpgsql
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
        FOREACH parent IN ARRAY ARRAY['jobs', 'attempts', 'calls', 'checkpoints'] LOOP
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

CREATE OR REPLACE FUNCTION headrace.drop_partitions(before timestamptz) RETURNS SETOF text LANGUAGE plpgsql
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
        -- Weeks from before there were checkpoints have no table for them.
        EXECUTE format('DROP TABLE IF EXISTS headrace.%I, headrace.%I, headrace.%I, headrace.%I',
                       'jobs_' || week, 'attempts_' || week, 'calls_' || week, 'checkpoints_' || week);
        RETURN NEXT week;
    END LOOP;
END $$;

SELECT headrace.make_partitions(headrace.now(), 4);

-- Put the open calls of runs that are over into suspense at their worst case, and book that.
CREATE FUNCTION headrace.suspend_calls(job_ids uuid[], runs int[])
RETURNS TABLE (hold_id text, amount_nano bigint) LANGUAGE sql VOLATILE
AS $$
    WITH moment AS MATERIALIZED (
        SELECT headrace.now() AS now
    ), suspended AS (
        UPDATE headrace.calls AS c SET
            state = 'suspense', suspense_nano = c.held_nano, ended_at = moment.now, error_class = 'lost_lease'
        FROM moment, unnest(job_ids, runs) AS ended(job_id, run)
        WHERE c.job_id = ended.job_id AND c.run = ended.run AND c.state = 'open'
        RETURNING c.hold_id, c.scopes, date_trunc('day', c.held_at, 'UTC') AS held_on, c.suspense_nano
    ), booked AS (
        -- Sorted, so that two workers lock the same sums in the same order.
        INSERT INTO headrace.spend AS s (scope, window_name, shard, suspense_nano)
        SELECT scope, name, 0, sum(suspense_nano)
        FROM suspended, unnest(scopes) AS scope, unnest(headrace.windows(held_on)) AS name
        GROUP BY scope, name ORDER BY scope, name
        ON CONFLICT (scope, window_name, shard) DO UPDATE SET
            suspense_nano = s.suspense_nano + excluded.suspense_nano
    )
    SELECT hold_id, suspense_nano FROM suspended
$$;

-- Until when a worker is believed to reach Redis; null for one of the version before, which does not say.
ALTER TABLE headrace.workers ADD COLUMN dispatch_until timestamptz;

-- Whether the epoch in force is one without Redis: its holds are rows of `holds`.
ALTER TABLE headrace.money ADD COLUMN degraded boolean NOT NULL DEFAULT false;

CREATE TABLE headrace.holds (
    id text PRIMARY KEY,
    amount_nano bigint NOT NULL CHECK (amount_nano >= 0),
    scopes text[] NOT NULL,
    epoch bigint NOT NULL,
    held_at timestamptz NOT NULL
);

-- Every epoch that is begun with Redis ends the one without it.
CREATE OR REPLACE FUNCTION headrace.raise_epoch() RETURNS bigint LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    raised bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(4850, 1);
    UPDATE headrace.money SET epoch = epoch + 1, degraded = false RETURNING epoch INTO raised;
    DELETE FROM headrace.holds;
    RETURN raised;
END $$;

-- A worker says that it does not reach Redis, and asks whether the fleet does without: true when
-- the epoch in force is one without Redis. It is begun only when no live worker reaches Redis, so
-- that one that is cut off alone stops nobody.
CREATE FUNCTION headrace.degrade(who text) RETURNS boolean LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    UPDATE headrace.workers SET dispatch_until = '-infinity'
    WHERE id = who AND dispatch_until IS DISTINCT FROM '-infinity';
    FOR turn IN 1..2 LOOP
        IF (SELECT degraded FROM headrace.money) THEN
            RETURN true;
        ELSIF EXISTS (SELECT FROM headrace.workers
                      WHERE alive_until > headrace.now() AND coalesce(dispatch_until, 'infinity') > headrace.now()) THEN
            RETURN false;
        END IF;
        -- Asked once more under the lock: each statement of the second turn sees what was committed before it.
        PERFORM pg_advisory_xact_lock(4850, 1);
    END LOOP;
    UPDATE headrace.money SET epoch = epoch + 1, degraded = true;
    DELETE FROM headrace.holds;
    RETURN true;
END $$;

-- Seconds until a window of this kind turns; null for one that never does.
CREATE FUNCTION headrace.window_ends_in(kind text, moment timestamptz) RETURNS float8 LANGUAGE sql IMMUTABLE
AS $$ SELECT extract(epoch FROM CASE kind
          WHEN 'day' THEN date_trunc('day', moment, 'UTC') + interval '1 day'
          WHEN 'month' THEN (date_trunc('month', moment AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC'
      END - moment)::float8 $$;

-- Budgets (null: all) and what their windows of this moment have settled, in suspense and held, as
-- the store alone knows it. One statement and so one snapshot: an intent takes the place of its hold,
-- and a bill that of its intent, in all of it or in none.
CREATE FUNCTION headrace.budget_use(of_scopes text[], moment timestamptz)
RETURNS TABLE (scope text, kind text, window_name text, limit_nano bigint, policy text,
               settled_nano bigint, suspense_nano bigint, held_nano bigint) LANGUAGE sql STABLE
AS $$
    WITH held AS MATERIALIZED (
        SELECT s.scope, w.name, sum(h.amount) AS amount
        FROM (SELECT scopes, held_at, held_nano AS amount FROM headrace.calls WHERE state = 'open'
              UNION ALL
              SELECT scopes, held_at, amount_nano FROM headrace.holds) AS h,
             unnest(h.scopes) AS s(scope), unnest(headrace.windows(h.held_at)) AS w(name)
        GROUP BY s.scope, w.name
    )
    SELECT b.scope, b.window_kind, w.name, b.limit_nano, b.policy,
           coalesce(sum(p.settled_nano), 0)::bigint, coalesce(sum(p.suspense_nano), 0)::bigint,
           coalesce(max(h.amount), 0)::bigint
    FROM headrace.budgets b
    JOIN unnest(headrace.windows(moment)) AS w(name) ON split_part(w.name, ':', 1) = b.window_kind
    LEFT JOIN headrace.spend p ON p.scope = b.scope AND p.window_name = w.name
    LEFT JOIN held h ON h.scope = b.scope AND h.name = w.name
    WHERE of_scopes IS NULL OR b.scope = ANY(of_scopes)
    GROUP BY b.scope, b.window_kind, w.name, b.limit_nano, b.policy
    ORDER BY b.scope, array_position(ARRAY['total', 'day', 'month'], b.window_kind)
$$;

-- Hold money in the store, for each call over all of its scopes or not at all: a row for each in their
-- order, with no `by_scope` where it is held; no row when `expected` is not an epoch without Redis.
CREATE FUNCTION headrace.hold(expected bigint, ids text[], amounts bigint[], scope_lists text[])
RETURNS TABLE (at timestamptz, by_scope text, by_kind text, limit_is bigint, missing bigint,
               held_by_others bigint, ends_in float8, by_policy text) LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    wanted text[];
    key int;
    names text[];
    kinds text[];
    limits bigint[];
    policies text[];
    used bigint[];
    held bigint[];
    places int[];
    place int;
    granted text[] := '{}';
BEGIN
    IF NOT headrace.epoch_holds(expected) OR NOT (SELECT degraded FROM headrace.money) THEN
        RETURN;
    END IF;
    -- One at a time holds from a scope, whether it has a budget yet or not. Locks are taken in
    -- order, so that no two wait for each other, and everything is read after them.
    FOR key IN SELECT DISTINCT hashtext(s.scope)
               FROM unnest(scope_lists) AS l(list), unnest(string_to_array(l.list, E'\n')) AS s(scope) ORDER BY 1 LOOP
        PERFORM pg_advisory_xact_lock(4851, key);
    END LOOP;
    at := headrace.now();
    wanted := string_to_array(array_to_string(scope_lists, E'\n'), E'\n');
    SELECT array_agg(u.scope), array_agg(u.kind), array_agg(u.limit_nano), array_agg(u.policy),
           array_agg(u.settled_nano + u.suspense_nano + u.held_nano), array_agg(u.held_nano)
    INTO names, kinds, limits, policies, used, held
    FROM headrace.budget_use(wanted, at) AS u;
    FOR i IN 1..cardinality(ids) LOOP
        by_scope := NULL; by_kind := NULL; limit_is := NULL; missing := NULL;
        held_by_others := NULL; ends_in := NULL; by_policy := NULL;
        -- Where the counters of this call stand in the arrays, in the order of its scopes.
        SELECT coalesce(array_agg(p.place ORDER BY s.rank, p.place), '{}') INTO places
        FROM unnest(string_to_array(scope_lists[i], E'\n')) WITH ORDINALITY AS s(scope, rank),
             unnest(array_positions(names, s.scope)) AS p(place);
        FOREACH place IN ARRAY places LOOP
            missing := used[place] + amounts[i] - limits[place];
            IF missing > 0 THEN
                by_scope := names[place]; by_kind := kinds[place]; limit_is := limits[place];
                held_by_others := held[place]; by_policy := policies[place];
                ends_in := headrace.window_ends_in(kinds[place], at);
                EXIT;
            END IF;
        END LOOP;
        IF by_scope IS NULL THEN
            FOREACH place IN ARRAY places LOOP
                used[place] := used[place] + amounts[i];
                held[place] := held[place] + amounts[i];
            END LOOP;
            granted := granted || ids[i];
        END IF;
        RETURN NEXT;
    END LOOP;
    INSERT INTO headrace.holds (id, amount_nano, scopes, epoch, held_at)
    SELECT h.id, h.amount, string_to_array(h.scopes, E'\n'), expected, at
    FROM unnest(ids, amounts, scope_lists) AS h(id, amount, scopes) WHERE h.id = ANY(granted);
END $$;
