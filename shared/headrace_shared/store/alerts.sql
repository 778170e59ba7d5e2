-- What is said about budgets, and the pace they are spent at.

-- name: watched
-- Every budget with the end of its present window and the pace that was kept of it.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
)
SELECT b.scope, b.window_kind, moment.now, headrace.window_ends_in(b.window_kind, moment.now) AS ends_in,
       p.window_name, p.used_nano, p.at, p.since, p.rate, p.weight,
       r.limit_nano = b.limit_nano AND r.until > moment.now AS refused
FROM moment CROSS JOIN headrace.budgets b
LEFT JOIN headrace.budget_paces p USING (scope, window_kind)
LEFT JOIN headrace.budget_refusals r USING (scope, window_kind);

-- name: keep_paces
WITH gone AS (
    DELETE FROM headrace.budget_paces p WHERE NOT EXISTS (
        SELECT FROM headrace.budgets b WHERE b.scope = p.scope AND b.window_kind = p.window_kind)
)
INSERT INTO headrace.budget_paces (scope, window_kind, window_name, used_nano, at, since, rate, weight)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::timestamptz[], $6::timestamptz[],
                     $7::float8[], $8::float8[])
ON CONFLICT (scope, window_kind) DO UPDATE SET
    window_name = excluded.window_name, used_nano = excluded.used_nano, at = excluded.at,
    since = excluded.since, rate = excluded.rate, weight = excluded.weight;

-- name: said
SELECT a.scope, a.window_kind, a.window_name, a.level, a.limit_nano, a.said_at, d.state AS delivery
FROM unnest($1::text[], $2::text[], $3::text[]) AS w(scope, window_kind, window_name)
JOIN headrace.budget_alerts a USING (scope, window_kind, window_name)
LEFT JOIN headrace.deliveries d ON d.id = a.delivery_id
ORDER BY a.scope, a.window_kind, a.said_at, a.level;

-- name: say
-- What was not said yet, each with its delivery ($8 null: nobody is to be called): in one statement,
-- so that there is a delivery exactly when there is an alert, however many processes say it at once.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), wanted AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                         $7::uuid[], $9::text[], $10::text[])
        AS w(scope, window_kind, window_name, level, limit_nano, used_nano, delivery_id, event_type, payload)
), said AS (
    INSERT INTO headrace.budget_alerts
        (scope, window_kind, window_name, level, limit_nano, used_nano, said_at, delivery_id)
    SELECT scope, window_kind, window_name, level, limit_nano, used_nano, now,
           CASE WHEN $8::text IS NOT NULL THEN delivery_id END
    FROM wanted, moment ORDER BY scope, window_kind, window_name, level
    ON CONFLICT DO NOTHING
    RETURNING scope, window_kind, window_name, level, delivery_id
), sent AS (
    INSERT INTO headrace.deliveries (id, tenant, url, event_type, payload, next_attempt_at, created_at)
    SELECT w.delivery_id, $11, $8, w.event_type, w.payload, moment.now, moment.now
    FROM wanted w JOIN said USING (delivery_id), moment
)
SELECT scope, window_kind, window_name, level FROM said;

-- name: take_back
-- Alerts whose level is not reached any more since the limit was raised: they may be said again.
DELETE FROM headrace.budget_alerts a
USING unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
    AS t(scope, window_kind, window_name, level, limit_nano)
WHERE a.scope = t.scope AND a.window_kind = t.window_kind AND a.window_name = t.window_name
  AND a.level = t.level AND a.limit_nano < t.limit_nano;

-- name: refuse
INSERT INTO headrace.budget_refusals (scope, window_kind, limit_nano, until)
VALUES ($1, $2, $3, coalesce(headrace.now() + make_interval(secs => $4), 'infinity'))
ON CONFLICT (scope, window_kind) DO UPDATE SET limit_nano = excluded.limit_nano, until = excluded.until;

-- name: forget_alerts
-- Longer than any window lasts that ends; of those that do not, while there is a budget.
WITH refusals AS (
    DELETE FROM headrace.budget_refusals r
    WHERE r.until < headrace.now() OR NOT EXISTS (
        SELECT FROM headrace.budgets b WHERE b.scope = r.scope AND b.window_kind = r.window_kind)
)
DELETE FROM headrace.budget_alerts a
WHERE a.said_at < headrace.now() - make_interval(days => greatest($1, 40))
  AND (a.window_kind <> 'total' OR NOT EXISTS (
      SELECT FROM headrace.budgets b WHERE b.scope = a.scope AND b.window_kind = 'total'));
