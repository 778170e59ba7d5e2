-- Callbacks: rows that the end of a job wrote, taken under a lease, fenced by `claim`.
-- A receiver is the host and port of the URL: split_part(url, '/', 3), as in the index
-- deliveries_receiver.

-- name: claim_deliveries
-- $1 rows wanted, $2 most per receiver, $3 busy receivers, $4 their attempts in flight, $5 lease.
-- The receivers are walked by the index, one probe each, and only their first few due rows
-- are read: a million rows that wait for a dead receiver are not in anyone's way.
-- A claimed row leaves the front of the index until its lease ends.
WITH RECURSIVE moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), receivers AS (
    (SELECT split_part(url, '/', 3) AS receiver
     FROM headrace.deliveries
     WHERE state = 'pending'
       AND (SELECT next_attempt_at FROM headrace.deliveries
            WHERE state = 'pending' ORDER BY next_attempt_at LIMIT 1) <= (SELECT now FROM moment)
     ORDER BY split_part(url, '/', 3)
     LIMIT 1)
    UNION ALL
    SELECT (SELECT split_part(next.url, '/', 3)
            FROM headrace.deliveries AS next
            WHERE next.state = 'pending' AND split_part(next.url, '/', 3) > receivers.receiver
            ORDER BY split_part(next.url, '/', 3)
            LIMIT 1)
    FROM receivers
    WHERE receivers.receiver IS NOT NULL
), rooms AS (
    SELECT receivers.receiver, greatest($2::int - coalesce(busy.attempts, 0), 0) AS room
    FROM receivers
    LEFT JOIN unnest($3::text[], $4::int[]) AS busy (receiver, attempts) USING (receiver)
    WHERE receivers.receiver IS NOT NULL
), due AS MATERIALIZED (
    SELECT first.id, first.next_attempt_at
    FROM rooms CROSS JOIN LATERAL (
        SELECT delivery.id, delivery.next_attempt_at
        FROM headrace.deliveries AS delivery
        WHERE delivery.state = 'pending'
          AND split_part(delivery.url, '/', 3) = rooms.receiver
          AND delivery.next_attempt_at <= (SELECT now FROM moment)
        ORDER BY delivery.next_attempt_at
        LIMIT rooms.room
        FOR UPDATE SKIP LOCKED
    ) AS first
    ORDER BY first.next_attempt_at
    LIMIT $1::int
)
UPDATE headrace.deliveries AS delivery
SET claim = delivery.claim + 1,
    lease_until = moment.now + $5::interval,
    next_attempt_at = moment.now + $5::interval
FROM due, moment
WHERE delivery.id = due.id
RETURNING delivery.id, delivery.tenant, delivery.url, split_part(delivery.url, '/', 3) AS receiver,
          delivery.payload, delivery.traceparent, delivery.attempts + 1 AS attempt, delivery.claim,
          moment.now AS claimed_at;

-- name: record_attempts
-- $1 ids, $2 claims, $3 times, $4 durations, $5 statuses, $6 error classes, $7 snippets,
-- $8 states, $9 delays to the next attempt. Attempt and state are one statement, so that
-- neither stands without the other; a claim that was lost, or recorded before, writes nothing.
WITH moment AS MATERIALIZED (
    SELECT headrace.now() AS now
), made AS (
    SELECT *
    FROM unnest($1::uuid[], $2::int[], $3::timestamptz[], $4::interval[], $5::int[], $6::text[],
                $7::text[], $8::text[], $9::interval[])
        AS made (delivery_id, claim, at, duration, status, error_class, snippet, state, delay)
), moved AS (
    UPDATE headrace.deliveries AS delivery
    SET state = made.state,
        attempts = delivery.attempts + 1,
        lease_until = NULL,
        next_attempt_at = CASE WHEN made.state = 'pending' THEN moment.now + made.delay
                               ELSE made.at END,
        ended_at = CASE WHEN made.state <> 'pending' THEN moment.now END
    FROM made, moment
    WHERE delivery.id = made.delivery_id AND delivery.claim = made.claim
      AND delivery.state = 'pending' AND delivery.lease_until IS NOT NULL
    RETURNING delivery.id, delivery.claim, delivery.attempts
)
INSERT INTO headrace.delivery_attempts (delivery_id, number, at, duration, status, error_class, snippet)
SELECT moved.id, moved.attempts, made.at, made.duration, made.status, made.error_class, made.snippet
FROM moved JOIN made ON made.delivery_id = moved.id AND made.claim = moved.claim
RETURNING delivery_id;

-- name: deliveries_of_job
SELECT id, url, event_type, state, attempts, next_attempt_at, created_at, ended_at
FROM headrace.deliveries WHERE job_id = $1 ORDER BY created_at, id;

-- name: attempts_of_job
SELECT a.delivery_id, a.number, a.at, a.duration, a.status, a.error_class, a.snippet
FROM headrace.delivery_attempts a JOIN headrace.deliveries d ON d.id = a.delivery_id
WHERE d.job_id = $1 ORDER BY a.at, a.number;
