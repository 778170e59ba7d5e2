-- Open a gate. Every parked queue is looked at again: another gate may still keep it out.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: gate
local opened = redis.call('HDEL', GATES, ARGV[1])
if opened == 1 then
    for _, queue in ipairs(redis.call('SMEMBERS', PARKED)) do
        redis.call('ZREM', WAITING, queue)
        activate(queue)
        ring(BELL .. lane_of(queue))
    end
    redis.call('DEL', PARKED)
end
return opened
