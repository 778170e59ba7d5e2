-- Take the one probe of an open breaker whose cooldown is over.
-- KEYS[1]: the breaker's hash (breaker_record.lua)
-- ARGV: owner, lease in ms
-- Returns {1, 0} for the owner; {0, ms until it is worth asking again} for everybody else;
-- {2, 0} when the breaker is closed by now.
local now = now_ms()
local state, probe_until = unpack(redis.call('HMGET', KEYS[1], 'state', 'probe_until'))
if state ~= 'open' then return {2, 0} end
local wait = wait_for_probe(KEYS[1], now)
probe_until = probe_until and read(whole_of, probe_until)
if wait > 0 then return {0, wait} end
if probe_until and probe_until > now then return {0, probe_until - now} end
redis.call('HSET', KEYS[1], 'probe', ARGV[1], 'probe_until', now + tonumber(ARGV[2]))
return {1, 0}
