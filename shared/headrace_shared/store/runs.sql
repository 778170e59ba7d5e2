-- What a run writes: the intents of its calls, and how it ended. Every write names a run.
-- (States as in claims.sql: compared with a column, so that rows are found by their ids.)

-- name: open_calls
-- The intents of calls, right before they are sent: only under the epoch of their holds,
-- and only for runs that still own their rows.
WITH fence AS MATERIALIZED (
    SELECT headrace.now() AS now, 'running' AS running WHERE headrace.is_in_force($1)
), held_here AS (
    -- Where holds are rows the intent takes the place of its own, so that nothing counts twice.
    DELETE FROM headrace.holds h USING fence
    WHERE (SELECT degraded FROM headrace.money) AND h.id = ANY($7::text[])
), kept AS MATERIALIZED (
    -- The next run of a job that may cost so much counts what earlier ones opened: nobody takes
    -- the row away before this can be seen, and who has taken it is seen here.
    SELECT j.id, j.run FROM fence, headrace.jobs j
    WHERE j.id = ANY($15::uuid[]) AND j.state = fence.running ORDER BY j.id FOR SHARE OF j
)
INSERT INTO headrace.calls
    (job_id, run, call, tenant, endpoint, provider, model, hold_id, held_nano, held_at, scopes, epoch,
     price_version, step, digest, opened_at)
SELECT i.job_id, i.run, i.call, j.tenant, coalesce(i.endpoint, j.endpoint), i.provider, i.model, i.hold_id, i.held_nano, i.held_at,
       string_to_array(i.scopes, E'\n'), $1, i.price_version, i.step, i.digest, fence.now
FROM fence CROSS JOIN unnest($2::uuid[], $3::int[], $4::int[], $5::text[], $6::text[], $7::text[], $8::bigint[],
                   $9::timestamptz[], $10::text[], $11::text[], $12::text[], $13::text[], $14::bytea[])
         AS i(job_id, run, call, provider, model, hold_id, held_nano, held_at, scopes, price_version,
              endpoint, step, digest)
JOIN headrace.jobs j ON j.id = i.job_id AND j.run = i.run AND j.state = fence.running
WHERE (j.max_cost_nano IS NULL OR EXISTS (SELECT FROM kept WHERE kept.id = i.job_id AND kept.run = i.run))
-- An answer that came late, for an earlier run, is the job's: it is not paid for again.
  AND (i.run = 1 OR NOT EXISTS (
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
-- put back. The ids that come back are those. One that would wait for another job, and was given its
-- place meanwhile (headrace.land), goes on at once.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now, 'running' AS running
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
    RETURNING c.job_id, c.run, c.scopes, date_trunc('minute', c.held_at, 'UTC') AS held_in,
              c.cost_nano - b.cost_nano AS cost_delta, c.suspense_nano - b.suspense_nano AS suspense_delta,
              b.decided
), by_minute AS (
    SELECT scope, held_in, sum(cost_delta) AS cost, sum(suspense_delta) AS suspense
    FROM concluded, unnest(scopes) AS scope GROUP BY scope, held_in
), present AS MATERIALIZED (
    SELECT held_in, headrace.windows(held_in) AS names FROM (SELECT DISTINCT held_in FROM concluded) AS minutes
), booked AS (
    -- Sorted, so that two workers lock the same sums in the same order.
    INSERT INTO headrace.spend AS s (scope, window_name, shard, settled_nano, suspense_nano)
    SELECT scope, name, $16, sum(cost), sum(suspense)
    FROM by_minute JOIN present USING (held_in), unnest(names) AS name
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
    -- What would be put back and is to be cancelled ends here: nobody would tell its next run. The conditions
    -- have no name of their own, because what could name them would visit each row a second time.
    state = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled' ELSE e.state END,
    attempts = e.attempts,
    error_class = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled' ELSE e.error_class END,
    error = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled while it ran' ELSE e.error END,
    waiting_for = CASE WHEN (e.state = 'queued' AND j.cancel_requested) OR (e.waiting_for = 'flight' AND j.follows IS NULL)
                  THEN NULL ELSE e.waiting_for END,
    result_run = e.result_run, result_call = e.result_call,
    run_at = CASE WHEN e.state <> 'queued' THEN j.run_at WHEN e.waiting_for = 'flight' AND j.follows IS NULL THEN moment.now
             ELSE moment.now + make_interval(secs => e.delay) END,
    ended_at = CASE WHEN e.state = 'queued' AND NOT j.cancel_requested THEN NULL ELSE moment.now END,
    lease_until = NULL, worker = NULL
FROM moment, unnest($25::uuid[], $26::int[], $27::text[], $28::int[], $29::text[], $30::text[], $31::text[],
                    $32::int[], $33::float8[], $35::int[], $36::bytea[])
    AS e(job_id, run, state, attempts, error_class, error, waiting_for, result_call, delay, result_run, output)
WHERE j.id = e.job_id AND j.run = e.run AND j.state = moment.running
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
RETURNING j.id, j.lane, j.route, j.tenant, j.api_key;
