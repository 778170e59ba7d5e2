-- Let calls go, each at its moment, or say when to ask again: for each all of its limiters, or none.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: version of the configuration, lease of a permit in ms, longest ms that a call may be let go
--       ahead of its moment, then id, target, most input tokens, most output tokens, ...
-- Returns 'STALE' when the limits here are of an older configuration, else
-- {{1, ms until the call is to go, tokens reserved} or {0, ms until it is worth asking again, 0}, ...},
-- then the standing of each limiter.
local now, lease, longest = now_ms(), tonumber(ARGV[2]), tonumber(ARGV[3])
if read(whole_of, redis.call('HGET', LIMITS, 'version') or '-1') < tonumber(ARGV[1]) then return 'STALE' end

-- The calls that are refused here stand in line: each is told when its own turn may come.
local behind = {}

local function refuse(l, at, tokens)
    local gap = AHEAD / 4
    for _, kind in ipairs(KINDS) do
        local speed = rate(l, kind, now)
        if speed < UNLIMITED then gap = math.max(gap, (kind == 'requests' and 1 or tokens) / speed) end
    end
    behind[l.name] = (behind[l.name] or 0) + gap
    return {0, math.ceil(math.min(at - now + behind[l.name], HORIZON)), 0}
end

local function admit(id, both, input, output)
    local tokens, go, latest = tokens_of(both[1], input, output), now, both[1]
    for _, l in ipairs(both) do
        if l.caps.concurrent and l.under_way >= l.caps.concurrent then return refuse(l, now, tokens) end
        for _, kind in ipairs(KINDS) do
            local at = math.max(rate(l, kind, now) < UNLIMITED and opens_at(l, kind, now) or now, l.cool or 0)
            if at > go then go, latest = at, l end
        end
    end
    if go > now + longest then return refuse(latest, go, tokens) end
    for _, l in ipairs(both) do
        for _, kind in ipairs(KINDS) do
            local speed = rate(l, kind, now)
            if speed < UNLIMITED then
                local cost = kind == 'requests' and 1 or tokens
                put(l, kind .. '.next', opens_at(l, kind, now) + cost / speed)
            end
            count_in(l, kind .. '.let', kind == 'requests' and 1 or tokens, now)
        end
        if l.claimed then claim_more(l, -1, now) end
        if l.caps.concurrent then
            l.under_way = l.under_way + 1
            redis.call('ZADD', PERMITS .. l.name, now + lease, id)
        end
    end
    return {1, math.max(0, math.ceil(go - now)), math.ceil(tokens)}
end

local verdicts, reply = {}, {}
for i = 4, #ARGV, 4 do
    verdicts[#verdicts + 1] = admit(ARGV[i], limiters_of(ARGV[i + 1], now), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]))
end
store_limiters()
reply[1] = verdicts
for _, l in pairs(limiters) do reply[#reply + 1] = standing(l, now) end
return reply
