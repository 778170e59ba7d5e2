-- Close a gate for a time, or until somebody opens it.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: gate, duration in ms (0: until it is opened)
local duration = tonumber(ARGV[2])
local till = duration == 0 and 0 or now_ms() + duration
redis.call('HSET', GATES, ARGV[1], till)
return till
