-- What an operator keeps back by hand.

-- name: pause
-- What is paused already stays so since then, until the time that is said now.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
)
INSERT INTO headrace.pauses AS p (scope, since, until)
SELECT $1, now, now + make_interval(secs => $2) FROM moment
ON CONFLICT (scope) DO UPDATE SET
    since = CASE WHEN p.until <= excluded.since THEN excluded.since ELSE p.since END, until = excluded.until
RETURNING scope, since, until, (SELECT now FROM moment) AS now;

-- name: resume
DELETE FROM headrace.pauses WHERE scope = $1 RETURNING until IS NULL OR until > headrace.now() AS in_force;

-- name: in_force
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
)
SELECT p.scope, p.since, p.until, moment.now FROM headrace.pauses p, moment
WHERE p.until IS NULL OR p.until > moment.now ORDER BY p.since, p.scope;
