-- Put the terms of tenants and of API keys in place, unless those of a newer version are.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: version, then field, value, ...
-- Returns the version that is in place.
local version = read(whole_of, redis.call('HGET', TENANTS, 'version') or '0')
if version >= tonumber(ARGV[1]) then return version end
local before = redis.call('HKEYS', TENANTS)
redis.call('DEL', TENANTS)
for i = 2, #ARGV, 2 do redis.call('HSET', TENANTS, ARGV[i], ARGV[i + 1]) end
redis.call('HSET', TENANTS, 'version', ARGV[1])
for _, field in ipairs(before) do
    local cap = string.match(field, '^concurrent|(.*)$')
    if cap then bring_back(cap) end
end
return tonumber(ARGV[1])
