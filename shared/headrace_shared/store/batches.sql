-- Batches: a file's content and its tenant.
--
-- A line's job is the newest that was made of it: one that was replaced counts only where
-- money does.

-- name: find_batch
-- The newest batch of a content.
SELECT id, tenant, name, generation, total, created_at FROM headrace.batches
WHERE tenant = $1 AND digest = $2 ORDER BY generation DESC LIMIT 1;

-- name: open_batch
-- The newest batch of this content, or a new one when there is none or `again` asks for it.
-- No row: somebody else made it at the same moment.
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
SELECT id, false FROM latest WHERE NOT $6;

-- name: get_batch
SELECT id, tenant, name, generation, total, created_at FROM headrace.batches WHERE id = $1;

-- name: batch_progress
-- An ending that failed is an attempt too, but not one that was made again.
SELECT count(*) AS enqueued,
       count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
       count(*) FILTER (WHERE state IN ('failed', 'cancelled', 'expired')) AS failed,
       count(*) FILTER (WHERE state = 'running') AS running,
       coalesce(sum(attempts - CASE WHEN state = 'failed' THEN 1 ELSE 0 END)
                FILTER (WHERE attempts > 0), 0)::bigint AS retried
FROM headrace.jobs WHERE batch_id = $1 AND replaced_by IS NULL;

-- name: batch_tags
-- All of its jobs have those of the first.
SELECT tags FROM headrace.jobs WHERE batch_id = $1 ORDER BY line LIMIT 1;

-- name: next_of_batch
SELECT id FROM headrace.jobs WHERE batch_id = $1 AND state IN ('queued', 'running')
ORDER BY state = 'running', line LIMIT 1;

-- name: batch_cost
-- Job by job along the ledger's key: its cost is the batch's size, however long the ledger.
-- What replaced jobs cost was spent as well.
SELECT coalesce(sum(b.prompt_tokens), 0)::bigint AS prompt_tokens,
       coalesce(sum(b.completion_tokens), 0)::bigint AS completion_tokens,
       coalesce(sum(b.cost_nano), 0)::bigint AS cost_nano,
       coalesce(sum(b.suspense_nano), 0)::bigint AS suspense_nano
FROM headrace.jobs j CROSS JOIN LATERAL (
    SELECT sum(c.prompt_tokens) AS prompt_tokens, sum(c.completion_tokens) AS completion_tokens,
           sum(c.cost_nano) AS cost_nano, sum(c.suspense_nano) AS suspense_nano
    FROM headrace.calls c WHERE c.job_id = j.id
) b
WHERE j.batch_id = $1 AND j.run > 0;

-- name: batch_results
-- A page of ended jobs in the order of the file, after line $2: each with the call that is
-- its result, or, where it has none, with its last call.
SELECT j.id, j.line, j.custom_id, j.state, j.error_class, j.error,
       c.status, c.error_class AS call_error_class, c.request_id, c.answer
FROM headrace.jobs j
LEFT JOIN LATERAL (
    SELECT c.status, c.error_class, c.request_id, c.answer FROM headrace.calls c
    WHERE c.job_id = coalesce(j.answered_by, j.id)
      AND (j.result_run IS NULL OR (c.run = j.result_run AND c.call = j.result_call))
    ORDER BY c.run DESC, c.call DESC LIMIT 1
) c ON true
WHERE j.batch_id = $1 AND j.line > $2 AND j.ended_at IS NOT NULL AND j.replaced_by IS NULL
ORDER BY j.line LIMIT $3;

-- name: known_lines
SELECT line FROM headrace.jobs WHERE batch_id = $1 AND line BETWEEN $2 AND $3 AND replaced_by IS NULL;

-- name: cancel_batch
-- A page of a batch's jobs: queued ones end here, running ones are told by the next
-- heartbeat. A row that is being written at this moment is left to the next page.
WITH chosen AS (
    SELECT id FROM headrace.jobs
    WHERE batch_id = $1 AND state IN ('queued', 'running') AND NOT cancel_requested
    ORDER BY line LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE headrace.jobs AS j SET
    state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END,
    ended_at = CASE state WHEN 'queued' THEN headrace.now() END,
    error_class = CASE state WHEN 'queued' THEN 'cancelled' ELSE error_class END,
    error = CASE state WHEN 'queued' THEN 'its batch was cancelled' ELSE error END,
    waiting_for = CASE state WHEN 'queued' THEN NULL ELSE waiting_for END,
    cancel_requested = true
FROM chosen WHERE j.id = chosen.id
RETURNING j.id, j.lane, j.route, j.tenant, j.api_key, j.state;

-- name: uncancelled
SELECT EXISTS (
    SELECT FROM headrace.jobs
    WHERE batch_id = $1 AND state IN ('queued', 'running') AND NOT cancel_requested
) AS any;
