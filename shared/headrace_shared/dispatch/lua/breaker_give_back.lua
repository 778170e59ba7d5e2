-- Give back a probe that was not sent: somebody else may take it.
-- KEYS[1]: the breaker's hash (breaker_record.lua)
-- ARGV: owner
if redis.call('HGET', KEYS[1], 'probe') ~= ARGV[1] then return 0 end
return redis.call('HDEL', KEYS[1], 'probe', 'probe_until')
