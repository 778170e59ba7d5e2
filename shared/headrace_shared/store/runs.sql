-- What workers do with jobs: claim, keep, journal, finish. Every write names a run.

-- name: claim_jobs
-- The first claim of a job starts its timeout and ends its time to live.
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now
)
UPDATE headrace.jobs AS j SET
    state = 'running', run = j.run + 1, worker = $3, lease_until = m.now + make_interval(secs => $2),
    started_at = coalesce(j.started_at, m.now), waiting_for = NULL, alone = $4, start_by = NULL,
    end_by = CASE WHEN j.started_at IS NULL THEN least(j.end_by, m.now + j.timeout) ELSE j.end_by END
FROM unnest($1::uuid[]) AS wanted(id), m
WHERE j.id = wanted.id AND j.state = 'queued' AND j.run_at <= m.now
  AND (j.crashes < 2 OR $4)
  AND j.endpoint = ANY($5::text[]) AND j.needs <@ $6::text[]
  AND (least(j.start_by, j.end_by) > m.now) IS NOT FALSE
RETURNING j.id, j.run, j.lane, j.route, j.tenant, j.endpoint, j.body, j.attempts, j.max_attempts,
          j.created_at, greatest(m.now - j.run_at, interval '0') AS waited,
          j.end_by - m.now AS time_left,
          j.webhook IS NOT NULL AS has_webhook, j.traceparent,
          CASE WHEN j.endpoint LIKE 'handler:%' THEN j.metadata END AS metadata,
          CASE WHEN j.run > 1 THEN (
              SELECT ARRAY[c.run, c.call] FROM headrace.calls c
              WHERE c.job_id = j.id AND c.state = 'answered' AND c.error_class IS NULL AND c.step IS NULL
              ORDER BY c.run, c.call LIMIT 1
          ) END AS answer,
          (SELECT coalesce(max(version), 0) FROM headrace.configurations) AS configuration;

-- name: pick_due
-- The next jobs of these lanes as they wait in the store, each queue's and each lane's in turn, lanes by
-- their weights: for workers that have no Redis to ask. They are claimed like those that it names.
WITH RECURSIVE moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), served AS MATERIALIZED (
    SELECT * FROM unnest($1::text[], $2::float8[]) AS s(lane, weight)
), queue AS (
    SELECT first.* FROM served, LATERAL (
        SELECT j.lane, j.route, j.tenant FROM headrace.jobs j
        WHERE j.state = 'queued' AND j.lane = served.lane ORDER BY j.route, j.tenant LIMIT 1) AS first
    UNION ALL
    SELECT following.* FROM queue, LATERAL (
        SELECT j.lane, j.route, j.tenant FROM headrace.jobs j
        WHERE j.state = 'queued' AND j.lane = queue.lane AND (j.route, j.tenant) > (queue.route, queue.tenant)
        ORDER BY j.route, j.tenant LIMIT 1) AS following
), head AS MATERIALIZED (
    SELECT head.*, queue.lane,
           row_number() OVER (PARTITION BY queue.lane, queue.route, queue.tenant ORDER BY head.run_at, head.id) AS place
    FROM queue, moment, LATERAL (
        SELECT j.id, j.run_at, j.crashes >= 2 AS suspect FROM headrace.jobs j
        WHERE j.state = 'queued' AND j.lane = queue.lane AND j.route = queue.route AND j.tenant = queue.tenant
          AND j.run_at <= moment.now AND j.endpoint = ANY($4::text[]) AND j.needs <@ $5::text[]
          AND (least(j.start_by, j.end_by) > moment.now) IS NOT FALSE
        ORDER BY j.run_at, j.id LIMIT $3) AS head
), turn AS (
    SELECT head.id, head.lane, head.suspect,
           row_number() OVER (PARTITION BY head.lane ORDER BY head.place, random()) / served.weight AS turn
    FROM head JOIN served ON served.lane = head.lane
)
SELECT j.id, j.lane, turn.suspect FROM turn JOIN headrace.jobs j ON j.id = turn.id
WHERE j.state = 'queued' ORDER BY turn.turn LIMIT $3
-- Those that somebody else claims at this moment are passed over, and not waited for.
FOR UPDATE OF j SKIP LOCKED;

-- name: look_up
-- Where the ids stand that a claim did not get, so that the dispatch can be put right.
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now
)
SELECT j.id, j.lane, j.route, j.tenant,
       CASE WHEN j.ended_at IS NOT NULL THEN 'ended'
            WHEN j.state = 'running' THEN 'running'
            WHEN (least(j.start_by, j.end_by) > m.now) IS FALSE THEN 'overdue'
            WHEN j.run_at > m.now THEN 'early'
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

-- name: expire
-- End what is queued and was not started, or has not ended, in the time it had.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), overdue AS MATERIALIZED (
    SELECT id FROM headrace.jobs, moment
    WHERE state = 'queued' AND (start_by IS NOT NULL OR end_by IS NOT NULL) AND least(start_by, end_by) <= moment.now
    ORDER BY id LIMIT $1 FOR UPDATE OF jobs SKIP LOCKED
)
UPDATE headrace.jobs AS j SET
    state = 'expired', ended_at = moment.now, waiting_for = NULL, error_class = 'expired',
    error = CASE WHEN j.start_by <= moment.now THEN 'it was not started within its time to live'
                 WHEN j.started_at IS NULL THEN 'its deadline passed before it was started'
                 ELSE 'its deadline or timeout passed while it waited' END
FROM moment, overdue WHERE j.id = overdue.id
RETURNING j.id, j.lane, j.route, j.tenant, j.state;

-- name: heartbeat
WITH m AS MATERIALIZED (
    SELECT headrace.now() AS now
)
UPDATE headrace.jobs AS j SET lease_until = m.now + make_interval(secs => held.lease)
FROM unnest($1::uuid[], $2::int[], $3::float8[]) AS held(id, run, lease), m
WHERE j.id = held.id AND j.run = held.run AND j.state = 'running'
RETURNING j.id, j.cancel_requested;

-- name: open_calls
-- The intents of calls, right before they are sent: only under the epoch of their holds,
-- and only for runs that still own their rows.
WITH fence AS MATERIALIZED (
    SELECT headrace.now() AS now WHERE headrace.epoch_holds($1)
), held_here AS (
    -- Where holds are rows the intent takes the place of its own, so that nothing counts twice.
    DELETE FROM headrace.holds h USING fence WHERE h.id = ANY($7::text[])
)
INSERT INTO headrace.calls
    (job_id, run, call, tenant, endpoint, provider, model, hold_id, held_nano, held_at, scopes, epoch,
     price_version, step, digest, opened_at)
SELECT i.job_id, i.run, i.call, j.tenant, coalesce(i.endpoint, j.endpoint), i.provider, i.model, i.hold_id, i.held_nano, i.held_at,
       string_to_array(i.scopes, E'\n'), $1, i.price_version, i.step, i.digest, fence.now
FROM fence, unnest($2::uuid[], $3::int[], $4::int[], $5::text[], $6::text[], $7::text[], $8::bigint[],
                   $9::timestamptz[], $10::text[], $11::text[], $12::text[], $13::text[], $14::bytea[])
         AS i(job_id, run, call, provider, model, hold_id, held_nano, held_at, scopes, price_version,
              endpoint, step, digest)
JOIN headrace.jobs j ON j.id = i.job_id AND j.run = i.run AND j.state = 'running'
-- An answer that came late, for an earlier run, is the job's: it is not paid for again.
WHERE (i.run = 1 OR NOT EXISTS (
          SELECT FROM headrace.calls c
          WHERE c.job_id = i.job_id AND c.run < i.run AND c.state = 'answered' AND c.error_class IS NULL
            AND c.step IS NOT DISTINCT FROM i.step AND c.digest IS NOT DISTINCT FROM i.digest))
-- An older hold may have been given up as leaked by now (twice this long after it was taken).
  AND i.held_at > fence.now - interval '30 seconds'
ON CONFLICT (job_id, run, call) DO NOTHING
RETURNING job_id, call;

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
    SELECT c.job_id, c.run, c.call, c.state = 'settled' AS decided, c.cost_nano, c.suspense_nano
    FROM headrace.calls c JOIN conclusion x ON c.job_id = x.job_id AND c.run = x.run AND c.call = x.call
    -- An answer that comes after somebody decided what it cost is better than the decision.
    WHERE c.state IN ('open', 'suspense') OR (c.state = 'settled' AND x.state <> 'suspense')
    ORDER BY c.job_id, c.run, c.call FOR UPDATE OF c
), concluded AS (
    UPDATE headrace.calls AS c SET
        state = x.state, status = x.status, error_class = x.error_class, request_id = x.request_id,
        prompt_tokens = x.prompt_tokens, cached_tokens = x.cached_tokens,
        cache_write_tokens = x.cache_write_tokens,
        completion_tokens = x.completion_tokens, reasoning_tokens = x.reasoning_tokens,
        cost_nano = x.cost_nano, suspense_nano = x.suspense_nano, answer = x.answer, settled_by = NULL,
        latency = make_interval(secs => x.latency), ended_at = moment.now
    FROM moment, conclusion x JOIN before b ON b.job_id = x.job_id AND b.run = x.run AND b.call = x.call
    WHERE c.job_id = x.job_id AND c.run = x.run AND c.call = x.call
    RETURNING c.job_id, c.run, c.scopes, date_trunc('day', c.held_at, 'UTC') AS held_on,
              c.cost_nano - b.cost_nano AS cost_delta, c.suspense_nano - b.suspense_nano AS suspense_delta,
              b.decided
), daily AS (
    SELECT scope, held_on, sum(cost_delta) AS cost, sum(suspense_delta) AS suspense
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
                    $32::int[], $33::float8[], $35::int[], $36::bytea[])
    AS e(job_id, run, state, attempts, error_class, error, waiting_for, result_call, delay, result_run, output)
WHERE j.id = e.job_id AND j.run = e.run AND j.state = 'running'
RETURNING j.id, j.run, j.state, e.output
), returned AS (
    INSERT INTO headrace.checkpoints (job_id, name, run, value, made_at)
    SELECT id, '', run, output, moment.now FROM moment, ended WHERE output IS NOT NULL
)
SELECT id, run, state FROM ended
UNION ALL
-- No state: a call whose suspense, or settlement, has just been corrected, whoever owns its job.
SELECT job_id, run, NULL FROM concluded WHERE suspense_delta < 0 OR decided;

-- name: hasten
-- Jobs that wait although an answer for them came after their run had lost the row: due at once.
UPDATE headrace.jobs AS j SET run_at = headrace.now(), waiting_for = 'lost_lease'
FROM (SELECT id FROM headrace.jobs q
      WHERE id = ANY($1::uuid[]) AND state = 'queued' AND run_at > headrace.now() AND EXISTS (
          SELECT FROM headrace.calls c WHERE c.job_id = q.id AND c.state = 'answered'
            AND c.error_class IS NULL AND c.step IS NULL)
      ORDER BY id FOR UPDATE SKIP LOCKED) AS waiting
WHERE j.id = waiting.id
RETURNING j.id, j.lane, j.route, j.tenant;

-- name: reap
-- Rows whose lease ended go back at once. Two crashes make a job suspect, and it runs alone from
-- then on; only a crash alone, which nobody else can have caused, may condemn it. The calls that
-- such a run had open stand in suspense at their worst case until somebody knows better.
-- While PostgreSQL was away nobody could renew: leases are spared until one lease after its start.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), lost AS MATERIALIZED (
    SELECT j.id, j.run,
           CASE WHEN j.cancel_requested THEN 'cancelled'
                WHEN j.end_by <= moment.now THEN 'expired'
                WHEN j.alone AND j.crashes >= 4 THEN 'failed'
                ELSE 'queued' END AS state
    FROM headrace.jobs j, moment
    WHERE j.state = 'running' AND j.lease_until < moment.now
      AND moment.now > pg_postmaster_start_time() + make_interval(secs => $2)
    ORDER BY j.id LIMIT $1 FOR UPDATE OF j SKIP LOCKED
), back AS (
    UPDATE headrace.jobs AS j SET
        crashes = j.crashes + 1, state = lost.state,
        -- Those that failed in the slot, before the worker died, count as well.
        attempts = greatest(j.attempts, (
            SELECT count(*) FROM headrace.attempts a WHERE a.job_id = j.id AND a.outcome = 'retried')),
        error_class = CASE lost.state WHEN 'failed' THEN 'quarantined' WHEN 'queued' THEN NULL ELSE lost.state END,
        error = CASE lost.state WHEN 'failed' THEN 'five runs of this job lost their worker, the last three alone'
                                WHEN 'expired' THEN 'its deadline or timeout passed while it ran'
                                WHEN 'cancelled' THEN 'cancelled while it ran' END,
        waiting_for = CASE lost.state WHEN 'queued' THEN 'lost_lease' END,
        ended_at = CASE lost.state WHEN 'queued' THEN NULL ELSE moment.now END,
        run_at = moment.now, worker = NULL, lease_until = NULL
    FROM moment, lost WHERE j.id = lost.id
    RETURNING j.id, j.lane, j.route, j.tenant, j.state
), suspended AS (
    SELECT count(*) FROM headrace.suspend_calls(
        (SELECT array_agg(id ORDER BY id) FROM lost), (SELECT array_agg(run ORDER BY id) FROM lost))
)
SELECT id, lane, route, tenant, state FROM back, suspended;

-- name: quarantine
-- A process died that ran this job and nothing else: the job did it.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), lost AS MATERIALIZED (
    SELECT id, run FROM headrace.jobs WHERE id = $1 AND worker = $2 AND state = 'running' AND alone FOR UPDATE
), ended AS (
    UPDATE headrace.jobs AS j SET
        crashes = j.crashes + 1, state = 'failed', error_class = 'quarantined',
        error = 'its process died, in which it ran alone: ' || $3, ended_at = moment.now,
        worker = NULL, lease_until = NULL
    FROM moment, lost WHERE j.id = lost.id
    RETURNING j.id, j.lane, j.route, j.tenant, j.state
), suspended AS (
    SELECT count(*) FROM headrace.suspend_calls(
        (SELECT array_agg(id) FROM lost), (SELECT array_agg(run) FROM lost))
)
SELECT id, lane, route, tenant, state FROM ended, suspended;

-- name: is_run_by
SELECT EXISTS (SELECT FROM headrace.jobs WHERE id = $1 AND worker = $2 AND state = 'running');

-- name: suspend_orphans
-- Intents that were committed after their run had ended, because their writer was cut off:
-- nobody will conclude them. They stand in suspense like the open calls of a lost run.
WITH orphan AS MATERIALIZED (
    SELECT DISTINCT c.job_id, c.run FROM headrace.calls c
    WHERE c.state = 'open' AND c.opened_at < headrace.now() - interval '60 seconds' AND NOT EXISTS (
        SELECT FROM headrace.jobs j WHERE j.id = c.job_id AND j.run = c.run AND j.state = 'running')
)
SELECT hold_id, amount_nano FROM headrace.suspend_calls(
    (SELECT array_agg(job_id ORDER BY job_id, run) FROM orphan),
    (SELECT array_agg(run ORDER BY job_id, run) FROM orphan));

-- name: holds_in_ledger
-- What the ledger knows of these holds; one that does not come back paid for no call.
SELECT hold_id, state, cost_nano, suspense_nano FROM headrace.calls
WHERE job_id = ANY($1::uuid[]) AND hold_id = ANY($2::text[]);
