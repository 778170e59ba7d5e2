-- What is looked for again and again, or has to go one day, is found without reading all of it.
--
-- Everything here is added; nothing that older code reads or writes changes its meaning.

-- Those that a changed budget wakes, in the order in which they are.
CREATE INDEX jobs_budget_waiters ON headrace.jobs (id) WHERE state = 'queued' AND waiting_for = 'budget';

-- Sums that no budget counts any more: of windows that are over, and of batches that are gone. What is
-- added to a sum changes neither of these.
CREATE INDEX spend_windows ON headrace.spend (window_name COLLATE "C");
CREATE INDEX spend_batches ON headrace.spend (scope) WHERE scope LIKE 'batch:%';
