-- The configuration, in versions: the newest is in force.

-- name: lock_configurations
SELECT pg_advisory_xact_lock(4850, 3);

-- name: apply_configuration
-- Nothing is written when the newest version says the same, or is not the one ($3) that this was made of.
WITH latest AS (
    SELECT version, document FROM headrace.configurations ORDER BY version DESC LIMIT 1
), applied AS (
    INSERT INTO headrace.configurations (document, source, applied_at)
    SELECT $1::jsonb, $2, headrace.now()
    WHERE NOT EXISTS (SELECT FROM latest WHERE document = $1::jsonb)
      AND coalesce($3::int = coalesce((SELECT version FROM latest), 0), true)
    RETURNING version
)
SELECT coalesce((SELECT version FROM applied), (SELECT version FROM latest)) AS version,
       EXISTS (SELECT FROM applied) AS changed, coalesce((SELECT version FROM latest), 0) AS before;

-- name: current_configuration
-- As text: a caller's own connection may decode jsonb by itself.
SELECT version, document::text AS document FROM headrace.configurations ORDER BY version DESC LIMIT 1;

-- name: get_configuration
SELECT version, document FROM headrace.configurations WHERE version = $1;

-- name: list_configurations
SELECT version, source, applied_at FROM headrace.configurations ORDER BY version DESC LIMIT $1;
