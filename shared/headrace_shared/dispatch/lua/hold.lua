-- Hold money for calls that are about to be made: for each all of its scopes, or none.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: epoch, lease in ms, format of the counters, then hold id, amount, scopes joined by newlines, ...
-- Returns 'STALE' when the counters are of another epoch or format, or a window has turned, else for each
-- {1, ms of the hold} or {0, scope, window kind, limit, missing, held by others, ms until the window ends, policy}.
local epoch, lease, now = ARGV[1], tonumber(ARGV[2]), now_ms()
local money = {}
local function setting(field)
    if money[field] == nil then money[field] = redis.call('HGET', MONEY, field) end
    return money[field]
end
if not is_in_place(epoch) or setting('format') ~= ARGV[3] then return 'STALE' end
for _, kind in ipairs({'day', 'week', 'month'}) do
    if now >= read(whole_of, setting('end|' .. kind) or '') then return 'STALE' end
end
local KINDS = {'total', 'day', 'week', 'month'}

-- The counters that a scope has: one for each of its budgets. A scope is looked up once a call of the script.
local known = {}
local function counters_of(scope)
    if known[scope] then return known[scope] end
    local found = {}
    for _, kind in ipairs(KINDS) do
        local limit = setting('limit|' .. scope .. '|' .. kind)
        if limit then
            found[#found + 1] = {scope = scope, kind = kind, limit = read(whole_of, limit),
                                 policy = setting('policy|' .. scope .. '|' .. kind) or '',
                                 name = scope .. '|' .. (setting('window|' .. kind) or '')}
        end
    end
    known[scope] = found
    return found
end

local function counters(scopes)
    local found = {}
    for scope in string.gmatch(scopes, '[^\n]+') do
        for _, counter in ipairs(counters_of(scope)) do found[#found + 1] = counter end
    end
    return found
end

-- What was settled and is in suspense was put in place for each budget; only `held` may be missing.
local function count(name, part, absent)
    return read(whole_of, redis.call('HGET', SPENT, name .. '|' .. part) or absent or '')
end

-- A soft budget counts, and refuses nothing.
local function refusal(amount, found)
    for _, c in ipairs(found) do
        local held = count(c.name, 'held', '0')
        if held < 0 then damaged() end
        local missing = count(c.name, 'settled') + count(c.name, 'suspense') + held + amount - c.limit
        if missing > 0 and c.policy ~= 'soft' then
            local ends = setting('end|' .. c.kind)
            return {0, c.scope, c.kind, c.limit, missing, held, ends and tonumber(ends) - now or -1, c.policy}
        end
    end
    return nil
end

local result = {}
for i = 4, #ARGV, 3 do
    local id, amount, found = ARGV[i], tonumber(ARGV[i + 1]), counters(ARGV[i + 2])
    local refused = refusal(amount, found)
    if refused then
        result[#result + 1] = refused
    else
        local names = {}
        for n, c in ipairs(found) do
            redis.call('HINCRBY', SPENT, c.name .. '|held', amount)
            names[n] = c.name
        end
        if #names > 0 then
            redis.call('HSET', HOLDS, id, string.format('%.0f', amount) .. '\n' .. table.concat(names, '\n'))
            redis.call('ZADD', HOLD_LEASES, now + lease, id)
        end
        result[#result + 1] = {1, now}
    end
end
return result
