-- Take as many due ids as there are free slots, fairly, and lease them.
--
-- Lanes are served by weight: each has a virtual time that grows by ids / weight, and the
-- one that is furthest behind is next. Inside a lane the tenants take turns in the same way, but
-- theirs grows by cost / weight: by what jobs of the queue cost in the mean, put right when they end
-- (finish.lua). A tenant's queues take turns as its tenant does. One that runs as many jobs as it may
-- steps aside until one of them ends; so does a queue, but not its tenant, of whose API key as many run.
-- The lease is the id's score: nobody else sees it until it ends, and then it is simply due
-- again. A queue behind a closed gate, or whose targets' limits have no room, is parked and its ids are not touched.
--
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: free slots, window, breaker probe lease in ms, run id of the server, version of the tenants' terms,
--       then lane, weight, lease in ms, ...
-- Returns {ms until the next queue has work (-1: none waits; -2: nothing was claimed, the terms of tenants
--          are to be put in place first), foreign names dropped, {queue, id, id, ...}, ...}
local slots, window, probe_lease = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local lanes, weight, lease, virtual, floor = {}, {}, {}, {}, {}
for i = 6, #ARGV, 3 do
    lanes[#lanes + 1] = ARGV[i]
    weight[ARGV[i]] = tonumber(ARGV[i + 1])
    lease[ARGV[i]] = tonumber(ARGV[i + 2])
end

-- Whatever is here was not filled by the feeder of this fleet: it was wiped, or came from an old
-- snapshot, or is another server. The feeder is told, and what is due here is claimed meanwhile.
local fed = redis.call('GET', FED) == ARGV[4]
if not fed then ring(FEEDER_BELL) end

local version = read(whole_of, redis.call('HGET', TENANTS, 'version') or '0')
if version < tonumber(ARGV[5]) then return {-2, 0} end
local any_terms = version > 0 and redis.call('HLEN', TENANTS) > 1

-- A gate is a field `<dimension>|<reason>`, its reason one of dispatch.GateReason. One whose time has
-- come is open; a breaker's lets a single job through as its probe, and is shut again for the time of a
-- probe's lease, or until that job comes back (finish.lua).
local any_gate = redis.call('HLEN', GATES) > 0
local seen = {}
local function gate(dimension, reason)
    local field = dimension .. '|' .. reason
    if seen[field] ~= nil then return seen[field] end
    local till = redis.call('HGET', GATES, field)
    till = till and read(whole_of, till)
    if not till then
        seen[field] = false
    elseif till == 0 or till > now then
        seen[field] = till
    elseif reason == 'breaker' then
        seen[field] = 'probe'
    else
        redis.call('HDEL', GATES, field)
        seen[field] = false
    end
    return seen[field]
end

local function gates_of(queue)
    local lane, route = string.match(queue, '^([^:]*):([^:]*):[^:]*$')
    if not lane then return {} end
    local tenant, key = tenant_of(queue), key_of(queue)
    local probe = nil
    -- A lane's gates keep back what is in the lanes of its handlers as well.
    local public = string.match(lane, '^[^@]*')
    local of_key = key and 'key:' .. key
    for _, dimension in ipairs({'global', 'lane:' .. public, 'route:' .. route, 'tenant:' .. tenant, of_key}) do
        for _, reason in ipairs({'pause', 'breaker', 'budget'}) do
            local state = gate(dimension, reason)
            if type(state) == 'number' then return {closed = state} end
            if state == 'probe' then probe = dimension .. '|' .. reason end
        end
    end
    return {probe = probe}
end

-- How many more jobs may run under a cap. After a wipe nobody knows who runs how many before the feeder
-- has put that in place.
local function room_under(cap, most)
    redis.call('ZREMRANGEBYSCORE', RUNNING .. cap, '-inf', now)
    if not most then return math.huge end
    redis.call('ZREMRANGEBYSCORE', RUNNING .. cap, now + BEYOND_ANY_LEASE, '+inf')
    return fed and read(count_of, most) - redis.call('ZCARD', RUNNING .. cap) or 0
end

-- What a tenant's jobs weigh, and how many more of them may run.
local terms = {}
local function terms_of(tenant)
    if terms[tenant] then return terms[tenant] end
    local cap = cap_of(tenant)
    local said = any_terms and redis.call('HMGET', TENANTS, 'weight|' .. tenant, 'concurrent|' .. cap) or {}
    local weight = said[1] and read(count_of, said[1]) or 1
    terms[tenant] = {weight = weight, cap = cap, room = room_under(cap, said[2])}
    return terms[tenant]
end

-- How many more jobs of a queue's API key may run, whoever's they are, and under which cap (nil: of no key).
local WITHOUT_KEY = {room = math.huge}
local keyed = {}
local function key_terms_of(queue)
    local _, cap = caps_of(queue)
    if not cap then return WITHOUT_KEY end
    if not keyed[cap] then
        local most = any_terms and redis.call('HGET', TENANTS, 'concurrent|' .. cap)
        keyed[cap] = {cap = cap, room = room_under(cap, most)}
    end
    return keyed[cap]
end

-- What stands in a full cap's way is told when a job ends that runs under it (finish.lua), or at the latest
-- when a lease of theirs does.
local function wait_for_room(cap, place, queue)
    redis.call('SADD', FULL .. cap, place)
    local soonest = redis.call('ZRANGE', RUNNING .. cap, 0, 0, 'WITHSCORES')
    redis.call('ZADD', WAITING, 'LT', fed and soonest[2] or now + 100, queue)
end

-- Charge what was claimed as the mean of its queue, or of the lane while the queue has none.
local costs = {}
local function charge(queue, lane, count)
    costs[queue] = costs[queue] or costs_of(queue)
    local mean = costs[queue].mean or read(number_of, redis.call('HGET', LANES, 'cost:' .. lane) or tostring(LEAST))
    costs[queue].charged = costs[queue].charged + count * mean
    costs[queue].jobs = costs[queue].jobs + count
    return count * mean
end

local function take_out(queue, lane, wait)
    local tenant = tenant_of(queue)
    local queues = ACTIVE .. lane .. ':' .. tenant
    redis.call('ZREM', queues, queue)
    if redis.call('EXISTS', queues) == 0 then leave(lane, tenant, wait) end
end

-- The tenant is out of the way, in this lane, with all its queues.
local function step_aside(lane, tenant, queue)
    leave(lane, tenant)
    wait_for_room(terms_of(tenant).cap, lane .. ':' .. tenant, queue)
end

-- The queue is out of the way, its tenant goes on with others.
local function step_aside_alone(lane, queue)
    take_out(queue, lane)
    wait_for_room(key_terms_of(queue).cap, queue, queue)
end

-- Many wait for the same moment, and a claim looks at some hundreds of them: they come back in the order
-- in which it would have been their turn, and not in that of their names.
local parked = 0
local function park(queue, lane, till)
    local wait = till > 0 and math.min(till - now, 3600000) or 0
    local virtual = redis.call('ZSCORE', ACTIVE .. lane .. ':' .. tenant_of(queue), queue)
    if virtual and wait > 0 then redis.call('SET', OWED .. queue, virtual, 'PX', OWED_MS + wait) end
    take_out(queue, lane, wait)
    redis.call('SADD', PARKED, queue)
    parked = parked + 1
    if till > 0 then redis.call('ZADD', WAITING, string.format('%.3f', till + parked / 1000), queue) end
end

-- Nothing is due in it any more: it comes back when its next id is.
local function rest(queue, lane)
    take_out(queue, lane)
    local following = redis.call('ZRANGE', Q .. queue, 0, 0, 'WITHSCORES')
    if following[2] then redis.call('ZADD', WAITING, following[2], queue) end
end

local function feed_if_hungry(queue)
    if redis.call('SISMEMBER', DEEP, queue) == 1
       and redis.call('ZCOUNT', Q .. queue, '-inf', now) < window / 2
       and redis.call('SADD', HUNGRY, queue) == 1 then
        ring(FEEDER_BELL)
    end
end

local foreign = 0
for _, queue in ipairs(redis.call('ZRANGEBYSCORE', WAITING, '-inf', now, 'LIMIT', 0, 200)) do
    redis.call('ZREM', WAITING, queue)
    redis.call('SREM', PARKED, queue)
    activate(queue)
    if not is_queue(queue) then foreign = foreign + 1 end
end

-- A lane that was idle does not catch up on the time it had no work.
local served = read(number_of, redis.call('HGET', LANES, 'served') or '0')
local active, alone = 0, nil
for _, lane in ipairs(lanes) do
    virtual[lane] = math.max(read(number_of, redis.call('HGET', LANES, lane) or '0'), served)
    local tenants = redis.call('ZCARD', TURN .. lane)
    active = active + tenants
    if tenants == 1 then alone = lane .. ':' .. redis.call('ZRANGE', TURN .. lane, 0, 0)[1] end
end
if active == 1 then active = redis.call('ZCARD', ACTIVE .. alone) end
local quantum = active > 0 and math.max(1, math.floor(slots / (4 * active))) or 1
if active == 1 then quantum = slots end
quantum = math.min(quantum, 1000)

local result, index, exhausted = {-1, 0}, {}, {}
while slots > 0 do
    local lane = nil
    for _, name in ipairs(lanes) do
        if not exhausted[name] and (not lane or virtual[name] < virtual[lane]) then lane = name end
    end
    if not lane then break end
    local head = redis.call('ZRANGE', TURN .. lane, 0, 0, 'WITHSCORES')
    local tenant, queues = head[1], ACTIVE .. lane .. ':' .. (head[1] or '')
    local first = tenant and redis.call('ZRANGE', queues, 0, 0, 'WITHSCORES') or {}
    local queue = first[1]
    if not tenant then
        exhausted[lane] = true
    elseif not queue then
        redis.call('ZREM', TURN .. lane, tenant)
    elseif not is_queue(queue) or queues ~= ACTIVE .. lane_of(queue) .. ':' .. tenant_of(queue) then
        redis.call('ZREM', queues, queue)
        if not is_queue(queue) then redis.call('UNLINK', Q .. queue) end
        if is_queue(queue) and lane_of(queue) == lane then
            -- A worker of another version keeps it there: to it the key is part of the tenant.
            activate(queue)
        else
            foreign = foreign + 1
        end
    elseif not number_of(head[2]) or not number_of(first[2]) then
        -- No virtual time that was ever reached: it would be served always, or never.
        redis.call('ZREM', TURN .. lane, tenant)
        redis.call('ZREM', queues, queue)
        activate(queue)
    elseif terms_of(tenant).room <= 0 then
        step_aside(lane, tenant, queue)
    elseif key_terms_of(queue).room <= 0 then
        step_aside_alone(lane, queue)
    else
        local gates = any_gate and gates_of(queue) or {}
        if gates.closed then
            park(queue, lane, gates.closed)
        else
            local permitted, wait = permits(route_of(queue), now)
            local mine, its_key = terms_of(tenant), key_terms_of(queue)
            local want = math.min(gates.probe and 1 or quantum, slots, mine.room, its_key.room, permitted)
            local ids = want < 1 and {} or redis.pcall('ZRANGEBYSCORE', Q .. queue, '-inf', now, 'LIMIT', 0, want)
            if ids.err then
                -- Somebody else's key under our name: nothing in it can be claimed.
                take_out(queue, lane)
            elseif want < 1 then
                park(queue, lane, now + wait)
            elseif #ids == 0 then
                rest(queue, lane)
            else
                local leases = {}
                for _, id in ipairs(ids) do
                    leases[#leases + 1] = now + lease[lane]
                    leases[#leases + 1] = id
                end
                redis.call('ZADD', Q .. queue, unpack(leases))
                reserve(route_of(queue), #ids, now)
                redis.call('ZADD', RUNNING .. mine.cap, unpack(leases))
                if its_key.cap then redis.call('ZADD', RUNNING .. its_key.cap, unpack(leases)) end
                if not index[queue] then
                    result[#result + 1] = {queue}
                    index[queue] = #result
                end
                local batch = result[index[queue]]
                for _, id in ipairs(ids) do batch[#batch + 1] = id end
                slots = slots - #ids
                mine.room, its_key.room = mine.room - #ids, its_key.room - #ids
                served = virtual[lane]
                virtual[lane] = virtual[lane] + #ids / weight[lane]
                floor[lane] = head[2]
                local charged = charge(queue, lane, #ids)
                redis.call('ZINCRBY', TURN .. lane, charged / mine.weight, tenant)
                if gates.probe then
                    redis.call('HSET', GATES, gates.probe, now + probe_lease)
                    redis.call('HSET', PROBING, ids[1], string.format('%.0f|%s', now + probe_lease, gates.probe))
                    redis.call('PEXPIRE', PROBING, 2 * probe_lease)
                    seen[gates.probe] = now + probe_lease
                    park(queue, lane, now + probe_lease)
                elseif #ids < want then
                    rest(queue, lane)
                else
                    redis.call('ZINCRBY', queues, charged, queue)
                end
                feed_if_hungry(queue)
            end
        end
    end
end
for lane, reached in pairs(floor) do
    redis.call('HSET', LANES, lane, virtual[lane], 'served', served, 'floor:' .. lane, reached)
end
for queue, charged in pairs(costs) do keep_costs(queue, charged) end

store_limiters()

-- What is left is for the next worker: it is woken by this one, so that an enqueue of a
-- thousand jobs rings once and not a thousand times.
for _, lane in ipairs(lanes) do
    if redis.call('ZCARD', TURN .. lane) > 0 then ring(BELL .. lane) end
end
local following = redis.call('ZRANGE', WAITING, 0, 0, 'WITHSCORES')
if following[2] then result[1] = math.max(0, math.min(tonumber(following[2]) - now, 86400000)) end
result[2] = foreign
return result
