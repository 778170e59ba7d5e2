-- Budgets, the epoch of their counters, and what was spent.

-- name: set_budget
-- What the version before does not know as a policy is one to wait for, to it.
INSERT INTO headrace.budgets (scope, window_kind, limit_nano, policy, rule, changed_at)
SELECT $1, $2, $3::bigint, CASE WHEN known THEN $4::text ELSE 'wait' END, CASE WHEN NOT known THEN $4 END, headrace.now()
FROM (SELECT $4::text IN ('wait', 'reject') AS known) AS p
ON CONFLICT (scope, window_kind) DO UPDATE SET
    limit_nano = excluded.limit_nano, policy = excluded.policy, rule = excluded.rule, changed_at = excluded.changed_at;

-- name: remove_budget
DELETE FROM headrace.budgets WHERE scope = $1 AND window_kind = $2 RETURNING scope;

-- name: has_budget
SELECT scope FROM headrace.budgets WHERE scope = $1 LIMIT 1;

-- name: was_charged
SELECT scope FROM headrace.spend WHERE scope = $1 LIMIT 1;

-- name: wake_waiters
-- A page of jobs that wait for a budget and spend from this scope, due at once.
UPDATE headrace.jobs AS j SET run_at = headrace.now(), waiting_for = NULL
FROM (SELECT id FROM headrace.jobs
      WHERE state = 'queued' AND waiting_for = 'budget' AND run_at > headrace.now()
        AND CASE split_part($1, ':', 1) WHEN 'global' THEN true
                WHEN 'tenant' THEN 'tenant:' || tenant = $1 WHEN 'key' THEN 'key:' || api_key = $1
                -- A handler asks for what it likes: it looks for itself.
                WHEN 'model' THEN 'model:' || route = $1 OR endpoint LIKE 'handler:%'
                WHEN 'batch' THEN batch_id = substr($1, 7)::uuid WHEN 'tag' THEN substr($1, 5) = ANY(tags) END
      ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED) AS waiting
WHERE j.id = waiting.id
RETURNING j.id, j.lane, j.route, j.tenant, j.api_key;

-- name: wake
-- The same for jobs that are named, each found by its id.
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now, 'queued' AS queued
)
UPDATE headrace.jobs AS j SET run_at = m.now, waiting_for = NULL
FROM m, (SELECT id FROM headrace.jobs WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE SKIP LOCKED) AS named
WHERE j.id = named.id AND j.state = m.queued AND j.waiting_for = 'budget' AND j.run_at > m.now
RETURNING j.id, j.lane, j.route, j.tenant, j.api_key;

-- name: raise_epoch
SELECT headrace.raise_epoch();

-- name: epoch_in_force
SELECT epoch, degraded FROM headrace.money;

-- name: degrade
SELECT headrace.degrade($1);

-- name: hold
SELECT * FROM headrace.hold($1, $2::text[], $3::bigint[], $4::text[]);

-- name: release
DELETE FROM headrace.holds WHERE id = ANY($1::text[]);

-- name: release_old
-- Holds that no intent followed; one that comes this late is refused.
DELETE FROM headrace.holds WHERE held_at < headrace.now() - make_interval(secs => $1);

-- name: budget_use
SELECT * FROM headrace.budget_use(NULL, headrace.now());

-- name: budget_state
-- Every budget with what its present window has settled and in suspense.
SELECT b.scope, b.window_kind, w.name AS window_name, b.limit_nano, coalesce(b.rule, b.policy) AS policy,
       coalesce(sum(s.settled_nano), 0)::bigint AS settled_nano,
       coalesce(sum(s.suspense_nano), 0)::bigint AS suspense_nano
FROM headrace.budgets b
JOIN unnest(headrace.budget_windows(headrace.now())) AS w(name) ON split_part(w.name, ':', 1) = b.window_kind
LEFT JOIN headrace.spend s ON s.scope = b.scope AND s.window_name = ANY(headrace.booked_in(w.name))
GROUP BY b.scope, b.window_kind, w.name, b.limit_nano, coalesce(b.rule, b.policy)
ORDER BY b.scope, b.window_kind;

-- name: counters
-- All that the counters of budgets are made of. One statement, because it is one snapshot: a
-- call that is concluded meanwhile is either open in all of it or booked in all of it.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), present AS MATERIALIZED (
    SELECT split_part(name, ':', 1) AS kind, name,
           headrace.window_ends_in(split_part(name, ':', 1), m.now) AS ends_in
    FROM moment m, unnest(headrace.budget_windows(m.now)) AS name
), budget AS (
    SELECT b.scope, b.window_kind AS kind, w.name AS window, b.limit_nano AS limit,
           coalesce(b.rule, b.policy) AS policy,
           coalesce(sum(s.settled_nano), 0)::bigint AS settled,
           coalesce(sum(s.suspense_nano), 0)::bigint AS suspense
    FROM headrace.budgets b
    JOIN present w ON w.kind = b.window_kind
    LEFT JOIN headrace.spend s ON s.scope = b.scope AND s.window_name = ANY(headrace.booked_in(w.name))
    GROUP BY b.scope, b.window_kind, w.name, b.limit_nano, coalesce(b.rule, b.policy)
), hold AS (
    SELECT hold_id AS id, held_nano AS amount, scopes, headrace.budget_windows(held_at) AS windows
    FROM headrace.calls WHERE state = 'open'
)
SELECT json_build_object(
    'windows', (SELECT coalesce(json_agg(w), '[]') FROM present w),
    'budgets', (SELECT coalesce(json_agg(b), '[]') FROM budget b),
    'holds', (SELECT coalesce(json_agg(h), '[]') FROM hold h))::text;

-- name: forget_windows
-- A page of the sums of days and months that ended so many days ago; of a week its days are booked. A call
-- of such a time that is settled later books its correction alone, which goes the same way.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AT TIME ZONE 'UTC' - make_interval(days => $1) AS past
), gone AS (
    DELETE FROM headrace.spend WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM headrace.spend
        WHERE window_name COLLATE "C" >= 'day:'
          AND window_name COLLATE "C" < (SELECT to_char(past, '"day:"YYYY-MM-DD') FROM moment)
        UNION ALL
        SELECT ctid FROM headrace.spend
        WHERE window_name COLLATE "C" >= 'month:'
          AND window_name COLLATE "C" < (SELECT to_char(past, '"month:"YYYY-MM') FROM moment)
        LIMIT $2))
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: forget_batches
-- The sums of a page of batches of which no job is left, and no budget.
WITH over AS MATERIALIZED (
    SELECT scope FROM (SELECT DISTINCT scope FROM headrace.spend WHERE scope LIKE 'batch:%') AS of_batch
    WHERE NOT EXISTS (SELECT FROM headrace.jobs j WHERE j.batch_id = substr(of_batch.scope, 7)::uuid)
      AND NOT EXISTS (SELECT FROM headrace.budgets b WHERE b.scope = of_batch.scope)
    LIMIT $1
), gone AS (
    DELETE FROM headrace.spend s USING over WHERE s.scope = over.scope RETURNING s.scope
)
SELECT count(DISTINCT scope) FROM gone;

-- name: set_time_zone
SELECT headrace.set_time_zone($1);

-- name: time_zone
-- The one in force, and the one that will be.
SELECT headrace.time_zone_at(headrace.now()) AS now, later.name, later.since
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
    SELECT name, since FROM headrace.time_zones WHERE since > headrace.now() ORDER BY since LIMIT 1) AS later ON true;

-- name: usage
-- The ledger in one row per group; a grouping that is not asked for is null.
SELECT CASE WHEN 'model' = ANY($1::text[]) THEN model END AS model,
       CASE WHEN 'provider' = ANY($1::text[]) THEN provider END AS provider,
       CASE WHEN 'tenant' = ANY($1::text[]) THEN tenant END AS tenant,
       CASE WHEN 'endpoint' = ANY($1::text[]) THEN endpoint END AS endpoint,
       count(*) FILTER (WHERE state <> 'open') AS calls,
       count(*) FILTER (WHERE state = 'answered') AS answered,
       coalesce(sum(prompt_tokens), 0)::bigint AS prompt_tokens,
       coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
       coalesce(sum(completion_tokens), 0)::bigint AS completion_tokens,
       coalesce(sum(reasoning_tokens), 0)::bigint AS reasoning_tokens,
       coalesce(sum(cache_write_tokens), 0)::bigint AS cache_write_tokens,
       coalesce(sum(cost_nano), 0)::bigint AS cost_nano,
       coalesce(sum(suspense_nano), 0)::bigint AS suspense_nano
FROM headrace.calls
WHERE ($2::text IS NULL OR tenant = $2)
  AND ($3::uuid IS NULL OR job_id IN (SELECT id FROM headrace.jobs WHERE batch_id = $3))
GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4;
