-- Suspense: calls of which nobody knows whether they were billed, and decisions about them.

-- name: list_suspense
-- Oldest first.
SELECT job_id, run, call, tenant, provider, model, error_class, suspense_nano, ended_at
FROM headrace.calls WHERE state = 'suspense' AND ($2::text IS NULL OR tenant = $2)
ORDER BY ended_at LIMIT $1;

-- name: settle_suspense
-- Decide what a page of calls came to: their worst case ($6 null), or so much each. The ledger and
-- the sums change together. An answer that comes later corrects both.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), meant AS MATERIALIZED (
    SELECT c.job_id, c.run, c.call FROM headrace.calls c, moment
    WHERE c.state = 'suspense' AND c.ended_at <= moment.now - make_interval(secs => $1)
      AND ($2::text IS NULL OR c.tenant = $2)
      AND ($3::uuid[] IS NULL OR EXISTS (
              SELECT FROM unnest($3::uuid[], $4::int[], $5::int[]) AS named(job_id, run, call)
              WHERE named.job_id = c.job_id
                AND (named.run IS NULL OR (named.run = c.run AND named.call = c.call))))
    ORDER BY c.ended_at LIMIT $8
), chosen AS MATERIALIZED (
    -- In the order in which workers lock the calls that they conclude.
    SELECT c.job_id, c.run, c.call, c.suspense_nano AS suspense, coalesce($6, c.suspense_nano) AS cost
    FROM headrace.calls c JOIN meant m ON m.job_id = c.job_id AND m.run = c.run AND m.call = c.call
    WHERE c.state = 'suspense' ORDER BY c.job_id, c.run, c.call FOR UPDATE OF c
), settled AS (
    UPDATE headrace.calls AS c SET
        state = 'settled', cost_nano = chosen.cost, suspense_nano = 0, settled_by = $7
    FROM chosen WHERE c.job_id = chosen.job_id AND c.run = chosen.run AND c.call = chosen.call
    RETURNING c.job_id, c.run, c.call, c.tenant, c.scopes, date_trunc('minute', c.held_at, 'UTC') AS held_in,
              chosen.suspense, chosen.cost
), booked AS (
    -- Sorted, so that nobody locks the same sums in another order.
    INSERT INTO headrace.spend AS s (scope, window_name, shard, settled_nano, suspense_nano)
    SELECT scope, name, 0, sum(cost), -sum(suspense)
    FROM settled, unnest(scopes) AS scope, unnest(headrace.windows(held_in)) AS name
    GROUP BY scope, name ORDER BY scope, name
    ON CONFLICT (scope, window_name, shard) DO UPDATE SET
        settled_nano = s.settled_nano + excluded.settled_nano,
        suspense_nano = s.suspense_nano + excluded.suspense_nano
)
SELECT job_id, run, call, tenant, suspense, cost FROM settled ORDER BY job_id, run, call;
