-- How many ids of each queue are due in its window; whoever asks is about to feed it.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, ...
local now = now_ms()
local due = {}
for i, queue in ipairs(ARGV) do
    due[i] = redis.call('ZCOUNT', Q .. queue, '-inf', now)
    redis.call('SREM', HUNGRY, queue)
    redis.call('SREM', DEEP, queue)
end
return due
