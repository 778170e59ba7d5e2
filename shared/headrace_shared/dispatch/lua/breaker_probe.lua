-- Take the one probe of an open breaker whose cooldown is over.
-- KEYS[1]: the breaker's hash (breaker_record.lua)
-- ARGV: owner, lease in ms
-- Returns {1, 0} for the owner; {0, ms until it is worth asking again} for everybody else;
-- {2, 0} when the breaker is closed by now.
local now = now_ms()
local state, reopen, probe_until = unpack(redis.call('HMGET', KEYS[1], 'state', 'reopen_at', 'probe_until'))
if state ~= 'open' then return {2, 0} end
if tonumber(reopen) > now then return {0, tonumber(reopen) - now} end
if probe_until and tonumber(probe_until) > now then return {0, tonumber(probe_until) - now} end
redis.call('HSET', KEYS[1], 'probe', ARGV[1], 'probe_until', now + tonumber(ARGV[2]))
return {1, 0}
