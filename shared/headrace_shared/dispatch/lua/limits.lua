-- How much a provider lets through: what scripts that claim, admit and report have in common.
--
-- A limiter is a provider, or one of its models. For requests and for tokens it keeps the moment from
-- which the next call may go, which each call moves on by what it takes at the rate in force: a bucket
-- that is refilled all the time, holds next to nothing, and begins empty. What is in force is the least
-- of the configured ceiling, what the provider says its limit is, what it says is left of it, and what
-- was cut after it refused calls.
local UNLIMITED = math.huge
local FILLED = 0.995      -- of a limit is used: what is over it by a hair is refused as well
local DEPTH = 20        -- ms that a bucket may catch up on
local AHEAD = 400       -- ms for which jobs are claimed ahead: what claim and admission take, and more
local RECOVERY = 15000  -- ms until a rate that was cut is what it was; then it feels its way up
local FIRST_CUT, DEEPEST_CUT = 0.015, 0.5
local LEFT_AT_LEAST = 0.02      -- of a limit, whatever the provider says is left
local HORIZON = 3600000 -- ms ahead beyond which no moment is believed
local SEEN = 5000       -- ms over which calls are counted as a rate
local FORGET = 500      -- ms after which a claim that led to no call is forgotten
local RATIO = 0.35     -- of the bytes of a request are tokens, until answers say how many
local KINDS = {'requests', 'tokens'}
local limiters = {}

local function ceilings_of(name)
    local caps, text = {}, redis.call('HGET', LIMITS, 'cap:' .. name)
    if text then
        local requests, tokens, concurrent = string.match(text, '^(%S+) (%S+) (%S+)$')
        caps = {requests = number_of(requests or ''), tokens = number_of(tokens or ''),
                concurrent = number_of(concurrent or '')}
    end
    return caps
end

local function limiter(name, now)
    local l = limiters[name]
    if l then return l end
    l = {name = name, caps = ceilings_of(name), changed = {}}
    local fields = redis.call('HGETALL', LIMITER .. name)
    for i = 1, #fields, 2 do l[fields[i]] = read(number_of, fields[i + 1]) end
    -- Nothing that somebody else wrote keeps calls for ever.
    for _, field in ipairs({'cool', 'requests.next', 'tokens.next', 'requests.paced_till', 'tokens.paced_till'}) do
        if (l[field] or 0) > now + HORIZON then l[field] = nil end
    end
    if l.caps.concurrent then
        redis.call('ZREMRANGEBYSCORE', PERMITS .. name, '-inf', now)
        l.under_way = redis.call('ZCARD', PERMITS .. name)
    end
    limiters[name] = l
    return l
end

local function put(l, field, value)
    l[field] = value
    l.changed[field] = value
end

local function store_limiters()
    for name, l in pairs(limiters) do
        local args = {}
        for field, value in pairs(l.changed) do
            args[#args + 1] = field
            args[#args + 1] = string.format('%.3f', value)
        end
        if #args > 0 then
            redis.call('HSET', LIMITER .. name, unpack(args))
            redis.call('PEXPIRE', LIMITER .. name, 86400000)
            l.changed = {}
        end
    end
end

-- So many a minute, as it was of late.
local function fading(l, field, now)
    return (l[field] or 0) * math.exp(-math.max(0, now - (l[field .. '_at'] or 0)) / SEEN)
end

local function count_in(l, field, count, now)
    local before = fading(l, field, now)
    if before < 1 then put(l, field .. '_since', now) end
    put(l, field, before + count * 60000 / SEEN)
    put(l, field .. '_at', now)
end

-- What a limiter lets through in a millisecond.
local function rate(l, kind, now)
    local limit = math.min(l.caps[kind] or UNLIMITED, l[kind .. '.told'] or UNLIMITED)
    local most = limit * FILLED
    local cut = l[kind .. '.cut']
    if cut then
        local since = math.max(0, now - (l[kind .. '.cut_at'] or 0)) / RECOVERY - 1
        local depth = math.min(DEEPEST_CUT, l[kind .. '.depth'] or FIRST_CUT)
        most = math.min(most, cut * (1 + depth * since * since * since))
    end
    if (l[kind .. '.paced_till'] or 0) > now then
        most = math.min(most, math.max(l[kind .. '.pace'] or 0, limit * LEFT_AT_LEAST))
    end
    return most == UNLIMITED and UNLIMITED or math.max(most, 1) / 60000
end

-- The moment from which the next call may go.
local function opens_at(l, kind, now)
    return math.max(l[kind .. '.next'] or now, now - DEPTH, l.cool or 0)
end

local function tokens_of(l, input, output)
    return math.max(1, input * (l.ratio or RATIO) + math.min(output, l.output or output))
end

-- Jobs that were claimed for this limiter and have not come to their call yet.
local function claimed(l, now)
    if not l.claimed then return 0 end
    return l.claimed * math.exp(-math.max(0, now - (l.claimed_at or 0)) / FORGET)
end

local function claim_more(l, count, now)
    put(l, 'claimed', math.max(0, claimed(l, now) + count))
    put(l, 'claimed_at', now)
end

-- How many average calls may go soon, and the ms until it is worth asking again when none may.
local function room(l, now)
    local most, wait, waiting = UNLIMITED, 0, claimed(l, now)
    if (l.cool or 0) > now + AHEAD then
        most, wait = 0, l.cool - now
    end
    for _, kind in ipairs(KINDS) do
        local speed = rate(l, kind, now)
        if speed < UNLIMITED then
            local gap = (kind == 'requests' and 1 or l.mean or 300) / speed
            local at = opens_at(l, kind, now) + waiting * gap
            most = math.min(most, math.max(0, math.floor((now + AHEAD - at) / gap) + 1))
            wait = math.max(wait, at - now - AHEAD / 2)
        end
    end
    if l.caps.concurrent then
        -- Rounded: the last of what fades would keep a place free for seconds that nobody is on his way to.
        local free = math.max(0, math.floor(l.caps.concurrent - l.under_way - waiting + 0.5))
        if free == 0 then wait = math.max(wait, AHEAD / 4) end
        most = math.min(most, free)
    end
    return most, math.max(1, math.ceil(wait))
end

-- The limiters of a target: its own, and its provider's.
local function limiters_of(target, now)
    return {limiter(target, now), limiter(string.match(target, '^[^/]*'), now)}
end

local function route_of(queue)
    return string.match(queue, '^[^:]*:([^:]*):')
end

local routes = {}
local function targets_of(route)
    if not routes[route] then
        local found, text = {}, redis.call('HGET', LIMITS, 'route:' .. route)
        if not text then
            -- What a handler calls nobody knows before it does.
            local own = string.find(route, '^handler%%3A')
            local provider = not own and redis.call('HGET', LIMITS, 'default')
            text = provider and provider .. '/' .. route or ''
        end
        for target in string.gmatch(text, '%S+') do found[#found + 1] = target end
        routes[route] = found
    end
    return routes[route]
end

-- How many jobs of a route may be claimed, and the ms until there is one when there is none.
local function permits(route, now)
    local sum, soonest = 0, UNLIMITED
    local targets = targets_of(route)
    for _, target in ipairs(targets) do
        local most, wait = UNLIMITED, 0
        for _, l in ipairs(limiters_of(target, now)) do
            local here, till = room(l, now)
            most, wait = math.min(most, here), math.max(wait, till)
        end
        sum, soonest = sum + most, math.min(soonest, wait)
    end
    if #targets == 0 then return UNLIMITED, 0 end
    return sum, sum > 0 and 0 or soonest
end

-- Count jobs of a route as claimed: an average call each, until its admission says what it takes.
local function reserve(route, count, now)
    local targets = targets_of(route)
    for place, target in ipairs(targets) do
        local both, most = limiters_of(target, now), count
        for _, l in ipairs(both) do most = math.min(most, (room(l, now))) end
        if place == #targets then most = count end
        for _, l in ipairs(both) do
            if next(l.caps) or l.mean or l.cool then claim_more(l, most, now) end
        end
        count = count - most
        if count <= 0 then return end
    end
end

-- What a process goes by until it asks again: ms until a call may go, what is in force, and for how
-- many ms nobody is to send.
local function standing(l, now)
    local at = l.cool or 0
    local said = {}
    for _, kind in ipairs(KINDS) do
        at = math.max(at, opens_at(l, kind, now))
        local speed = rate(l, kind, now)
        said[#said + 1] = speed == UNLIMITED and -1 or math.floor(speed * 60000 + 0.5)
    end
    return {l.name, math.max(0, math.ceil(at - now)), said[1], said[2],
            l.caps.concurrent or -1, math.max(0, math.ceil((l.cool or 0) - now))}
end
