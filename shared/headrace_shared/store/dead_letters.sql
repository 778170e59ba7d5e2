-- Dead letters: jobs that ended without a result, and the jobs that take their places.
--
-- A retried job keeps its ending and points at the newer one. What a line of a batch, or an
-- idempotency key, stands for is always the newest.

-- name: failure_groups
-- The failures that nobody has retried yet, those of one kind together; the newest is the example.
SELECT g.fingerprint, g.error_class, g.count, g.first, g.last, g.job_id,
       (SELECT error FROM headrace.jobs WHERE id = g.job_id) AS example
FROM (
    SELECT headrace.fingerprint(error_class, error) AS fingerprint, error_class, count(*) AS count,
           min(ended_at) AS first, max(ended_at) AS last, max(id::text)::uuid AS job_id
    FROM headrace.jobs
    WHERE state IN ('failed', 'expired') AND replaced_by IS NULL AND ended_at >= $1 AND ended_at <= $2
      AND ($3::text IS NULL OR tenant = $3) AND ($4::uuid[] IS NULL OR batch_id = ANY($4))
      AND ($5::text IS NULL OR error_class = $5)
      AND ($6::text IS NULL OR headrace.fingerprint(error_class, error) = $6)
    GROUP BY 1, 2
) g ORDER BY g.count DESC, g.last DESC, g.fingerprint;

-- name: dead_page
-- A page of them in the order they ended, after (ended_at, id) = ($1, $7).
SELECT id, ended_at FROM headrace.jobs
WHERE state IN ('failed', 'expired') AND replaced_by IS NULL AND (ended_at, id) > ($1, $7::uuid) AND ended_at <= $2
  AND ($3::text IS NULL OR tenant = $3) AND ($4::uuid[] IS NULL OR batch_id = ANY($4))
  AND ($5::text IS NULL OR error_class = $5)
  AND ($6::text IS NULL OR headrace.fingerprint(error_class, error) = $6)
ORDER BY ended_at, id LIMIT $8;

-- name: named
-- What ids are of, jobs or batches; one that is of neither does not come back.
SELECT id, state, replaced_by, NULL AS total FROM headrace.jobs WHERE id = ANY($1::uuid[])
UNION ALL
SELECT id, NULL, NULL, total FROM headrace.batches WHERE id = ANY($1::uuid[]);

-- name: store_time
SELECT headrace.now() AS now;

-- name: retry_jobs
-- New jobs in the places of ended ones, all or none. A row's lock, and that it was replaced by
-- nobody, make it happen once: who comes second finds it replaced, and leaves it out.
-- No row comes back when the configuration is not the one that a new body was checked against.
WITH moment AS MATERIALIZED (
    SELECT headrace.require_recent($2::uuid[]) AS now
    WHERE $6::int IS NULL OR (SELECT coalesce(max(version), 0) FROM headrace.configurations) = $6
), old AS MATERIALIZED (
    SELECT j.id, w.fresh, moment.now FROM moment, unnest($1::uuid[], $2::uuid[]) AS w(id, fresh)
    JOIN headrace.jobs j ON j.id = w.id
    WHERE j.state IN ('failed', 'expired', 'cancelled') AND j.replaced_by IS NULL
    ORDER BY j.id FOR UPDATE OF j
), replaced AS (
    UPDATE headrace.jobs AS j SET replaced_by = old.fresh FROM old WHERE j.id = old.id
), keys AS MATERIALIZED (
    -- Sorted, like the insertion of jobs locks them.
    SELECT k.tenant, k.key, old.fresh FROM headrace.idempotency k JOIN old ON old.id = k.job_id
    ORDER BY k.tenant, k.key FOR UPDATE OF k
), moved AS (
    UPDATE headrace.idempotency AS k SET job_id = keys.fresh, digest = coalesce($5, k.digest)
    FROM keys WHERE k.tenant = keys.tenant AND k.key = keys.key
)
INSERT INTO headrace.jobs
    (id, tenant, lane, route, endpoint, body, max_attempts, run_at, webhook, metadata, traceparent,
     batch_id, line, custom_id, created_at, ttl, start_by, end_by, timeout, needs, replaces,
     api_key, tags, max_cost_nano)
SELECT old.fresh, j.tenant, j.lane, coalesce($4, j.route), j.endpoint, coalesce($3, j.body), j.max_attempts,
       old.now, j.webhook, j.metadata, j.traceparent, j.batch_id, j.line, j.custom_id, old.now,
       j.ttl, old.now + j.ttl,
       coalesce($7, CASE
           -- What the first claim made of a timeout is no deadline.
           WHEN j.end_by = j.started_at + j.timeout THEN NULL
           WHEN j.end_by > old.now THEN j.end_by END),
       j.timeout,
       ARRAY(SELECT DISTINCT unnest(j.needs || $8::text[])), j.id,
       j.api_key, j.tags, j.max_cost_nano
FROM old JOIN headrace.jobs j ON j.id = old.id
RETURNING replaces, id, lane, route, tenant, api_key;
