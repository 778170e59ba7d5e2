-- What `headrace chaos` asks of the store: while a run goes on, for the audit, and of servers that are given.

-- name: budgets
SELECT b.scope, b.limit_nano AS limit,
       (SELECT coalesce(sum(s.settled_nano + s.suspense_nano), 0) FROM headrace.spend s
        WHERE s.scope = b.scope AND s.window_name = 'total')
     + (SELECT coalesce(sum(c.held_nano), 0) FROM headrace.calls c
        WHERE c.state = 'open' AND b.scope = ANY(c.scopes)) AS used
FROM headrace.budgets b WHERE b.window_kind = 'total'

-- name: holdings
SELECT id AS job, run, worker, headrace.now() AS at FROM headrace.jobs
WHERE state = 'running' AND tenant = ANY($1::text[])

-- name: still_held
SELECT count(*) AS held FROM headrace.jobs j JOIN unnest($1::uuid[], $2::int[]) AS held(id, run) USING (id)
WHERE j.run = held.run AND j.state = 'running'

-- name: endings
SELECT j.id AS job, j.state, j.run, j.result_run, j.result_call, j.ended_at, md5(c.answer) AS answer
FROM headrace.jobs j
LEFT JOIN headrace.calls c ON c.job_id = coalesce(j.answered_by, j.id) AND c.run = j.result_run AND c.call = j.result_call
WHERE j.tenant = ANY($1::text[]) AND j.ended_at > $2

-- name: progress
SELECT count(*) AS jobs, count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended,
       count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
       count(*) FILTER (WHERE state = 'failed') AS failed,
       count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE state = 'running') AS running,
       (SELECT count(*) FROM headrace.deliveries
        WHERE state = 'pending' AND tenant = ANY($1::text[])) AS undelivered,
       (SELECT count(*) FROM headrace.calls WHERE state = 'open' AND tenant = ANY($1::text[])) AS open_calls
FROM headrace.jobs WHERE tenant = ANY($1::text[])

-- name: jobs
SELECT j.id, i.key, j.tenant, j.state, j.run, j.attempts, j.crashes, j.result_run, j.result_call,
       coalesce(j.answered_by, j.id) AS answered_by,
       j.webhook IS NOT NULL AS has_webhook, j.ended_at, j.waiting_for, j.error_class
FROM headrace.jobs j LEFT JOIN headrace.idempotency i ON i.job_id = j.id
WHERE j.tenant = ANY($1::text[])

-- name: calls
SELECT job_id AS job, run, call, state, error_class, request_id, cost_nano AS cost,
       suspense_nano AS suspense, opened_at, ended_at
FROM headrace.calls WHERE tenant = ANY($1::text[])

-- name: attempts
SELECT a.job_id AS job, a.run, a.worker FROM headrace.attempts a JOIN headrace.jobs j ON j.id = a.job_id
WHERE j.tenant = ANY($1::text[])

-- name: deliveries
SELECT id, job_id AS job, state FROM headrace.deliveries WHERE tenant = ANY($1::text[])

-- name: somebodys
SELECT (SELECT count(*) FROM headrace.workers WHERE alive_until > headrace.now()) AS workers,
       (SELECT count(*) FROM headrace.jobs WHERE ended_at IS NULL) AS jobs,
       (SELECT count(*) FROM headrace.configurations WHERE source <> $1) AS configurations

-- name: workers
SELECT count(*) AS workers FROM headrace.workers
