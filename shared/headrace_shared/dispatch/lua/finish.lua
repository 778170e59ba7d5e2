-- Take ended ids out and tell whoever waits for them; put the others back for later.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, id, delay in ms (-1: it has ended), ...
local now = now_ms()
for i = 1, #ARGV, 3 do
    local queue, id, delay = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
    if delay == -1 then
        redis.call('ZREM', Q .. queue, id)
        redis.call('PUBLISH', 'headrace:ended:' .. id, '1')
    else
        redis.call('ZADD', Q .. queue, now + delay, id)
        if delay == 0 then
            activate(queue)
            ring(BELL .. lane_of(queue))
        else
            redis.call('ZADD', WAITING, 'LT', now + delay, queue)
        end
    end
end
return (#ARGV) / 3
