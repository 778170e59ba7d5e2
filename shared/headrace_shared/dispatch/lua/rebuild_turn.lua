-- Let one process at a time put the counters of budgets in place: each that does so raises the epoch, and
-- what the others have just put in place is of an older one then. A turn that nobody ends is over in time.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: ms that a turn lasts at most
-- Returns 1 when it is the caller's turn.
local left, most = redis.call('PTTL', REBUILDING), tonumber(ARGV[1])
if left > 0 and left <= most then return 0 end
redis.call('SET', REBUILDING, '1', 'PX', most)
return 1
