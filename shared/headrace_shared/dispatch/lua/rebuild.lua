-- Put the counters of budgets in place as the ledger has them. The epoch is written with
-- them: whoever carries another is refused. A rebuild that is older than what is in place, or than what is to be
-- put there next (outdate_money.lua), changes nothing.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: epoch, run id of the server, hold lease in ms, number of fields, then field, value, ... of `money`
--       (`ends_in|<kind>` becomes a moment here), number of counters, then counter, value, ...,
--       number of holds, then hold id, record, ...
-- Returns 'OK', or the epoch in place, or to come, where that is the newer one.
local coming = redis.call('HGET', MONEY, 'coming')
if coming and read(whole_of, coming) > tonumber(ARGV[1]) then return tonumber(coming) end
local present = redis.call('HGET', MONEY, 'epoch')
if present and is_in_place(present) and read(whole_of, present) >= tonumber(ARGV[1])
   and redis.call('HGET', MONEY, 'run_id') == ARGV[2] then
    return tonumber(present)
end
local now, lease = now_ms(), tonumber(ARGV[3])
redis.call('DEL', MONEY, SPENT, HOLDS, HOLD_LEASES)
local at = 4
local function each(write)
    local number = tonumber(ARGV[at])
    for i = at + 1, at + 2 * number, 2 do write(ARGV[i], ARGV[i + 1]) end
    at = at + 2 * number + 1
end
each(function(field, value)
    local kind = string.match(field, '^ends_in|(.*)$')
    if kind then
        redis.call('HSET', MONEY, 'end|' .. kind, string.format('%.0f', now + tonumber(value)))
    else
        redis.call('HSET', MONEY, field, value)
    end
end)
each(function(counter, value) redis.call('HINCRBY', SPENT, counter, value) end)
each(function(id, record)
    redis.call('HSET', HOLDS, id, record)
    redis.call('ZADD', HOLD_LEASES, now + lease, id)
end)
redis.call('HSET', SPENT, 'epoch', ARGV[1])
redis.call('HSET', HOLDS, 'epoch', ARGV[1])
redis.call('HSET', MONEY, 'run_id', ARGV[2], 'epoch', ARGV[1])
-- What had no room before may have it now: a limit was raised, a window has turned.
local gates = redis.call('HKEYS', GATES)
for _, gate in ipairs(gates) do
    if string.match(gate, '|budget$') then redis.call('HDEL', GATES, gate) end
end
if #gates > 0 then unpark() end
return 'OK'
