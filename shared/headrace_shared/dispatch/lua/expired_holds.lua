-- The holds whose lease is over, leased anew so that they are asked about once at a time.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: lease in ms, at most
local now = now_ms()
local ids = redis.call('ZRANGEBYSCORE', HOLD_LEASES, '-inf', now, 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
    redis.call('ZADD', HOLD_LEASES, now + tonumber(ARGV[1]), id)
end
return ids
