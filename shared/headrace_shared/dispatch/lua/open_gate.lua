-- Open a gate.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: gate
local opened = redis.call('HDEL', GATES, ARGV[1])
if opened == 1 then unpark() end
return opened
