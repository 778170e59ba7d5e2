-- A queue is of one API key, where its jobs came with one, as it is of one lane, route and tenant: whole
-- queues step aside for the cap of a key, so that no job waits behind one that it keeps back.
--
-- The index that ends in `run_at` behind the tenant goes: two would be written for every job. A worker of
-- the version before finds its queues by the first three columns of this one, and sorts their jobs.
CREATE INDEX jobs_queue ON headrace.jobs (lane, route, tenant, coalesce(api_key, ''), run_at, id)
    WHERE state = 'queued';
DROP INDEX headrace.jobs_queued;
