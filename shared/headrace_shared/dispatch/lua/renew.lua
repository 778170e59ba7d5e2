-- Lease ids again whose rows are still owned; one that went missing is taken again.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, id, lease in ms, ...
local now = now_ms()
for i = 1, #ARGV, 3 do
    redis.call('ZADD', Q .. ARGV[i], now + tonumber(ARGV[i + 2]), ARGV[i + 1])
end
return #ARGV / 3
