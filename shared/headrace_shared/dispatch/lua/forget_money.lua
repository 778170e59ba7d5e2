-- Forget the counters of budgets: they are of an epoch that the ledger never had.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: none
return redis.call('UNLINK', MONEY, SPENT, HOLDS, HOLD_LEASES)
