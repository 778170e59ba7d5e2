-- Names the keys that hold a word, in their name or in what they hold.
-- KEYS: none; they are found by ARGV[1]
-- ARGV[1]: the pattern of all keys; [2..]: the words
-- returns: the keys' names
local found = {}
local function look(key, text)
    for at = 2, #ARGV do
        if string.find(text, ARGV[at], 1, true) then found[#found + 1] = key return end
    end
end
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
    look(key, key)
    local kind = redis.call('TYPE', key).ok
    if kind == 'string' then look(key, redis.call('GET', key)) end
    local values = kind == 'hash' and redis.call('HGETALL', key)
        or kind == 'zset' and redis.call('ZRANGE', key, 0, -1)
        or kind == 'set' and redis.call('SMEMBERS', key)
        or kind == 'list' and redis.call('LRANGE', key, 0, -1)
        or {}
    for _, value in ipairs(values) do look(key, value) end
end
return found
