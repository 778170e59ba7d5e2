-- Begin with empty queues: what is in them was not filled from the store that is served now. Ids
-- that are leased go as well; their heartbeats bring them back, and the row's lease decides.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: cursor, run id of the server
-- Returns the next cursor; with the last page the server counts as filled by the feeder, which
-- does that next.
local page = redis.call('SCAN', ARGV[1], 'MATCH', 'headrace:*', 'COUNT', 500)
for _, key in ipairs(page[2]) do
    local name = string.match(key, '^headrace:%a+:')
    if name == Q or name == ACTIVE then redis.call('UNLINK', key) end
end
if page[1] == '0' then
    redis.call('UNLINK', WAITING, PARKED, DEEP, HUNGRY)
    redis.call('SET', FED, ARGV[2])
end
return page[1]
