-- What becomes of jobs, calls and holds that nobody looks after any more.

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
RETURNING j.id, j.lane, j.route, j.tenant, j.api_key, j.state;

-- name: reap
-- Rows whose lease ended go back at once. Two crashes make a job suspect, and it runs alone from
-- then on; only a crash alone, which nobody else can have caused, may condemn it.
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
    RETURNING j.id, j.run, j.lane, j.route, j.tenant, j.api_key, j.state
)
SELECT id, run, lane, route, tenant, api_key, state FROM back ORDER BY id;

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
    RETURNING j.id, j.run, j.lane, j.route, j.tenant, j.api_key, j.state
)
SELECT id, run, lane, route, tenant, api_key, state FROM ended;

-- name: suspend_lost
-- The calls that lost runs had open stand in suspense at their worst case until somebody knows better. In the
-- transaction that takes the runs' rows, but a statement of its own: PostgreSQL 18.4 crashes as a whole where
-- one statement locks rows that were written since it began, and hands arrays of what it locked to a function.
SELECT count(*) FROM headrace.suspend_calls($1::uuid[], $2::int[]);

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
