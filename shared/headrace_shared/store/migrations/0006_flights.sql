-- Identical requests in flight become one provider call.
--
-- The first job of a tenant that asks for something leads its flight; the others, when they are
-- claimed, follow it: they are put back, hold no money and no slot, and end with the leader. A
-- worker of the version before knows nothing of flights and makes a call of its own: right, and
-- not shared.
--
-- The row of `flights` is the lock of the matter: who joins, and who lands it, takes it first. A
-- flight whose leader has ended is landed by the worker that ended it, or by the reaper.

ALTER TABLE headrace.jobs
    -- What it asks for, where the answer to an identical job may be its own.
    ADD COLUMN flight bytea,
    -- The job whose answer it waits for.
    ADD COLUMN follows uuid,
    -- The job whose call was answered with its result; none where it is its own.
    ADD COLUMN answered_by uuid;

CREATE TABLE headrace.flights (
    tenant text NOT NULL,
    digest bytea NOT NULL,
    leader uuid NOT NULL,
    PRIMARY KEY (tenant, digest)
);
CREATE INDEX flights_leader ON headrace.flights (leader);
CREATE INDEX jobs_follows ON headrace.jobs (follows) WHERE follows IS NOT NULL;

-- Whether a job leads on: it runs, or it is about to. One that waits for a budget, for long, or for
-- nobody who takes it up (its lane is paused, or has no worker) keeps others waiting that could go.
CREATE FUNCTION headrace.leads_on(leader uuid) RETURNS boolean LANGUAGE sql STABLE
AS $$ SELECT EXISTS (SELECT FROM headrace.jobs j WHERE j.id = leader
          AND (j.state = 'running' OR (j.state = 'queued' AND j.waiting_for IS DISTINCT FROM 'budget'
              AND j.run_at BETWEEN headrace.now() - interval '1 minute' AND headrace.now() + interval '1 minute'))) $$;

-- End the flights of leaders that lead no more: what succeeded, or can succeed for nobody, ends
-- those that follow as well; of anything else one of them takes the leader's place. Returns the
-- jobs that changed. A function, because each of its statements sees who joined before the lock.
CREATE FUNCTION headrace.land(leaders uuid[], promoting text[])
RETURNS TABLE (id uuid, lane text, route text, tenant text, state text) LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    flight record;
    was record;
    heir uuid;
    moment timestamptz := headrace.now();
BEGIN
    FOR flight IN SELECT f.tenant, f.digest, f.leader FROM headrace.flights f
                  WHERE f.leader = ANY(leaders) ORDER BY f.tenant, f.digest FOR UPDATE LOOP
        CONTINUE WHEN headrace.leads_on(flight.leader);
        SELECT j.state, j.error_class, j.error, j.result_run, j.result_call, j.answered_by
        INTO was FROM headrace.jobs j WHERE j.id = flight.leader;
        PERFORM FROM headrace.jobs j WHERE j.follows = flight.leader ORDER BY j.id FOR UPDATE;
        IF was.state = 'succeeded' OR (was.state = 'failed' AND was.error_class <> ALL(promoting)) THEN
            RETURN QUERY UPDATE headrace.jobs AS j SET
                state = was.state, error_class = was.error_class, error = was.error,
                result_run = was.result_run, result_call = was.result_call,
                answered_by = CASE was.state WHEN 'succeeded' THEN coalesce(was.answered_by, flight.leader) END,
                follows = NULL, waiting_for = NULL, ended_at = moment, lease_until = NULL, worker = NULL
            WHERE j.follows = flight.leader AND j.ended_at IS NULL
            RETURNING j.id, j.lane, j.route, j.tenant, j.state;
            DELETE FROM headrace.flights f WHERE f.tenant = flight.tenant AND f.digest = flight.digest;
            CONTINUE;
        END IF;
        SELECT j.id INTO heir FROM headrace.jobs j
        WHERE j.follows = flight.leader AND j.ended_at IS NULL AND NOT j.cancel_requested
        ORDER BY j.state, j.id LIMIT 1;
        IF heir IS NULL THEN
            DELETE FROM headrace.flights f WHERE f.tenant = flight.tenant AND f.digest = flight.digest;
            CONTINUE;
        END IF;
        UPDATE headrace.flights f SET leader = heir WHERE f.tenant = flight.tenant AND f.digest = flight.digest;
        UPDATE headrace.jobs j SET follows = heir
        WHERE j.follows = flight.leader AND j.id <> heir AND j.ended_at IS NULL;
        RETURN QUERY UPDATE headrace.jobs AS j SET
            follows = NULL, waiting_for = NULL, run_at = least(j.run_at, moment)
        WHERE j.id = heir
        RETURNING j.id, j.lane, j.route, j.tenant, j.state;
    END LOOP;
END $$;
