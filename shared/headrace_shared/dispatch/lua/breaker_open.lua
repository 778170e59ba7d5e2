-- Open the breaker. One that is open already stays as it is, unless its own probe failed.
-- KEYS[1]: the breaker's hash (breaker_record.lua)
-- ARGV: cooldown in ms, owner of the probe that failed ('' for none)
-- Returns {1 if it changed, ms until a probe may go}
local now = now_ms()
local state, probe = unpack(redis.call('HMGET', KEYS[1], 'state', 'probe'))
if state == 'open' and (ARGV[2] == '' or probe ~= ARGV[2]) then
    return {0, (wait_for_probe(KEYS[1], now))}
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'state', 'open', 'reopen_at', now + tonumber(ARGV[1]))
redis.call('PEXPIRE', KEYS[1], 86400000)
return {1, tonumber(ARGV[1])}
