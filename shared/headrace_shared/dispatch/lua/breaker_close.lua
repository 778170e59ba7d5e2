-- Close the breaker after its probe was answered; nobody else's answer does.
-- KEYS[1]: the breaker's hash (breaker_record.lua)
-- ARGV: owner of the probe ('' : an operator closes it)
if ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 'probe') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
