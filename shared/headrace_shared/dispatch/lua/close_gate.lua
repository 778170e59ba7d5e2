-- Close a gate for a time, or until somebody opens it.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: gate, duration in ms (0: until it is opened), epoch under which a budget had no room ('': none had):
--       under another one the limit may be another, and nobody would open what is closed now
if ARGV[3] ~= '' and redis.call('HGET', MONEY, 'epoch') ~= ARGV[3] then return -1 end
local duration = tonumber(ARGV[2])
local till = duration == 0 and 0 or now_ms() + duration
local known = redis.call('HGET', GATES, ARGV[1])
local before = known and read(whole_of, known) or till
redis.call('HSET', GATES, ARGV[1], till)
-- Queues were parked until the time that held before: an earlier one brings them back earlier.
if till > 0 and (before == 0 or before > till) then
    for _, queue in ipairs(redis.call('SMEMBERS', PARKED)) do
        if not redis.call('ZSCORE', ACTIVE .. lane_of(queue) .. ':' .. tenant_of(queue), queue) then
            redis.call('ZADD', WAITING, 'LT', till, queue)
        end
    end
end
return till
