-- Put what a configuration says of limits in place of what an older one said.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: version, then field, value, ...
local known = redis.call('HGET', LIMITS, 'version')
if known and (whole_of(known) or -1) >= tonumber(ARGV[1]) then return 0 end
redis.call('DEL', LIMITS)
redis.call('HSET', LIMITS, 'version', ARGV[1])
for i = 2, #ARGV, 2 do redis.call('HSET', LIMITS, ARGV[i], ARGV[i + 1]) end
-- Queues were parked until the time that the old limits said.
unpark()
return 1
