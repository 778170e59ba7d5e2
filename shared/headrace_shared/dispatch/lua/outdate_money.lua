-- Let nobody hold or settle under the counters of budgets that are about to be put in place anew: what is
-- settled after the ledger was read would come back as held. For the same reason a rebuild that is older than this
-- one changes nothing any more (rebuild.lua).
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: the epoch that is to come
-- Returns 1 where the counters were older.
local coming = redis.call('HGET', MONEY, 'coming')
if not coming or read(whole_of, coming) < tonumber(ARGV[1]) then redis.call('HSET', MONEY, 'coming', ARGV[1]) end
local present = redis.call('HGET', MONEY, 'epoch')
if not present or read(whole_of, present) >= tonumber(ARGV[1]) then return 0 end
return redis.call('HDEL', MONEY, 'epoch')
