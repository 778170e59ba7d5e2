-- What there is to know of one job that waits, or runs: for whoever asks why. Nothing here changes anything.

-- name: run_of
-- Who has a job, until when, and which call of it is out.
SELECT headrace.now() AS now, j.worker, j.lease_until, j.cancel_requested,
       c.provider, c.model, c.opened_at, c.held_nano
FROM headrace.jobs j LEFT JOIN LATERAL (
    SELECT provider, model, opened_at, held_nano FROM headrace.calls
    WHERE job_id = j.id AND run = j.run AND state = 'open' ORDER BY call DESC LIMIT 1) AS c ON true
WHERE j.id = $1;

-- name: body_of
SELECT body FROM headrace.jobs WHERE id = $1;

-- name: place_of
-- How many jobs of its queue are before a job; so many at most are counted.
SELECT count(*) FROM (
    SELECT FROM headrace.jobs
    WHERE state = 'queued' AND lane = $1 AND route = $2 AND tenant = $3 AND coalesce(api_key, '') = $4
      AND (run_at, id) < ($5, $6)
    LIMIT $7) AS before;

-- name: capacity_for
-- The workers that are alive, those of them that serve a lane, and how many of their slots are taken.
WITH alive AS MATERIALIZED (
    SELECT id, slots, $1 = ANY(lanes) AS serves FROM headrace.workers
    WHERE alive_until > headrace.now() AND cardinality(lanes) > 0
)
SELECT count(*) AS workers, count(*) FILTER (WHERE serves) AS serving,
       coalesce(sum(slots) FILTER (WHERE serves), 0)::int AS slots,
       (SELECT count(*) FROM headrace.jobs j JOIN alive s ON s.id = j.worker AND s.serves
        WHERE j.state = 'running')::int AS running
FROM alive;

-- name: pace_of
-- How many of the thousand jobs before the head of a queue ended of late, and in how many seconds.
WITH head AS (
    SELECT id FROM headrace.jobs WHERE state = 'queued' AND lane = $1 AND route = $2 AND tenant = $3
      AND coalesce(api_key, '') = $4
    ORDER BY run_at, id LIMIT 1
)
SELECT count(*) AS ended, extract(epoch FROM headrace.now() - min(before.ended_at))::float8 AS seconds
FROM head, LATERAL (
    SELECT j.lane, j.route, j.api_key, j.ended_at FROM headrace.jobs j
    WHERE j.tenant = $3 AND j.id < head.id ORDER BY j.id DESC LIMIT 1000) AS before
WHERE before.lane = $1 AND before.route = $2 AND coalesce(before.api_key, '') = $4
  AND before.ended_at > headrace.now() - interval '5 minutes';

-- name: window_ends_in
SELECT headrace.window_ends_in($1, headrace.now()) AS seconds;
