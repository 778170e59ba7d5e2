-- What producers do with jobs: insert, read, cancel.

-- name: insert_jobs
-- All or nothing: no row comes back when the configuration is not the one the jobs were
-- checked against. An idempotency key that is known gives the job it belongs to.
WITH moment AS MATERIALIZED (
    SELECT headrace.require_recent($1::uuid[]) AS now
    WHERE (SELECT coalesce(max(version), 0) FROM headrace.configurations) = $28
), input AS MATERIALIZED (
    SELECT i.*, moment.now FROM moment, unnest(
        $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::int[],
        $8::float8[], $9::text[], $10::bytea[], $11::text[], $12::text[], $13::text[],
        $14::uuid[], $15::int[], $16::text[],
        $17::timestamptz[], $18::float8[], $19::timestamptz[], $20::float8[], $21::text[],
        $22::text[], $23::text[], $24::bigint[], $25::bytea[]
    ) AS i(id, tenant, lane, route, endpoint, body, max_attempts,
           delay, key, digest, webhook, metadata, traceparent, batch_id, line, custom_id,
           run_at, ttl, deadline, timeout, needs, api_key, tags, max_cost, flight)
), keyed AS (
    -- Sorted, so that two producers lock the same keys in the same order.
    INSERT INTO headrace.idempotency AS known (tenant, key, job_id, digest, expires_at)
    SELECT DISTINCT ON (tenant, key) tenant, key, id, digest, now + make_interval(secs => $26)
    FROM input WHERE key IS NOT NULL ORDER BY tenant, key, id
    ON CONFLICT (tenant, key) DO UPDATE SET
        -- All three look at one moment, the excluded row's: a clock that is read thrice may disagree.
        job_id = CASE WHEN known.expires_at <= excluded.expires_at - make_interval(secs => $26)
                      THEN excluded.job_id ELSE known.job_id END,
        digest = CASE WHEN known.expires_at <= excluded.expires_at - make_interval(secs => $26)
                      THEN excluded.digest ELSE known.digest END,
        expires_at = CASE WHEN known.expires_at <= excluded.expires_at - make_interval(secs => $26)
                          THEN excluded.expires_at ELSE known.expires_at END
    RETURNING tenant, key, job_id, digest
), fresh AS (
    INSERT INTO headrace.jobs
        (id, tenant, lane, route, endpoint, body, max_attempts, run_at, webhook, metadata,
         traceparent, batch_id, line, custom_id, created_at, ttl, start_by, end_by, timeout, needs,
         api_key, tags, max_cost_nano, flight)
    SELECT i.id, i.tenant, i.lane, i.route, i.endpoint, i.body, i.max_attempts,
           due.at, i.webhook, i.metadata::jsonb,
           i.traceparent, i.batch_id, i.line, i.custom_id, i.now,
           make_interval(secs => i.ttl), greatest(due.at, i.now) + make_interval(secs => i.ttl),
           i.deadline, make_interval(secs => i.timeout),
           string_to_array(i.needs, E'\n'), i.api_key, string_to_array(i.tags, E'\n'), i.max_cost, i.flight
    FROM input i LEFT JOIN keyed k ON k.tenant = i.tenant AND k.key = i.key,
         LATERAL (SELECT coalesce(i.run_at, i.now + make_interval(secs => i.delay)) AS at) AS due
    WHERE i.key IS NULL OR k.job_id = i.id
    RETURNING id, lane, route, tenant
), notified AS (
    SELECT count(pg_notify('headrace', '')) FROM moment WHERE $27
)
SELECT i.id AS asked, coalesce(k.job_id, i.id) AS id, k.job_id IS DISTINCT FROM i.id AND k.job_id IS NOT NULL AS existed,
       k.digest IS DISTINCT FROM i.digest AND k.job_id IS NOT NULL AS conflict,
       greatest(extract(epoch FROM coalesce(i.run_at - i.now, make_interval(secs => i.delay))), 0)::float8 AS due_in,
       (SELECT * FROM notified) AS notified
FROM input i LEFT JOIN keyed k ON k.tenant = i.tenant AND k.key = i.key;

-- name: get_job
SELECT id, tenant, lane, route, endpoint, state, run, attempts, max_attempts, crashes, created_at,
       run_at, started_at, ended_at, waiting_for, error_class, error, webhook, batch_id, custom_id, metadata,
       start_by, end_by, timeout, replaces, replaced_by, progress, progress_note, api_key, tags
FROM headrace.jobs WHERE id = $1;

-- name: get_ending
SELECT j.id, j.tenant, j.lane, j.route, j.endpoint, j.state, j.run, j.attempts, j.max_attempts, j.crashes,
       j.created_at, j.run_at, j.started_at, j.ended_at, j.waiting_for, j.error_class, j.error, j.webhook,
       j.batch_id, j.custom_id, j.metadata, j.start_by, j.end_by, j.timeout, j.replaces, j.replaced_by,
       j.progress, j.progress_note, j.api_key, j.tags, j.answered_by, k.value AS output,
       a.run AS answer_run, a.call AS answer_call, a.provider, a.model, a.answer, a.status, a.request_id,
       b.prompt_tokens, b.cached_tokens, b.completion_tokens, b.reasoning_tokens,
       b.cache_write_tokens, b.cost_nano, b.suspense_nano
FROM headrace.jobs j
LEFT JOIN headrace.calls a ON a.job_id = coalesce(j.answered_by, j.id) AND a.run = j.result_run AND a.call = j.result_call
LEFT JOIN headrace.checkpoints k ON k.job_id = j.id AND k.name = '' AND k.run = j.result_run AND j.result_call IS NULL
CROSS JOIN LATERAL (
    SELECT coalesce(sum(c.prompt_tokens), 0)::bigint AS prompt_tokens,
           coalesce(sum(c.cached_tokens), 0)::bigint AS cached_tokens,
           coalesce(sum(c.completion_tokens), 0)::bigint AS completion_tokens,
           coalesce(sum(c.reasoning_tokens), 0)::bigint AS reasoning_tokens,
           coalesce(sum(c.cache_write_tokens), 0)::bigint AS cache_write_tokens,
           coalesce(sum(c.cost_nano), 0)::bigint AS cost_nano,
           coalesce(sum(c.suspense_nano), 0)::bigint AS suspense_nano
    FROM headrace.calls c WHERE c.job_id = j.id
) b
WHERE j.id = $1;

-- name: list_jobs
-- Newest first; the cursor is the last id of the page before.
SELECT id, tenant, lane, route, endpoint, state, run, attempts, max_attempts, crashes, created_at,
       run_at, started_at, ended_at, waiting_for, error_class, error, webhook, batch_id, custom_id, metadata,
       start_by, end_by, timeout, replaces, replaced_by, progress, progress_note, api_key, tags
FROM headrace.jobs
WHERE tenant = $1 AND id < $2 AND ($3::text IS NULL OR state = $3) AND ($4::uuid IS NULL OR batch_id = $4)
ORDER BY id DESC LIMIT $5;

-- name: list_attempts
SELECT a.run, a.number, a.outcome, a.error_class, a.error, a.worker, a.ended_at, c.provider, c.model
FROM headrace.attempts a
LEFT JOIN headrace.calls c ON c.job_id = a.job_id AND c.run = a.run AND c.call = a.call
WHERE a.job_id = $1 ORDER BY a.number, a.run;

-- name: cancel_job
-- A queued job ends here; a running one is told by its worker's next heartbeat.
WITH cancelled AS (
    UPDATE headrace.jobs SET
        state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END,
        ended_at = CASE state WHEN 'queued' THEN headrace.now() END,
        error_class = CASE state WHEN 'queued' THEN 'cancelled' ELSE error_class END,
        error = CASE state WHEN 'queued' THEN 'cancelled before it ran' ELSE error END,
        waiting_for = CASE state WHEN 'queued' THEN NULL ELSE waiting_for END,
        cancel_requested = true
    WHERE id = $1 AND state IN ('queued', 'running')
    RETURNING id, lane, route, tenant, state
)
SELECT j.lane, j.route, j.tenant, j.api_key, coalesce(c.state, j.state) AS state, c.id IS NOT NULL AS changed
FROM headrace.jobs j LEFT JOIN cancelled c ON c.id = j.id WHERE j.id = $1;
