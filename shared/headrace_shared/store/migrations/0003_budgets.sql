-- Budgets of any scope, in windows of a configured time zone, with policies; what one job may cost.
--
-- Everything here is added. A worker of the version before knows budgets of everything and of a tenant,
-- in UTC, a day, a month or in all: it makes no call while there are others (epoch_holds).

ALTER TABLE headrace.jobs
    -- The name of the API key that the job came with, and what its owner calls it by: scopes of budgets.
    ADD COLUMN api_key text,
    ADD COLUMN tags text[] NOT NULL DEFAULT '{}',
    -- The most that all its calls may cost together.
    ADD COLUMN max_cost_nano bigint CHECK (max_cost_nano >= 0);

ALTER TABLE headrace.budgets
    -- A policy that the version before does not know; for it the budget is one to wait for.
    ADD COLUMN rule text CHECK (rule IN ('downgrade', 'soft'));
ALTER TABLE headrace.budgets DROP CONSTRAINT budgets_scope_check;
ALTER TABLE headrace.budgets ADD CONSTRAINT budgets_scope
    CHECK (scope = 'global' OR scope ~ '^(tenant|key|model|batch|tag):.+$');
ALTER TABLE headrace.budgets DROP CONSTRAINT budgets_window_kind_check;
ALTER TABLE headrace.budgets ADD CONSTRAINT budgets_window_kind
    CHECK (window_kind IN ('total', 'day', 'week', 'month'));

-- In which time zone days, weeks and months are counted, and since when. Each moment keeps the zone that it
-- had, so that what is booked later, or corrected, is booked where it was held.
CREATE TABLE headrace.time_zones (
    since timestamptz PRIMARY KEY,
    name text NOT NULL
);

CREATE FUNCTION headrace.time_zone_at(moment timestamptz) RETURNS text LANGUAGE sql STABLE
AS $$ SELECT coalesce((SELECT name FROM headrace.time_zones WHERE since <= moment ORDER BY since DESC LIMIT 1),
                      'UTC') $$;

-- The windows that spend of a moment is booked in. The text is the window's name everywhere. All moments of
-- a minute have the same ones: no zone turns, or is changed, inside of one.
CREATE OR REPLACE FUNCTION headrace.windows(moment timestamptz) RETURNS text[] LANGUAGE sql STABLE
AS $$ SELECT ARRAY['total', 'day:' || to_char(local, 'YYYY-MM-DD'), 'month:' || to_char(local, 'YYYY-MM')]
      FROM (SELECT moment AT TIME ZONE headrace.time_zone_at(moment)) AS here(local) $$;

-- The same, and the week, of which nothing is booked: it is the sum of its days.
CREATE FUNCTION headrace.budget_windows(moment timestamptz) RETURNS text[] LANGUAGE sql STABLE
AS $$ SELECT headrace.windows(moment)
             || ('week:' || to_char(moment AT TIME ZONE headrace.time_zone_at(moment), 'IYYY"-W"IW')) $$;

-- Where the spend of a window is booked.
CREATE FUNCTION headrace.booked_in(window_name text) RETURNS text[] LANGUAGE sql STABLE
AS $$ SELECT CASE WHEN window_name LIKE 'week:%' THEN ARRAY(
          SELECT 'day:' || to_char(to_date(substr(window_name, 6), 'IYYY"-W"IW') + n, 'YYYY-MM-DD')
          FROM generate_series(0, 6) AS n)
      ELSE ARRAY[window_name] END $$;

-- Seconds until a window of this kind turns, or its time zone is another one; null for one that never does.
CREATE OR REPLACE FUNCTION headrace.window_ends_in(kind text, moment timestamptz) RETURNS float8 LANGUAGE sql STABLE
AS $$
    WITH here AS (
        SELECT zone, CASE kind
            WHEN 'day' THEN date_trunc('day', moment AT TIME ZONE zone) + interval '1 day'
            WHEN 'week' THEN date_trunc('week', moment AT TIME ZONE zone) + interval '7 days'
            WHEN 'month' THEN date_trunc('month', moment AT TIME ZONE zone) + interval '1 month'
        END AS midnight
        FROM headrace.time_zone_at(moment) AS zone
    ), turn AS (
        -- Where clocks are put back to a midnight that was there already, the day began with the first one.
        SELECT min(at) AS at
        FROM here, unnest(ARRAY[interval '0', interval '30 minutes', interval '1 hour']) AS earlier,
             LATERAL (SELECT (midnight AT TIME ZONE zone) - earlier AS at) AS guess
        WHERE at AT TIME ZONE zone >= midnight
    )
    SELECT extract(epoch FROM least(turn.at, (
        SELECT min(since) FROM headrace.time_zones WHERE since > moment AND kind <> 'total')) - moment)::float8
    FROM turn
$$;

-- Count windows in another time zone from a full minute on, and return which; null: there is no such zone.
-- No hold that was counted before pays for a call after this: those that count anew know of the change.
CREATE FUNCTION headrace.set_time_zone(zone text) RETURNS timestamptz LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    changes_at timestamptz;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_timezone_names WHERE name = zone AND name !~ '^(posix|right)/') THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(4850, 1);
    UPDATE headrace.money SET epoch = epoch + 1 WHERE NOT degraded;
    -- Two minutes on, so that nothing was held later by a clock that is ahead of this one.
    changes_at := date_trunc('minute', headrace.now(), 'UTC') + interval '2 minutes';
    DELETE FROM headrace.time_zones WHERE since > headrace.now();
    IF headrace.time_zone_at(changes_at) <> zone THEN
        INSERT INTO headrace.time_zones (since, name) VALUES (changes_at, zone)
        ON CONFLICT (since) DO UPDATE SET name = excluded.name;
    END IF;
    RETURN changes_at;
END $$;

-- True when `expected` is the epoch in force, and then it stays in force until this transaction ends: a
-- rebuild takes the same lock exclusively before it raises the epoch. A function, because each of its
-- statements sees what was committed before it: the epoch must be read after the lock was granted.
CREATE FUNCTION headrace.is_in_force(expected bigint) RETURNS boolean LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(4850, 1);
    RETURN (SELECT epoch = expected FROM headrace.money);
END $$;

-- The same for a worker of the version before, whose holds leave out what it does not know.
CREATE OR REPLACE FUNCTION headrace.epoch_holds(expected bigint) RETURNS boolean LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    RETURN headrace.is_in_force(expected)
        AND NOT EXISTS (SELECT FROM headrace.time_zones)
        AND NOT EXISTS (SELECT FROM headrace.budgets
                        WHERE window_kind = 'week' OR scope !~ '^(global$|tenant:)');
END $$;

-- Put the open calls of runs that are over into suspense at their worst case, and book that.
CREATE OR REPLACE FUNCTION headrace.suspend_calls(job_ids uuid[], runs int[])
RETURNS TABLE (hold_id text, amount_nano bigint) LANGUAGE sql VOLATILE
AS $$
    WITH moment AS MATERIALIZED (
        SELECT headrace.now() AS now
    ), suspended AS (
        UPDATE headrace.calls AS c SET
            state = 'suspense', suspense_nano = c.held_nano, ended_at = moment.now, error_class = 'lost_lease'
        FROM moment, unnest(job_ids, runs) AS ended(job_id, run)
        WHERE c.job_id = ended.job_id AND c.run = ended.run AND c.state = 'open'
        RETURNING c.hold_id, c.scopes, date_trunc('minute', c.held_at, 'UTC') AS held_in, c.suspense_nano
    ), booked AS (
        -- Sorted, so that two workers lock the same sums in the same order.
        INSERT INTO headrace.spend AS s (scope, window_name, shard, suspense_nano)
        SELECT scope, name, 0, sum(suspense_nano)
        FROM suspended, unnest(scopes) AS scope, unnest(headrace.windows(held_in)) AS name
        GROUP BY scope, name ORDER BY scope, name
        ON CONFLICT (scope, window_name, shard) DO UPDATE SET
            suspense_nano = s.suspense_nano + excluded.suspense_nano
    )
    SELECT hold_id, suspense_nano FROM suspended
$$;

-- Budgets (null: all) and what their windows of this moment have settled, in suspense and held, as
-- the store alone knows it. One statement and so one snapshot: an intent takes the place of its hold,
-- and a bill that of its intent, in all of it or in none.
CREATE OR REPLACE FUNCTION headrace.budget_use(of_scopes text[], moment timestamptz)
RETURNS TABLE (scope text, kind text, window_name text, limit_nano bigint, policy text,
               settled_nano bigint, suspense_nano bigint, held_nano bigint) LANGUAGE sql STABLE
AS $$
    WITH held AS MATERIALIZED (
        SELECT s.scope, w.name, sum(h.amount) AS amount
        FROM (SELECT scopes, held_at, held_nano AS amount FROM headrace.calls WHERE state = 'open'
              UNION ALL
              SELECT scopes, held_at, amount_nano FROM headrace.holds) AS h,
             unnest(h.scopes) AS s(scope), unnest(headrace.budget_windows(h.held_at)) AS w(name)
        WHERE EXISTS (SELECT FROM headrace.budgets b WHERE b.scope = s.scope)
        GROUP BY s.scope, w.name
    )
    SELECT b.scope, b.window_kind, w.name, b.limit_nano, coalesce(b.rule, b.policy),
           coalesce(sum(p.settled_nano), 0)::bigint, coalesce(sum(p.suspense_nano), 0)::bigint,
           coalesce(max(h.amount), 0)::bigint
    FROM headrace.budgets b
    JOIN unnest(headrace.budget_windows(moment)) AS w(name) ON split_part(w.name, ':', 1) = b.window_kind
    LEFT JOIN headrace.spend p ON p.scope = b.scope AND p.window_name = ANY(headrace.booked_in(w.name))
    LEFT JOIN held h ON h.scope = b.scope AND h.name = w.name
    WHERE of_scopes IS NULL OR b.scope = ANY(of_scopes)
    GROUP BY b.scope, b.window_kind, w.name, b.limit_nano, coalesce(b.rule, b.policy)
    ORDER BY b.scope, array_position(ARRAY['total', 'day', 'week', 'month'], b.window_kind)
$$;

-- Hold money in the store, for each call over all of its scopes or not at all: a row for each in their
-- order, with no `by_scope` where it is held; no row when `expected` is not an epoch without Redis.
-- A soft budget counts and refuses nothing.
CREATE OR REPLACE FUNCTION headrace.hold(expected bigint, ids text[], amounts bigint[], scope_lists text[])
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
    IF NOT headrace.is_in_force(expected) OR NOT (SELECT degraded FROM headrace.money) THEN
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
            IF missing > 0 AND policies[place] <> 'soft' THEN
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
