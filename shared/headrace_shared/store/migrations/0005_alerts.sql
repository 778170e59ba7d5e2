-- Alerts of budgets, the pace they are spent at, and how long answers of a template were.
--
-- Everything here is added; nothing that older code reads or writes changes its meaning.

-- An alert is delivered by the outbox of callbacks, and is no job's.
ALTER TABLE headrace.deliveries ALTER COLUMN job_id DROP NOT NULL;

-- How fast each budget was spent lately: an average over time in which older money counts ever less.
CREATE TABLE headrace.budget_paces (
    scope text NOT NULL,
    window_kind text NOT NULL,
    -- The window that was looked at last, and what it had used by then.
    window_name text NOT NULL,
    used_nano bigint NOT NULL,
    at timestamptz NOT NULL,
    since timestamptz NOT NULL,
    -- Nano-USD a second, still to be divided by the weight of what was seen, which nears 1.
    rate float8 NOT NULL,
    weight float8 NOT NULL CHECK (weight BETWEEN 0 AND 1),
    PRIMARY KEY (scope, window_kind)
);

-- Calls that did not fit although nothing was held any more that could be released; until the window ends.
CREATE TABLE headrace.budget_refusals (
    scope text NOT NULL,
    window_kind text NOT NULL,
    limit_nano bigint NOT NULL,
    until timestamptz NOT NULL,
    PRIMARY KEY (scope, window_kind)
);

-- What was said about the windows of budgets. The key is why nothing is said twice.
CREATE TABLE headrace.budget_alerts (
    scope text NOT NULL,
    window_kind text NOT NULL,
    window_name text NOT NULL,
    level text NOT NULL CHECK (level IN ('50', '80', '95', '100', 'projected')),
    -- Under which limit: one that was raised since may take the alert back.
    limit_nano bigint NOT NULL,
    used_nano bigint NOT NULL,
    said_at timestamptz NOT NULL,
    delivery_id uuid,
    PRIMARY KEY (scope, window_kind, window_name, level)
);

-- What answered calls of a template used, or with the template '' all of a model: sums, and counts of
-- output tokens in buckets that grow with the number. They fade by halves, so they are no integers.
CREATE TABLE headrace.output_lengths (
    provider text NOT NULL,
    model text NOT NULL,
    template text NOT NULL,
    calls float8 NOT NULL CHECK (calls > 0),
    prompt_tokens float8 NOT NULL,
    cached_tokens float8 NOT NULL,
    body_bytes float8 NOT NULL,
    lengths float8[] NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (provider, model, template)
);
