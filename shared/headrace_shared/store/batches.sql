-- Batches: a file's content and its tenant.

-- name: open_batch
-- The newest batch of this content, or a new one when there is none or `again` asks for it.
WITH latest AS (
    SELECT id, generation FROM headrace.batches
    WHERE tenant = $2 AND digest = $3 ORDER BY generation DESC LIMIT 1
), made AS (
    INSERT INTO headrace.batches (id, tenant, digest, generation, name, total, created_at)
    SELECT $1, $2, $3, coalesce((SELECT generation FROM latest), 0) + 1, $4, $5, headrace.now()
    WHERE $6 OR NOT EXISTS (SELECT FROM latest)
    ON CONFLICT (tenant, digest, generation) DO NOTHING
    RETURNING id
)
SELECT id, true AS created FROM made
UNION ALL
SELECT id, false FROM latest WHERE NOT EXISTS (SELECT FROM made);

-- name: get_batch
SELECT id, tenant, name, generation, total, created_at FROM headrace.batches WHERE id = $1;

-- name: batch_progress
SELECT count(*) AS enqueued,
       count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
       count(*) FILTER (WHERE state IN ('failed', 'cancelled', 'expired')) AS failed,
       count(*) FILTER (WHERE state = 'running') AS running,
       coalesce(sum(attempts) FILTER (WHERE attempts > 0), 0)::bigint AS retried,
       max(line) AS last_line
FROM headrace.jobs WHERE batch_id = $1;

-- name: batch_cost
SELECT coalesce(sum(c.prompt_tokens), 0)::bigint AS prompt_tokens,
       coalesce(sum(c.completion_tokens), 0)::bigint AS completion_tokens,
       coalesce(sum(c.cost_nano), 0)::bigint AS cost_nano,
       coalesce(sum(c.suspense_nano), 0)::bigint AS suspense_nano
FROM headrace.jobs j JOIN headrace.calls c ON c.job_id = j.id WHERE j.batch_id = $1;

-- name: batch_results
-- A page of ended jobs in the order of the file, after line $2.
SELECT j.id, j.line, j.custom_id, j.state, j.error_class, j.error, c.status, c.request_id, c.answer
FROM headrace.jobs j
LEFT JOIN headrace.calls c ON c.job_id = j.id AND c.run = j.result_run AND c.call = j.result_call
WHERE j.batch_id = $1 AND j.line > $2 AND j.ended_at IS NOT NULL
ORDER BY j.line LIMIT $3;

-- name: batch_failures
-- The last refusal of each failed job, for the error file: what the provider said.
SELECT DISTINCT ON (c.job_id) c.job_id, c.status, c.request_id, c.answer
FROM headrace.calls c WHERE c.job_id = ANY($1::uuid[]) AND c.state = 'failed'
ORDER BY c.job_id, c.run DESC, c.call DESC;

-- name: known_lines
SELECT line FROM headrace.jobs WHERE batch_id = $1 AND line BETWEEN $2 AND $3;

-- name: cancel_batch
UPDATE headrace.jobs SET
    state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END,
    ended_at = CASE state WHEN 'queued' THEN headrace.now() END,
    error_class = CASE state WHEN 'queued' THEN 'cancelled' ELSE error_class END,
    error = CASE state WHEN 'queued' THEN 'its batch was cancelled' ELSE error END,
    cancel_requested = true
WHERE batch_id = $1 AND state IN ('queued', 'running')
RETURNING id, lane, route, tenant, state;
