-- What `headrace doctor` asks of the store.

-- name: server_facts
SELECT current_setting('server_version_num')::int AS version,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('fsync') AS fsync,
    current_setting('autovacuum') AS autovacuum,
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        AS connections,
    pg_is_in_recovery() AS standby;

-- name: schema_facts
-- The weeks from now on whose partitions are there, five at most, and the live workers.
SELECT (SELECT count(*) FROM headrace.workers WHERE alive_until > headrace.now()) AS workers,
    coalesce(min(week) FILTER (WHERE to_regclass('headrace.' || parent || '_' || to_char(
        headrace.now() AT TIME ZONE 'UTC' + week * interval '7 days', 'IYYY"w"IW')) IS NULL), 5) AS weeks
FROM generate_series(0, 4) AS week, unnest(ARRAY['jobs', 'attempts', 'calls', 'checkpoints']) AS parent;

-- name: present_moment
SELECT extract(epoch FROM headrace.now())::float8 AS now;
