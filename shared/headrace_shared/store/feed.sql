-- What the feeder, and whoever does the house's chores, asks of the store.

-- name: due_queues
-- The queues that have a job due, by skipping from one to the next in the index.
WITH RECURSIVE queue AS (
    (SELECT lane, route, tenant, coalesce(api_key, '') AS key FROM headrace.jobs
     WHERE state = 'queued' ORDER BY lane, route, tenant, coalesce(api_key, '') LIMIT 1)
    UNION ALL
    SELECT following.* FROM queue, LATERAL (
        SELECT j.lane, j.route, j.tenant, coalesce(j.api_key, '') AS key FROM headrace.jobs j
        WHERE j.state = 'queued' AND (j.lane, j.route, j.tenant, coalesce(j.api_key, ''))
                                     > (queue.lane, queue.route, queue.tenant, queue.key)
        ORDER BY j.lane, j.route, j.tenant, coalesce(j.api_key, '') LIMIT 1) AS following
)
SELECT lane, route, tenant, nullif(key, '') AS api_key FROM queue,
-- Limited, so that it is looked for in the index queue by queue, whatever the planner takes a backlog for.
LATERAL (
    SELECT FROM headrace.jobs j WHERE j.state = 'queued' AND j.lane = queue.lane AND j.route = queue.route
        AND j.tenant = queue.tenant AND coalesce(j.api_key, '') = queue.key AND j.run_at <= headrace.now()
    LIMIT 1) AS due;

-- name: due_jobs
-- The heads of queues, by each queue's place in the arrays: what their windows in Redis should hold.
SELECT queue.place - 1 AS place, head.id
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) WITH ORDINALITY AS queue (lane, route, tenant, key, place),
LATERAL (
    SELECT j.id, j.run_at FROM headrace.jobs j
    WHERE j.state = 'queued' AND j.lane = queue.lane AND j.route = queue.route AND j.tenant = queue.tenant
        AND coalesce(j.api_key, '') = queue.key AND j.run_at <= headrace.now()
    ORDER BY j.run_at, j.id LIMIT $5) AS head;

-- name: has_jobs
SELECT id FROM headrace.jobs LIMIT 1;

-- name: running_jobs
-- What runs, and for how many seconds its lease holds.
SELECT id, lane, route, tenant, api_key, extract(epoch FROM lease_until - headrace.now())::float8 AS lease
FROM headrace.jobs WHERE state = 'running' AND lease_until > headrace.now();

-- name: depths
-- How many jobs of each lane are due, and for how many seconds the oldest has been.
SELECT lane, count(*) AS jobs, extract(epoch FROM headrace.now() - min(run_at))::float8 AS oldest
FROM headrace.jobs WHERE state = 'queued' AND run_at <= headrace.now() GROUP BY lane;

-- name: lead
-- Take or keep a role; the holder's own name comes back only to the holder.
INSERT INTO headrace.leaders AS l (role, holder, until)
VALUES ($1, $2, headrace.now() + make_interval(secs => $3))
ON CONFLICT (role) DO UPDATE SET holder = excluded.holder, until = excluded.until
WHERE l.holder = excluded.holder OR l.until < headrace.now()
RETURNING holder;

-- name: resign
DELETE FROM headrace.leaders WHERE role = $1 AND holder = $2;

-- name: register_worker
-- One that serves no lane (it runs a single job) has no say in whether the fleet reaches Redis.
INSERT INTO headrace.workers (id, host, slots, lanes, started_at, alive_until, dispatch_until)
VALUES ($1, $2, $3, $4, headrace.now(), headrace.now() + make_interval(secs => $5),
        CASE WHEN cardinality($4::text[]) = 0 THEN '-infinity'::timestamptz END)
ON CONFLICT (id) DO UPDATE SET alive_until = excluded.alive_until, lanes = excluded.lanes
RETURNING (SELECT coalesce(max(version), 0) FROM headrace.configurations) AS configuration;

-- name: reach_dispatch
UPDATE headrace.workers SET dispatch_until = headrace.now() + make_interval(secs => $2) WHERE id = $1
RETURNING (SELECT degraded FROM headrace.money);

-- name: forget_worker
DELETE FROM headrace.workers WHERE id = $1;

-- name: live_workers
SELECT id, host, slots, lanes FROM headrace.workers WHERE alive_until > headrace.now() ORDER BY id;

-- name: make_partitions
SELECT headrace.make_partitions(headrace.now(), 4);

-- name: drop_partitions
SELECT headrace.drop_partitions(headrace.now() - make_interval(days => $1));

-- name: forget_expired
-- The small tables' share of retention: old keys, callbacks that ended long ago, dead workers.
WITH keys AS (
    DELETE FROM headrace.idempotency WHERE expires_at < headrace.now() RETURNING 1
), callbacks AS (
    DELETE FROM headrace.deliveries
    WHERE ended_at < headrace.now() - make_interval(days => $1) RETURNING 1
), ended AS (
    -- Of batches of which no job is left, or all have ended long ago.
    DELETE FROM headrace.budgets b
    WHERE b.scope LIKE 'batch:%' AND b.changed_at < headrace.now() - make_interval(days => $1)
      AND NOT EXISTS (SELECT FROM headrace.jobs j WHERE j.batch_id = substr(b.scope, 7)::uuid AND (
              j.ended_at IS NULL OR j.ended_at > headrace.now() - make_interval(days => $1)))
    RETURNING 1
), pauses AS (
    DELETE FROM headrace.pauses WHERE until < headrace.now() RETURNING 1
), gone AS (
    DELETE FROM headrace.workers WHERE alive_until < headrace.now() - interval '1 day' RETURNING 1
)
SELECT (SELECT count(*) FROM keys) + (SELECT count(*) FROM callbacks) + (SELECT count(*) FROM ended)
       + (SELECT count(*) FROM pauses) + (SELECT count(*) FROM gone);
