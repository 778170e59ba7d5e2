-- Identical requests in flight: who makes the call, and who waits for its answer.

-- name: join
-- One statement for a batch. The flights' rows are locked first, in order, until it commits: who
-- lands one of them sees everybody that joined it before. Those that come back do not lead.
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest($1::uuid[], $2::int[], $3::text[], $4::bytea[]) AS a(job_id, run, tenant, digest)
), led AS MATERIALIZED (
    INSERT INTO headrace.flights AS f (tenant, digest, leader)
    SELECT DISTINCT ON (tenant, digest) tenant, digest, job_id FROM asked ORDER BY tenant, digest, job_id
    ON CONFLICT (tenant, digest) DO UPDATE SET leader = f.leader
    RETURNING tenant, digest, leader
)
UPDATE headrace.jobs AS j SET follows = led.leader
FROM asked a JOIN led ON led.tenant = a.tenant AND led.digest = a.digest
WHERE j.id = a.job_id AND j.run = a.run AND led.leader <> a.job_id
RETURNING j.id;

-- name: land
SELECT l.*, (SELECT j.api_key FROM headrace.jobs j WHERE j.id = l.id) AS api_key FROM headrace.land($1, $2) AS l;

-- name: lost
-- Flights that nobody leads any more, although nobody has landed them.
SELECT f.leader FROM headrace.flights f WHERE NOT headrace.leads_on(f.leader) LIMIT $1;
