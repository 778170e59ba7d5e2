-- Take ended ids out and tell whoever waits for them; put the others back for later, or at once where they were
-- woken meanwhile (push.lua); and put right what their claims were charged, so that tenants get what is theirs
-- by cost.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, id, delay in ms (-1: it has ended, -2: it runs on), what its run cost in nano-USD (-1: it had
--       none), ...
local AFTER_A_PROBE = 1000
local now = now_ms()
local bills, queues, returned, caps = {}, {}, {}, {}

local function book(queue, delay, cost)
    local bill = bills[queue]
    if not bill then
        bill = {spent = 0, returned = 0, ended = 0, cost = 0}
        bills[queue], queues[#queues + 1] = bill, queue
    end
    if delay == -2 then
        bill.spent = bill.spent + cost
        return
    end
    bill.spent, bill.returned = bill.spent + math.max(cost, LEAST), bill.returned + 1
    if delay == -1 then bill.cost, bill.ended = bill.cost + cost, bill.ended + 1 end
end

local function release(queue, id)
    for _, cap in ipairs({caps_of(queue)}) do
        if not returned[cap] then
            returned[cap], caps[#caps + 1] = {}, cap
        end
        table.insert(returned[cap], id)
    end
end

-- Between what was charged for what came back and what it cost, as far as it is known what was charged.
local function difference(bill, costs)
    if bill.returned == 0 then return bill.spent end
    local known = math.min(bill.returned, costs.jobs)
    if known == 0 then return 0 end
    local refund = known * costs.charged / costs.jobs
    costs.charged, costs.jobs = costs.charged - refund, costs.jobs - known
    return bill.spent - refund
end

-- What the queue's jobs cost in the mean, moved by those that ended: a tenth for each.
local function learn(before, bill)
    if bill.ended == 0 then return before end
    local mean = math.max(bill.cost / bill.ended, LEAST)
    return before and mean + (before - mean) * 0.9 ^ bill.ended or mean
end

-- Whatever is refunded, a tenant stays behind one that comes new, which would wait for it to catch up.
local function correct(lane, tenant, amount, floor)
    local weight = read(count_of, redis.call('HGET', TENANTS, 'weight|' .. tenant) or '1')
    local place, active = lane .. ':' .. tenant, redis.call('ZSCORE', TURN .. lane, tenant)
    local owed = active or redis.call('GET', OWED .. place)
    local virtual = math.max(owed and number_of(owed) or floor, floor)
    virtual = math.max(virtual + amount / weight, floor + LEAST / weight)
    if active then
        redis.call('ZADD', TURN .. lane, virtual, tenant)
    else
        redis.call('SET', OWED .. place, virtual, 'PX', OWED_MS)
    end
end

-- A breaker's gate that is shut for this job's probe lets another job through where nobody has learned of the
-- target meanwhile. Not at once: the next one may come back just as soon.
local function end_turn_of_probe(id)
    local till, gate = string.match(redis.call('HGET', PROBING, id) or '', '^(%d+)|(.+)$')
    redis.call('HDEL', PROBING, id)
    if till and redis.call('HGET', GATES, gate) == till then shut(gate, math.min(tonumber(till), now + AFTER_A_PROBE)) end
end

local any_probe, any_woken = redis.call('EXISTS', PROBING) == 1, redis.call('EXISTS', WOKEN) == 1
for i = 1, #ARGV, 4 do
    local queue, id, delay, cost = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
    if cost >= 0 then book(queue, delay, cost) end
    if delay ~= -2 then release(queue, id) end
    if any_probe and delay ~= -2 then end_turn_of_probe(id) end
    -- It was told to go on before it was known here that it waits (push.lua).
    if any_woken and delay ~= -2 and redis.call('ZREM', WOKEN, id) == 1 then delay = math.min(delay, 0) end
    if delay == -1 then
        redis.call('ZREM', Q .. queue, id)
        redis.call('PUBLISH', 'headrace:ended:' .. id, '1')
    elseif delay >= 0 then
        redis.call('ZADD', Q .. queue, now + delay, id)
        if delay == 0 then
            activate(queue)
            ring(BELL .. lane_of(queue))
        else
            redis.call('ZADD', WAITING, 'LT', now + delay, queue)
        end
    end
end

for _, queue in ipairs(queues) do
    local lane, bill, costs = lane_of(queue), bills[queue], costs_of(queue)
    local known = redis.call('HMGET', LANES, 'floor:' .. lane, 'cost:' .. lane)
    local floor, usual = read(number_of, known[1] or '0'), known[2] and read(number_of, known[2])
    local amount = difference(bill, costs)
    costs.mean = learn(costs.mean, bill)
    keep_costs(queue, costs)
    if bill.ended > 0 then redis.call('HSET', LANES, 'cost:' .. lane, learn(usual, bill)) end
    if amount ~= 0 then correct(lane, tenant_of(queue), amount, floor) end
end

for _, cap in ipairs(caps) do
    redis.call('ZREM', RUNNING .. cap, unpack(returned[cap]))
    bring_back(cap)
end
return (#ARGV) / 4
