-- Drop what others left under our names: keys of another type, and values that no script of ours
-- wrote. All of it may be lost at any time: the feeder, the ledger and the next calls bring it back.
-- Members of queues are let be: whoever claims one reads it, and takes it out.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: cursor, 1: the counters of budgets are dropped, whatever they hold
-- Returns {next cursor, name of what was dropped, ...}
local TYPES = {
    [Q] = 'zset', [ACTIVE] = 'zset', [WAITING] = 'zset', [HOLD_LEASES] = 'zset', [BELL] = 'list',
    [FEEDER_BELL] = 'list', [PARKED] = 'set', [DEEP] = 'set', [HUNGRY] = 'set', [LANES] = 'hash',
    [GATES] = 'hash', [PROBING] = 'hash', [WOKEN] = 'zset', [MONEY] = 'hash', [SPENT] = 'hash', [HOLDS] = 'hash', [BREAKER] = 'hash', [FED] = 'string',
    [CLOCK] = 'string', [LIMITS] = 'hash', [LIMITER] = 'hash', [PERMITS] = 'zset', [RETRIES] = 'hash',
    [TURN] = 'zset', [RUNNING] = 'zset', [FULL] = 'set', [TENANTS] = 'hash', [OWED] = 'string', [COST] = 'string',
}
local MONEYS = {[MONEY] = true, [SPENT] = true, [HOLDS] = true, [HOLD_LEASES] = true}
local dropped, money = {}, ARGV[2] == '1'

local function is_epoch(field, value)
    return field == 'epoch' and #value < 100
end

-- Whether a field of a hash is one that we can read. Those of lanes and gates stand for themselves
-- and go alone; elsewhere the whole key goes.
local READABLE = {
    [LANES] = function(_, value) return number_of(value) end,
    [GATES] = function(_, value) return whole_of(value) end,
    [TENANTS] = function(_, value) return count_of(value) end,
    [SPENT] = function(field, value) return is_epoch(field, value) or whole_of(value) end,
    [HOLDS] = function(field, value) return is_epoch(field, value) or string.match(value, '^%d+\n.') end,
    [MONEY] = function(field, value)
        return whole_of(value) or not (string.match(field, '^limit|') or string.match(field, '^end|'))
    end,
    [LIMITER] = function(_, value) return number_of(value) end,
    [RETRIES] = function(field, value) return string.match(field, '^%a+:%d+$') and whole_of(value) end,
    [BREAKER] = function(field, value)
        return field == 'probe' or field == 'state' and value == 'open' or whole_of(value)
    end,
}

local function mend(key, name)
    local kind = redis.call('TYPE', key).ok
    if kind == 'none' then return end
    local broken = kind ~= TYPES[name] or name == CLOCK and not whole_of(redis.call('GET', key))
    if not broken and READABLE[name] then
        local fields = redis.call('HGETALL', key)
        for i = 1, #fields, 2 do
            if not READABLE[name](fields[i], fields[i + 1]) then
                if name == LANES or name == GATES then
                    redis.call('HDEL', key, fields[i])
                    dropped[#dropped + 1] = name
                else
                    broken = true
                end
            end
        end
    end
    if broken and MONEYS[name] then
        money = true
    elseif broken then
        redis.call('UNLINK', key)
        dropped[#dropped + 1] = name
    end
end

local page = redis.call('SCAN', ARGV[1], 'MATCH', 'headrace:*', 'COUNT', 500)
for _, key in ipairs(page[2]) do
    local name = TYPES[key] and key or string.match(key, '^headrace:%a+:')
    if TYPES[name] then mend(key, name) end
end
-- The counters are right together or not at all: whoever holds next puts them in place anew.
if money then
    redis.call('UNLINK', MONEY, SPENT, HOLDS, HOLD_LEASES)
    dropped[#dropped + 1] = MONEY
end
return {page[1], unpack(dropped)}
