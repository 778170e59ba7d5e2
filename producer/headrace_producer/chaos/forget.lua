-- Deletes keys.
-- KEYS: none; they are found by ARGV[1]
-- ARGV[1]: the pattern of all keys
-- returns: how many there were
local keys = redis.call('KEYS', ARGV[1])
for _, key in ipairs(keys) do redis.call('DEL', key) end
return #keys
