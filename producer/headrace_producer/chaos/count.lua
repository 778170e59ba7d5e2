-- Counts keys.
-- KEYS: none; they are found by ARGV[1]
-- ARGV[1]: the pattern of all keys
-- returns: how many there are
return #redis.call('KEYS', ARGV[1])
