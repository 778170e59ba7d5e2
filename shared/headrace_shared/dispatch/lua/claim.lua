-- Take as many due ids as there are free slots, fairly, and lease them.
--
-- Lanes are served by weight: each has a virtual time that grows by ids / weight, and the
-- one that is furthest behind is next. Inside a lane the queues take turns in the same way.
-- The lease is the id's score: nobody else sees it until it ends, and then it is simply due
-- again. A queue behind a closed gate is parked and its ids are not touched.
--
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: free slots, window, breaker probe lease in ms, run id of the server, then lane, weight, lease in ms, ...
-- Returns {ms until the next queue has work (-1: none waits), foreign names dropped, {queue, id, id, ...}, ...}
local slots, window, probe_lease = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local lanes, weight, lease, virtual = {}, {}, {}, {}
for i = 5, #ARGV, 3 do
    lanes[#lanes + 1] = ARGV[i]
    weight[ARGV[i]] = tonumber(ARGV[i + 1])
    lease[ARGV[i]] = tonumber(ARGV[i + 2])
end

-- Whatever is here was not filled by the feeder of this fleet: it was wiped, or came from an old
-- snapshot, or is another server. The feeder is told, and what is due here is claimed meanwhile.
if redis.call('GET', FED) ~= ARGV[4] then ring(FEEDER_BELL) end

-- A gate is a field `<dimension>|<reason>`. One whose time has come is open; a breaker's lets
-- a single job through as its probe, and is shut again for the time of a probe's lease.
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
    local lane, route, tenant = string.match(queue, '^([^:]*):([^:]*):([^:]*)$')
    if not lane then return {} end
    local probe = nil
    -- A lane's gates keep back what is in the lanes of its handlers as well.
    local public = string.match(lane, '^[^@]*')
    for _, dimension in ipairs({'global', 'lane:' .. public, 'route:' .. route, 'tenant:' .. tenant}) do
        for _, reason in ipairs({'pause', 'breaker', 'limit', 'budget'}) do
            local state = gate(dimension, reason)
            if type(state) == 'number' then return {closed = state} end
            if state == 'probe' then probe = dimension .. '|' .. reason end
        end
    end
    return {probe = probe}
end

local function park(queue, lane, till)
    redis.call('ZREM', ACTIVE .. lane, queue)
    redis.call('SADD', PARKED, queue)
    if till > 0 then redis.call('ZADD', WAITING, till, queue) end
end

-- Nothing is due in it any more: it comes back when its next id is.
local function rest(queue, lane)
    redis.call('ZREM', ACTIVE .. lane, queue)
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
local active = 0
for _, lane in ipairs(lanes) do
    virtual[lane] = math.max(read(number_of, redis.call('HGET', LANES, lane) or '0'), served)
    active = active + redis.call('ZCARD', ACTIVE .. lane)
end
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
    local head = redis.call('ZRANGE', ACTIVE .. lane, 0, 0, 'WITHSCORES')
    local queue = head[1]
    if not queue then
        exhausted[lane] = true
    elseif not is_queue(queue) then
        redis.call('ZREM', ACTIVE .. lane, queue)
        redis.call('UNLINK', Q .. queue)
        foreign = foreign + 1
    elseif not number_of(head[2]) then
        -- No virtual time that was ever reached: it would be served always, or never.
        redis.call('ZREM', ACTIVE .. lane, queue)
        activate(queue)
    else
        local gates = any_gate and gates_of(queue) or {}
        if gates.closed then
            park(queue, lane, gates.closed)
        else
            local want, wait = permits(route_of(queue), now)
            want = math.min(gates.probe and 1 or quantum, slots, want)
            local ids = want < 1 and {} or redis.pcall('ZRANGEBYSCORE', Q .. queue, '-inf', now, 'LIMIT', 0, want)
            if ids.err then
                -- Somebody else's key under our name: nothing in it can be claimed.
                redis.call('ZREM', ACTIVE .. lane, queue)
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
                charge(route_of(queue), #ids, now)
                if not index[queue] then
                    result[#result + 1] = {queue}
                    index[queue] = #result
                end
                local batch = result[index[queue]]
                for _, id in ipairs(ids) do batch[#batch + 1] = id end
                slots = slots - #ids
                served = virtual[lane]
                virtual[lane] = virtual[lane] + #ids / weight[lane]
                redis.call('HSET', LANES, lane, virtual[lane], 'served', served, 'floor:' .. lane, head[2])
                if gates.probe then
                    redis.call('HSET', GATES, gates.probe, now + probe_lease)
                    seen[gates.probe] = now + probe_lease
                    park(queue, lane, now + probe_lease)
                elseif #ids < want then
                    rest(queue, lane)
                else
                    redis.call('ZINCRBY', ACTIVE .. lane, #ids, queue)
                end
                feed_if_hungry(queue)
            end
        end
    end
end

store_limiters()

-- What is left is for the next worker: it is woken by this one, so that an enqueue of a
-- thousand jobs rings once and not a thousand times.
for _, lane in ipairs(lanes) do
    if redis.call('ZCARD', ACTIVE .. lane) > 0 then ring(BELL .. lane) end
end
local following = redis.call('ZRANGE', WAITING, 0, 0, 'WITHSCORES')
if following[2] then result[1] = math.max(0, math.min(tonumber(following[2]) - now, 86400000)) end
result[2] = foreign
return result
