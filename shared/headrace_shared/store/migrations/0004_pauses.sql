-- What an operator keeps back by hand. Redis has a gate, or an open breaker, for each of these rows, and
-- they are put in place from here; a claim looks at the rows themselves, so that a pause holds from its
-- commit on, whatever Redis knows.
--
-- Everything here is added. A worker of the version before goes by the gates alone, and knows no gate of a
-- lane that keeps the jobs of handlers back.

CREATE TABLE headrace.pauses (
    -- `target:PROVIDER/MODEL` is a breaker opened by hand: it keeps calls back, and not jobs.
    scope text PRIMARY KEY CHECK (scope = 'global' OR scope ~ '^(lane|tenant|model|target):.'),
    since timestamptz NOT NULL,
    -- Null: until somebody resumes it.
    until timestamptz CHECK (until > since)
);

-- The scopes that are paused now; null when there are none.
CREATE FUNCTION headrace.paused_scopes() RETURNS text[] LANGUAGE sql STABLE
AS $$ SELECT array_agg(scope) FROM headrace.pauses WHERE until IS NULL OR until > headrace.now() $$;

-- The scopes whose pauses keep the jobs of a queue back. A lane is paused with the lanes of its handlers.
CREATE FUNCTION headrace.pausable_as(lane text, route text, tenant text) RETURNS text[] LANGUAGE sql IMMUTABLE
AS $$ SELECT ARRAY['global', 'lane:' || split_part(lane, '@', 1), 'model:' || route, 'tenant:' || tenant] $$;
