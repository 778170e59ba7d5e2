-- What a handler has finished when its run is interrupted, so that the next run does not do it again.

-- name: recall
-- All that earlier runs left: steps by their names, calls by their names and what they asked.
SELECT name, NULL::bytea AS digest, value, NULL::text AS model FROM headrace.checkpoints
WHERE job_id = $1 AND run < $2
UNION ALL
SELECT * FROM (
    SELECT step, digest, answer, model FROM headrace.calls
    WHERE job_id = $1 AND run < $2 AND state = 'answered' AND error_class IS NULL AND step IS NOT NULL
    ORDER BY run, call) AS answered;

-- name: keep
-- The lock is what fences: a run that is taken back while this is written has written it before
-- the next one reads, or not at all. False when the run does not own its row any more.
WITH owner AS MATERIALIZED (
    SELECT id, run FROM headrace.jobs WHERE id = $1 AND run = $2 AND state = 'running' FOR SHARE
), kept AS (
    -- A conflict is this very statement, whose first answer was lost on its way.
    INSERT INTO headrace.checkpoints (job_id, name, run, value, made_at)
    SELECT id, $3, run, $4, headrace.now() FROM owner
    ON CONFLICT (job_id, name) DO NOTHING
)
SELECT EXISTS (SELECT FROM owner) AS owned;

-- name: tell
UPDATE headrace.jobs SET progress = $3, progress_note = $4
WHERE id = $1 AND run = $2 AND state = 'running';
