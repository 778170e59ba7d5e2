-- Begin with empty queues: what is in them was not filled from the store that is served now. Ids
-- that are leased go as well: whoever asks leases those again whose rows are (renew.lua) before it says
-- that the queues are in place. The row's lease decides.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: cursor
-- Returns the next cursor.
local page = redis.call('SCAN', ARGV[1], 'MATCH', 'headrace:*', 'COUNT', 500)
for _, key in ipairs(page[2]) do
    local name = string.match(key, '^headrace:%a+:')
    if name == Q or name == ACTIVE or name == TURN or name == RUNNING or name == FULL then
        redis.call('UNLINK', key)
    end
end
if page[1] == '0' then redis.call('UNLINK', WAITING, PARKED, DEEP, HUNGRY, WOKEN) end
return page[1]
