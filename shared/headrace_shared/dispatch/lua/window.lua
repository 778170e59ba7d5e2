-- How many ids of each queue are due in its window; whoever asks feeds those that are not half full.
-- A queue that has some and is not among those to be claimed from, because that was lost or a worker of
-- another version keeps them elsewhere, is put there.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: window, queue, ...
local now, window = now_ms(), tonumber(ARGV[1])
local due = {}
for i = 2, #ARGV do
    local queue = ARGV[i]
    due[i - 1] = redis.call('ZCOUNT', Q .. queue, '-inf', now)
    if due[i - 1] > 0 and redis.call('SISMEMBER', PARKED, queue) == 0 then activate(queue) end
    if due[i - 1] < window / 2 then
        redis.call('SREM', HUNGRY, queue)
        redis.call('SREM', DEEP, queue)
    end
end
return due
