-- How long answers were, by template and model.

-- name: learn
-- Sorted, so that two workers lock the same rows in the same order. Beyond 8,192 calls what was seen before
-- counts half: a sketch follows its template when that changes.
INSERT INTO headrace.output_lengths AS l
    (provider, model, template, calls, prompt_tokens, cached_tokens, body_bytes, lengths, seen_at)
SELECT n.provider, n.model, n.template, n.calls, n.prompt_tokens, n.cached_tokens, n.body_bytes,
       string_to_array(n.lengths, ',')::float8[], headrace.now()
FROM unnest($1::text[], $2::text[], $3::text[], $4::float8[], $5::float8[], $6::float8[], $7::float8[], $8::text[])
    AS n(provider, model, template, calls, prompt_tokens, cached_tokens, body_bytes, lengths)
ORDER BY 1, 2, 3
ON CONFLICT (provider, model, template) DO UPDATE SET
    (calls, prompt_tokens, cached_tokens, body_bytes, lengths, seen_at) = (
        SELECT l.calls * kept + excluded.calls, l.prompt_tokens * kept + excluded.prompt_tokens,
               l.cached_tokens * kept + excluded.cached_tokens, l.body_bytes * kept + excluded.body_bytes,
               ARRAY(SELECT coalesce(old, 0) * kept + coalesce(new, 0)
                     FROM unnest(l.lengths, excluded.lengths) WITH ORDINALITY AS u(old, new, place) ORDER BY place),
               excluded.seen_at
        FROM (SELECT CASE WHEN l.calls >= 8192 THEN 0.5 ELSE 1.0 END::float8 AS kept) AS share);

-- name: learnt
SELECT l.provider, l.model, l.template, l.calls, l.prompt_tokens, l.cached_tokens, l.body_bytes, l.lengths
FROM unnest($1::text[], $2::text[], $3::text[]) AS w(provider, model, template)
JOIN headrace.output_lengths l USING (provider, model, template);

-- name: forget_lengths
DELETE FROM headrace.output_lengths WHERE seen_at < headrace.now() - make_interval(secs => $1);
