-- What workers do with jobs: claim, keep, journal, finish. Every write names a run.

-- name: claim_jobs
UPDATE headrace.jobs AS j SET
    state = 'running', run = j.run + 1, worker = $2, lease_until = m.now + make_interval(secs => $3),
    started_at = coalesce(j.started_at, m.now), waiting_for = NULL
FROM unnest($1::uuid[]) AS wanted(id), (SELECT headrace.now() AS now) AS m
WHERE j.id = wanted.id AND j.state = 'queued' AND j.run_at <= m.now
RETURNING j.id, j.run, j.lane, j.route, j.tenant, j.endpoint, j.body, j.attempts, j.max_attempts,
          j.created_at, greatest(m.now - j.run_at, interval '0') AS waited,
          j.webhook IS NOT NULL AS has_webhook, j.traceparent,
          CASE WHEN j.run > 1 THEN (
              SELECT ARRAY[c.run, c.call] FROM headrace.calls c
              WHERE c.job_id = j.id AND c.state = 'answered' AND c.error_class IS NULL
              ORDER BY c.run, c.call LIMIT 1
          ) END AS answer,
          (SELECT coalesce(max(version), 0) FROM headrace.configurations) AS configuration;

-- name: look_up
-- Where the ids stand that a claim did not get, so that the dispatch can be put right.
SELECT id, state, greatest(extract(epoch FROM
           CASE state WHEN 'queued' THEN run_at WHEN 'running' THEN lease_until END - headrace.now()), 0)::float8
       AS due_in
FROM headrace.jobs WHERE id = ANY($1::uuid[]);

-- name: heartbeat
UPDATE headrace.jobs AS j SET lease_until = m.now + make_interval(secs => $3)
FROM unnest($1::uuid[], $2::int[]) AS held(id, run), (SELECT headrace.now() AS now) AS m
WHERE j.id = held.id AND j.run = held.run AND j.state = 'running'
RETURNING j.id, j.cancel_requested;

-- name: open_calls
-- The intents of calls, right before they are sent: only under the epoch of their holds,
-- and only for runs that still own their rows.
WITH fence AS MATERIALIZED (
    SELECT headrace.now() AS now WHERE headrace.epoch_holds($1)
)
INSERT INTO headrace.calls
    (job_id, run, call, tenant, endpoint, provider, model, hold_id, held_nano, held_at, scopes, epoch,
     price_version, opened_at)
SELECT i.job_id, i.run, i.call, j.tenant, j.endpoint, i.provider, i.model, i.hold_id, i.held_nano, i.held_at,
       string_to_array(i.scopes, E'\n'), $1, i.price_version, fence.now
FROM fence, unnest($2::uuid[], $3::int[], $4::int[], $5::text[], $6::text[], $7::text[], $8::bigint[],
                   $9::timestamptz[], $10::text[], $11::text[])
         AS i(job_id, run, call, provider, model, hold_id, held_nano, held_at, scopes, price_version)
JOIN headrace.jobs j ON j.id = i.job_id AND j.run = i.run AND j.state = 'running'
-- An answer that came late, for an earlier run, is the job's: it is not paid for again.
WHERE (i.run = 1 OR NOT EXISTS (
          SELECT FROM headrace.calls c
          WHERE c.job_id = i.job_id AND c.run < i.run AND c.state = 'answered' AND c.error_class IS NULL))
-- An older hold may have been given up as leaked by now (twice this long after it was taken).
  AND i.held_at > fence.now - interval '30 seconds'
ON CONFLICT (job_id, run, call) DO NOTHING
RETURNING job_id;

-- name: finish
-- One transaction for a batch: calls are concluded (whoever owns the job by now: a bill is
-- a bill), attempts recorded, spend booked, and the jobs that are still owned are ended or
-- put back. The ids that come back are those.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), conclusion AS MATERIALIZED (
    SELECT * FROM unnest(
        $1::uuid[], $2::int[], $3::int[], $4::text[], $5::int[], $6::text[], $7::text[],
        $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[],
        $14::bytea[], $15::float8[], $34::bigint[]
    ) AS c(job_id, run, call, state, status, error_class, request_id,
           prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, cost_nano, suspense_nano,
           answer, latency, cache_write_tokens)
), before AS MATERIALIZED (
    SELECT c.job_id, c.run, c.call, c.suspense_nano
    FROM headrace.calls c JOIN conclusion x ON c.job_id = x.job_id AND c.run = x.run AND c.call = x.call
    WHERE c.state IN ('open', 'suspense')
    ORDER BY c.job_id, c.run, c.call FOR UPDATE OF c
), concluded AS (
    UPDATE headrace.calls AS c SET
        state = x.state, status = x.status, error_class = x.error_class, request_id = x.request_id,
        prompt_tokens = x.prompt_tokens, cached_tokens = x.cached_tokens,
        cache_write_tokens = x.cache_write_tokens,
        completion_tokens = x.completion_tokens, reasoning_tokens = x.reasoning_tokens,
        cost_nano = x.cost_nano, suspense_nano = x.suspense_nano, answer = x.answer,
        latency = make_interval(secs => x.latency), ended_at = moment.now
    FROM moment, conclusion x JOIN before b ON b.job_id = x.job_id AND b.run = x.run AND b.call = x.call
    WHERE c.job_id = x.job_id AND c.run = x.run AND c.call = x.call
    RETURNING c.job_id, c.run, c.scopes, date_trunc('day', c.held_at, 'UTC') AS held_on, c.cost_nano,
              c.suspense_nano - b.suspense_nano AS suspense_delta
), daily AS (
    SELECT scope, held_on, sum(cost_nano) AS cost, sum(suspense_delta) AS suspense
    FROM concluded, unnest(scopes) AS scope GROUP BY scope, held_on
), booked AS (
    -- Sorted, so that two workers lock the same sums in the same order.
    INSERT INTO headrace.spend AS s (scope, window_name, shard, settled_nano, suspense_nano)
    SELECT scope, name, $16, sum(cost), sum(suspense)
    FROM daily, unnest(headrace.windows(held_on)) AS name
    GROUP BY scope, name HAVING sum(cost) <> 0 OR sum(suspense) <> 0 ORDER BY scope, name
    ON CONFLICT (scope, window_name, shard) DO UPDATE SET
        settled_nano = s.settled_nano + excluded.settled_nano,
        suspense_nano = s.suspense_nano + excluded.suspense_nano
), attempted AS (
    INSERT INTO headrace.attempts (job_id, run, number, call, outcome, error_class, error, worker, ended_at)
    SELECT a.job_id, a.run, a.number, a.call, a.outcome, a.error_class, a.error, $17, moment.now
    FROM moment, unnest($18::uuid[], $19::int[], $20::int[], $21::int[], $22::text[], $23::text[], $24::text[])
        AS a(job_id, run, number, call, outcome, error_class, error)
    ON CONFLICT DO NOTHING
), ended AS (
UPDATE headrace.jobs AS j SET
    -- What would be put back and is to be cancelled ends here: nobody would tell its next run.
    state = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled' ELSE e.state END,
    attempts = e.attempts,
    error_class = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled' ELSE e.error_class END,
    error = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled while it ran' ELSE e.error END,
    waiting_for = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN NULL ELSE e.waiting_for END,
    result_run = e.result_run, result_call = e.result_call,
    run_at = CASE e.state WHEN 'queued' THEN moment.now + make_interval(secs => e.delay) ELSE j.run_at END,
    ended_at = CASE WHEN e.state = 'queued' AND NOT j.cancel_requested THEN NULL ELSE moment.now END,
    lease_until = NULL, worker = NULL
FROM moment, unnest($25::uuid[], $26::int[], $27::text[], $28::int[], $29::text[], $30::text[], $31::text[],
                    $32::int[], $33::float8[], $35::int[])
    AS e(job_id, run, state, attempts, error_class, error, waiting_for, result_call, delay, result_run)
WHERE j.id = e.job_id AND j.run = e.run AND j.state = 'running'
RETURNING j.id, j.run, j.state
)
SELECT id, run, state FROM ended
UNION ALL
-- No state: a call whose suspense has just been corrected, whoever owns its job.
SELECT job_id, run, NULL FROM concluded WHERE suspense_delta < 0;

-- name: reap
-- Rows whose lease ended go back at once; the third crash quarantines. The calls such a run
-- had open stand in suspense at their worst case until somebody knows better.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), lost AS MATERIALIZED (
    SELECT j.id, j.run,
           CASE WHEN j.cancel_requested THEN 'cancelled' WHEN j.crashes >= 2 THEN 'failed' ELSE 'queued' END
               AS state
    FROM headrace.jobs j, moment
    WHERE j.state = 'running' AND j.lease_until < moment.now
    ORDER BY j.id LIMIT $1 FOR UPDATE OF j SKIP LOCKED
), suspended AS (
    UPDATE headrace.calls AS c SET
        state = 'suspense', suspense_nano = c.held_nano, ended_at = moment.now, error_class = 'lost_lease'
    FROM moment, lost WHERE c.job_id = lost.id AND c.run = lost.run AND c.state = 'open'
    RETURNING c.scopes, date_trunc('day', c.held_at, 'UTC') AS held_on, c.suspense_nano
), booked AS (
    INSERT INTO headrace.spend AS s (scope, window_name, shard, suspense_nano)
    SELECT scope, name, 0, sum(suspense_nano)
    FROM suspended, unnest(scopes) AS scope, unnest(headrace.windows(held_on)) AS name
    GROUP BY scope, name ORDER BY scope, name
    ON CONFLICT (scope, window_name, shard) DO UPDATE SET
        suspense_nano = s.suspense_nano + excluded.suspense_nano
), back AS (
    UPDATE headrace.jobs AS j SET
        crashes = j.crashes + 1, state = lost.state,
        error_class = CASE lost.state WHEN 'failed' THEN 'quarantined' WHEN 'cancelled' THEN 'cancelled' END,
        error = CASE lost.state WHEN 'failed' THEN 'three runs of this job lost their worker'
                                WHEN 'cancelled' THEN 'cancelled while it ran' END,
        waiting_for = CASE lost.state WHEN 'queued' THEN 'lost_lease' END,
        ended_at = CASE lost.state WHEN 'queued' THEN NULL ELSE moment.now END,
        run_at = moment.now, worker = NULL, lease_until = NULL
    FROM moment, lost WHERE j.id = lost.id
    RETURNING j.id, j.lane, j.route, j.tenant, j.state
)
SELECT id, lane, route, tenant, state FROM back;

-- name: suspend_orphans
-- Intents that were committed after their run had ended, because their writer was cut off:
-- nobody will conclude them. They stand in suspense like the open calls of a lost run.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), suspended AS (
    UPDATE headrace.calls AS c SET
        state = 'suspense', suspense_nano = c.held_nano, ended_at = moment.now, error_class = 'lost_lease'
    FROM moment
    WHERE c.state = 'open' AND c.opened_at < moment.now - interval '60 seconds' AND NOT EXISTS (
        SELECT FROM headrace.jobs j WHERE j.id = c.job_id AND j.run = c.run AND j.state = 'running')
    RETURNING c.hold_id, c.scopes, date_trunc('day', c.held_at, 'UTC') AS held_on, c.suspense_nano
), booked AS (
    INSERT INTO headrace.spend AS s (scope, window_name, shard, suspense_nano)
    SELECT scope, name, 0, sum(suspense_nano)
    FROM suspended, unnest(scopes) AS scope, unnest(headrace.windows(held_on)) AS name
    GROUP BY scope, name ORDER BY scope, name
    ON CONFLICT (scope, window_name, shard) DO UPDATE SET
        suspense_nano = s.suspense_nano + excluded.suspense_nano
)
SELECT hold_id, suspense_nano FROM suspended;

-- name: holds_in_ledger
-- What the ledger knows of these holds; one that does not come back paid for no call.
SELECT hold_id, state, cost_nano, suspense_nano FROM headrace.calls
WHERE job_id = ANY($1::uuid[]) AND hold_id = ANY($2::text[]);
