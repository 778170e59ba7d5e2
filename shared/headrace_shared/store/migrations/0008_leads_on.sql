-- A leader that waits for a budget leads on while it is about to try again, as one that waits for
-- anything else does. Giving its place away writes the rows of all that follow it: where money is
-- short each of them would do so twice a second.
CREATE OR REPLACE FUNCTION headrace.leads_on(leader uuid) RETURNS boolean LANGUAGE sql STABLE
AS $$ SELECT EXISTS (SELECT FROM headrace.jobs j WHERE j.id = leader
          AND (j.state = 'running' OR (j.state = 'queued'
              AND j.run_at BETWEEN headrace.now() - interval '1 minute' AND headrace.now() + interval '1 minute'))) $$;
