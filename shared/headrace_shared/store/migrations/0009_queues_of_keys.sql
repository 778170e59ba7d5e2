-- A queue is of one API key, where its jobs came with one, as it is of one lane, route and tenant: whole
-- queues step aside for the cap of a key, so that no job waits behind one that it keeps back.
--
-- The new index takes the place of the one without keys, because every job would be written into both. A
-- worker of the version before finds its queues by the first three columns, and has their jobs sorted.
DROP INDEX headrace.jobs_queued;
CREATE INDEX jobs_queue ON headrace.jobs (lane, route, tenant, coalesce(api_key, ''), run_at, id)
    WHERE state = 'queued';
