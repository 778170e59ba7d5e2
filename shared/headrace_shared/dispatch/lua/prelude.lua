-- What every script begins with: the one clock, the names of keys, and how values in them are read.
local Q, ACTIVE, BELL = 'headrace:queue:', 'headrace:active:', 'headrace:bell:'
local WAITING, LANES, PARKED = 'headrace:waiting', 'headrace:lanes', 'headrace:parked'
local GATES, PROBING, WOKEN = 'headrace:gates', 'headrace:probing', 'headrace:woken'
local DEEP, HUNGRY, FEEDER_BELL, FED = 'headrace:deep', 'headrace:hungry', 'headrace:bell-feeder', 'headrace:fed'
local BREAKER, CLOCK = 'headrace:breaker:', 'headrace:clock'
local LIMITS, LIMITER, PERMITS = 'headrace:limits', 'headrace:limiter:', 'headrace:permits:'
local TURN, OWED, COST = 'headrace:turn:', 'headrace:owed:', 'headrace:cost:'
local RUNNING, FULL, TENANTS = 'headrace:running:', 'headrace:full:', 'headrace:tenants'
local RETRIES, REBUILDING = 'headrace:retries:', 'headrace:rebuilding'
local MONEY, SPENT, HOLDS, HOLD_LEASES = 'headrace:money', 'headrace:spent', 'headrace:holds', 'headrace:hold-leases'

-- Numbers as scripts write them; nil for what somebody else left here.
local function number_of(text)
    local number = tonumber(text)
    return number and math.abs(number) < 1e16 and number or nil
end

local function whole_of(text)
    return #text < 19 and string.match(text, '^-?%d+$') and tonumber(text) or nil
end

local function count_of(text)
    local number = whole_of(text)
    return number and number > 0 and number or nil
end

-- The same where a script cannot go on without it: it stops, the key is dropped (repair.lua),
-- and the script is run once more.
local function damaged()
    error('headrace: foreign bytes')
end

local function read(reader, text)
    local value = reader(text)
    if value == nil then damaged() end
    return value
end

-- The server's time in milliseconds, moved by what tests put into headrace:clock.
local function now_ms()
    local time = redis.call('TIME')
    local shift = redis.call('GET', CLOCK)
    return time[1] * 1000 + math.floor(time[2] / 1000) + (shift and whole_of(shift) or 0)
end

-- The millisecond at which the present tenth of a rolling window began.
local function slice_of(now, window)
    local slice = math.max(1, math.floor(window / 10))
    return math.floor(now / slice) * slice
end

-- The counters are valid for one epoch, which stands in each of their keys: where one was lost or
-- replaced, all of them are put in place anew.
local function is_in_place(epoch)
    return redis.call('HGET', MONEY, 'epoch') == epoch and redis.call('HGET', SPENT, 'epoch') == epoch
        and redis.call('HGET', HOLDS, 'epoch') == epoch
end

local function lane_of(queue)
    return string.match(queue, '^[^:]*')
end

-- What is between the tenant and the API key that jobs of a queue came with (keys.py).
local KEYED = '%00'

local function tenant_of(queue)
    local owner = string.match(queue, '[^:]*$')
    local mark = string.find(owner, KEYED, 1, true)
    return mark and string.sub(owner, 1, mark - 1) or owner
end

local function key_of(queue)
    local mark = string.find(queue, KEYED, (string.find(queue, '[^:]*$')), true)
    return mark and string.sub(queue, mark + #KEYED)
end

-- The name of the cap under which a tenant's jobs run; the jobs of an API key run under another.
local function cap_of(tenant)
    return 'tenant:' .. tenant
end

-- The caps under which the jobs of a queue run.
local function caps_of(queue)
    local key = key_of(queue)
    return cap_of(tenant_of(queue)), key and 'key:' .. key
end

local function is_queue(name)
    return #name < 10000 and string.find(name, '^[^:]+:[^:]+:[^:]+$') ~= nil
end

local function ring(bell)
    if redis.call('LLEN', bell) == 0 then
        redis.call('RPUSH', bell, '1')
    end
end

-- No lease of a job is that long (ms): one that ends later was written by somebody else, and is nobody's.
local BEYOND_ANY_LEASE = 86400000

-- A slot is worth something even where a call is free: what a job counts for at least, in nano-USD.
local LEAST = 10000

-- For so long what a tenant has had of a lane is remembered when it has nothing due there; where it is parked,
-- for so much longer than that lasts.
local OWED_MS = 10000

-- A tenant that may have a job due joins the others of its lane at the virtual time of the last
-- served one, or at its own where that is further on.
local function join(lane, tenant)
    if redis.call('ZSCORE', TURN .. lane, tenant) then return end
    local floor = read(number_of, redis.call('HGET', LANES, 'floor:' .. lane) or '0')
    local owed = number_of(redis.call('GETDEL', OWED .. lane .. ':' .. tenant) or '')
    redis.call('ZADD', TURN .. lane, math.max(floor, owed or floor), tenant)
end

local function leave(lane, tenant, wait)
    local virtual = redis.call('ZSCORE', TURN .. lane, tenant)
    if not virtual then return end
    redis.call('ZREM', TURN .. lane, tenant)
    redis.call('SET', OWED .. lane .. ':' .. tenant, virtual, 'PX', OWED_MS + (wait or 0))
end

-- A queue that may have a job due joins the others of its tenant: beside the one that is next or, where it
-- was parked, at its own place behind that one. What is not the name of one joins nothing.
local function activate(queue)
    if not is_queue(queue) then return end
    local lane, tenant = lane_of(queue), tenant_of(queue)
    local queues = ACTIVE .. lane .. ':' .. tenant
    local following = redis.call('ZRANGE', queues, 0, 0, 'WITHSCORES')
    local floor = following[2] and number_of(following[2]) or 0
    local owed = number_of(redis.call('GETDEL', OWED .. queue) or '')
    redis.call('ZADD', queues, 'NX', math.max(floor, owed or floor), queue)
    join(lane, tenant)
end

-- There is room again under a cap: those that stepped aside for it join the others, tenants in their lanes
-- for a tenant's, queues for a key's.
local function bring_back(cap)
    for _, place in ipairs(redis.call('SMEMBERS', FULL .. cap)) do
        local lane, tenant = string.match(place, '^([^:]+):([^:]+)$')
        if lane then join(lane, tenant) else activate(place) end
        if lane or is_queue(place) then ring(BELL .. lane_of(place)) end
    end
    redis.call('DEL', FULL .. cap)
end

-- What the jobs of a queue cost: the mean of one (nil: none has ended), and what those that are out were
-- charged when they were claimed. It decides whose turn it is and nothing else: what cannot be read is
-- learned again.
local function costs_of(queue)
    local text = redis.call('GET', COST .. queue) or ''
    local mean, charged, jobs = string.match(#text < 100 and text or '', '^(%S+) (%S+) (%S+)$')
    mean, charged, jobs = number_of(mean or ''), number_of(charged or ''), number_of(jobs or '')
    if not charged or not jobs or charged < 0 or jobs < 1 then charged, jobs = 0, 0 end
    return {mean = mean and math.max(mean, LEAST), charged = charged, jobs = jobs}
end

local function keep_costs(queue, costs)
    local text = string.format('%s %.17g %.17g', costs.mean or '-', costs.charged, costs.jobs)
    redis.call('SET', COST .. queue, text, 'PX', 86400000)
end

-- Every parked queue is looked at again: another gate may still keep it out.
local function unpark()
    for _, queue in ipairs(redis.call('SMEMBERS', PARKED)) do
        redis.call('ZREM', WAITING, queue)
        activate(queue)
        ring(BELL .. lane_of(queue))
    end
    redis.call('DEL', PARKED)
end

-- Close a gate until then (0: until it is opened). Queues were parked until the time that held before: an
-- earlier one brings them back earlier.
local function shut(gate, till)
    local known = redis.call('HGET', GATES, gate)
    local before = known and read(whole_of, known) or till
    redis.call('HSET', GATES, gate, till)
    if till == 0 or before ~= 0 and before <= till then return end
    for _, queue in ipairs(redis.call('SMEMBERS', PARKED)) do
        if not redis.call('ZSCORE', ACTIVE .. lane_of(queue) .. ':' .. tenant_of(queue), queue) then
            redis.call('ZADD', WAITING, 'LT', till, queue)
        end
    end
end

-- How long until a probe of an open breaker may go, and whether an operator opened it. Such a one is asked
-- about again soon, for an operator may close it at any time.
local function wait_for_probe(breaker, now)
    local reopen, hand = unpack(redis.call('HMGET', breaker, 'reopen_at', 'hand'))
    local wait = math.max(0, read(whole_of, reopen or '0') - now)
    if not hand or wait == 0 then return wait, false end
    return math.min(wait, 5000), true
end
