-- Lease ids again whose rows are still owned; one that went missing is taken again.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: lease in ms, then queue, id, ...
local till = now_ms() + tonumber(ARGV[1])
for i = 2, #ARGV, 2 do
    redis.call('ZADD', Q .. ARGV[i], till, ARGV[i + 1])
end
return (#ARGV - 1) / 2
