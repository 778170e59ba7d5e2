-- How jobs are taken and kept: claim, look at what a claim did not get, heartbeat.
--
-- Rows that are asked for by id are found by it: a state that is compared with a column, and not
-- with a constant, keeps the planner from reading all that is queued, or runs, in a partial index.

-- name: claim_jobs
-- The first claim of a job starts its timeout and ends its time to live.
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now, 'queued' AS queued, headrace.paused_scopes() AS paused
)
UPDATE headrace.jobs AS j SET
    state = 'running', run = j.run + 1, worker = $3, lease_until = m.now + make_interval(secs => $2),
    started_at = coalesce(j.started_at, m.now), waiting_for = NULL, alone = $4, start_by = NULL,
    end_by = CASE WHEN j.started_at IS NULL THEN least(j.end_by, m.now + j.timeout) ELSE j.end_by END
FROM unnest($1::uuid[]) AS wanted(id), m
WHERE j.id = wanted.id AND j.state = m.queued AND j.run_at <= m.now
  AND (j.crashes < 2 OR $4)
  AND j.endpoint = ANY($5::text[]) AND j.needs <@ $6::text[]
  AND (least(j.start_by, j.end_by) > m.now) IS NOT FALSE
  AND (m.paused IS NULL OR NOT m.paused && headrace.pausable_as(j.lane, j.route, j.tenant))
RETURNING j.id, j.run, j.lane, j.route, j.tenant, j.endpoint, j.body, j.attempts, j.max_attempts,
          j.created_at, greatest(m.now - j.run_at, interval '0') AS waited,
          j.end_by - m.now AS time_left,
          j.webhook IS NOT NULL AS has_webhook, j.traceparent, j.flight,
          CASE WHEN j.endpoint LIKE 'handler:%' THEN j.metadata END AS metadata,
          j.api_key, j.tags, j.batch_id, j.max_cost_nano,
          -- What earlier runs cost, may have cost, or may still cost.
          CASE WHEN j.run > 1 AND j.max_cost_nano IS NOT NULL THEN (
              SELECT coalesce(sum(c.cost_nano + c.suspense_nano
                                  + CASE c.state WHEN 'open' THEN c.held_nano ELSE 0 END), 0)::bigint
              FROM headrace.calls c WHERE c.job_id = j.id
          ) ELSE 0 END AS spent_nano,
          CASE WHEN j.run > 1 THEN (
              SELECT ARRAY[c.run, c.call] FROM headrace.calls c
              WHERE c.job_id = j.id AND c.state = 'answered' AND c.error_class IS NULL AND c.step IS NULL
              ORDER BY c.run, c.call LIMIT 1
          ) END AS answer,
          (SELECT coalesce(max(version), 0) FROM headrace.configurations) AS configuration;

-- name: pick_due
-- The next jobs of these lanes as they wait in the store, lanes and tenants in turn by their weights, the
-- queues of a tenant in turn: for workers that have no Redis to ask. They are claimed like those that it
-- names. What a tenant or an API key may run at a time is counted as it is at this moment.
WITH RECURSIVE moment AS MATERIALIZED (
    SELECT headrace.now() AS now, headrace.paused_scopes() AS paused
), served AS MATERIALIZED (
    SELECT * FROM unnest($1::text[], $2::float8[]) AS s(lane, weight)
), queue AS (
    SELECT first.* FROM served, LATERAL (
        SELECT j.lane, j.route, j.tenant, coalesce(j.api_key, '') AS key FROM headrace.jobs j
        WHERE j.state = 'queued' AND j.lane = served.lane
        ORDER BY j.route, j.tenant, coalesce(j.api_key, '') LIMIT 1) AS first
    UNION ALL
    SELECT following.* FROM queue, LATERAL (
        SELECT j.lane, j.route, j.tenant, coalesce(j.api_key, '') AS key FROM headrace.jobs j
        WHERE j.state = 'queued' AND j.lane = queue.lane
          AND (j.route, j.tenant, coalesce(j.api_key, '')) > (queue.route, queue.tenant, queue.key)
        ORDER BY j.route, j.tenant, coalesce(j.api_key, '') LIMIT 1) AS following
), head AS MATERIALIZED (
    SELECT head.*, queue.lane, queue.tenant, queue.key,
           row_number() OVER (PARTITION BY queue.lane, queue.route, queue.tenant, queue.key
                              ORDER BY head.run_at, head.id) AS place
    FROM queue, moment, LATERAL (
        SELECT j.id, j.run_at, j.crashes >= 2 AS suspect FROM headrace.jobs j
        WHERE j.state = 'queued' AND j.lane = queue.lane AND j.route = queue.route AND j.tenant = queue.tenant
          AND coalesce(j.api_key, '') = queue.key
          AND j.run_at <= moment.now AND j.endpoint = ANY($4::text[]) AND j.needs <@ $5::text[]
          AND (j.crashes < 2 OR $6)
          AND (least(j.start_by, j.end_by) > moment.now) IS NOT FALSE
        ORDER BY j.run_at, j.id LIMIT $3) AS head
    WHERE moment.paused IS NULL
       OR NOT moment.paused && headrace.pausable_as(queue.lane, queue.route, queue.tenant)
), terms AS MATERIALIZED (
    SELECT t.tenant, t.weight, t.most - CASE WHEN t.most IS NOT NULL THEN (
        SELECT count(*) FROM headrace.jobs j WHERE j.state = 'running' AND j.tenant = t.tenant) END AS room
    FROM unnest($7::text[], $8::float8[], $9::int[]) AS t(tenant, weight, most)
), capped AS MATERIALIZED (
    SELECT k.key, k.most - (
        SELECT count(*) FROM headrace.jobs j WHERE j.state = 'running' AND j.api_key = k.key) AS room
    FROM unnest($10::text[], $11::int[]) AS k(key, most)
), allowed AS (
    -- What a key's cap keeps back is nowhere in its tenant's line.
    SELECT one.* FROM (
        SELECT head.*, row_number() OVER (PARTITION BY head.key ORDER BY head.place, random()) AS of_key FROM head) AS one
    LEFT JOIN capped ON capped.key = one.key
    WHERE (one.of_key <= capped.room) IS NOT FALSE
), line AS (
    SELECT allowed.*, coalesce(terms.weight, 1) AS weight, terms.room,
           row_number() OVER (PARTITION BY allowed.lane, allowed.tenant ORDER BY allowed.place, random()) AS behind,
           row_number() OVER (PARTITION BY allowed.tenant ORDER BY allowed.place, random()) AS one_more
    FROM allowed LEFT JOIN terms ON terms.tenant = allowed.tenant
), turn AS (
    SELECT line.id, line.lane, line.suspect,
           row_number() OVER (PARTITION BY line.lane ORDER BY line.behind / line.weight, random())
           / served.weight AS turn
    FROM line JOIN served ON served.lane = line.lane
    WHERE (line.one_more <= line.room) IS NOT FALSE
)
SELECT j.id, j.lane, turn.suspect FROM turn JOIN headrace.jobs j ON j.id = turn.id
WHERE j.state = 'queued' ORDER BY turn.turn LIMIT $3
-- Those that somebody else claims at this moment are passed over, and not waited for.
FOR UPDATE OF j SKIP LOCKED;

-- name: look_up
-- Where the ids stand that a claim did not get, so that the dispatch can be put right.
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now, headrace.paused_scopes() AS paused
)
SELECT j.id, j.lane, j.route, j.tenant, j.api_key,
       CASE WHEN j.ended_at IS NOT NULL THEN 'ended'
            WHEN j.state = 'running' THEN 'running'
            WHEN (least(j.start_by, j.end_by) > m.now) IS FALSE THEN 'overdue'
            WHEN j.run_at > m.now THEN 'early'
            WHEN m.paused && headrace.pausable_as(j.lane, j.route, j.tenant) THEN 'paused'
            WHEN NOT (j.endpoint = ANY($2::text[]) AND j.needs <@ $3::text[]) THEN 'unknown'
            WHEN j.crashes >= 2 THEN 'suspect'
            ELSE 'due' END AS standing,
       greatest(extract(epoch FROM
           CASE j.state WHEN 'queued' THEN j.run_at WHEN 'running' THEN j.lease_until END - m.now), 0)::float8
       AS due_in
FROM headrace.jobs j, m WHERE j.id = ANY($1::uuid[]);

-- name: put_off
-- Jobs that this worker does not know how to run wait for one that does.
UPDATE headrace.jobs AS j SET run_at = headrace.now() + make_interval(secs => $2), waiting_for = 'worker'
FROM (SELECT id FROM headrace.jobs WHERE id = ANY($1::uuid[]) AND state = 'queued'
      ORDER BY id FOR UPDATE SKIP LOCKED) AS unknown
WHERE j.id = unknown.id;

-- name: heartbeat
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now, 'running' AS running
)
UPDATE headrace.jobs AS j SET lease_until = m.now + make_interval(secs => held.lease)
FROM unnest($1::uuid[], $2::int[], $3::float8[]) AS held(id, run, lease), m
WHERE j.id = held.id AND j.run = held.run AND j.state = m.running
RETURNING j.id, j.cancel_requested;

-- name: is_run_by
SELECT EXISTS (SELECT FROM headrace.jobs WHERE id = $1 AND worker = $2 AND state = 'running');
