-- Put ids into a queue: those that its window has room for; the rest waits in Postgres.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, window, overwrite (1: a score that is there already is replaced), then id, delay in ms, ...
-- Returns how many were taken.
local queue, window, overwrite = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local now, key = now_ms(), Q .. ARGV[1]
local room = window - redis.call('ZCARD', key)
local taken, soonest = 0, nil
for i = 4, #ARGV, 2 do
    local id, due = ARGV[i], now + tonumber(ARGV[i + 1])
    local known = redis.call('ZSCORE', key, id)
    if known or room > 0 then
        if not known then room = room - 1 end
        if not known or overwrite then redis.call('ZADD', key, due, id) end
        taken = taken + 1
        if not soonest or due < soonest then soonest = due end
    end
end
if taken < (#ARGV - 3) / 2 then
    redis.call('SADD', DEEP, queue)
end
if soonest and soonest <= now then
    activate(queue)
    ring(BELL .. lane_of(queue))
elseif soonest then
    redis.call('ZADD', WAITING, 'LT', soonest, queue)
end
return taken
