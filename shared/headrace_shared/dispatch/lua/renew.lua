-- Lease ids again whose rows are still owned; one that went missing is taken again.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, id, lease in ms, ...
local now = now_ms()
for i = 1, #ARGV, 3 do
    local till = now + tonumber(ARGV[i + 2])
    redis.call('ZADD', Q .. ARGV[i], till, ARGV[i + 1])
    for _, cap in ipairs({caps_of(ARGV[i])}) do redis.call('ZADD', RUNNING .. cap, till, ARGV[i + 1]) end
end
return #ARGV / 3
