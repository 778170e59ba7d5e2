-- What every script begins with: the one clock, and the names of keys.
local Q, ACTIVE, BELL = 'headrace:queue:', 'headrace:active:', 'headrace:bell:'
local WAITING, LANES, PARKED, GATES = 'headrace:waiting', 'headrace:lanes', 'headrace:parked', 'headrace:gates'
local DEEP, HUNGRY, FEEDER_BELL = 'headrace:deep', 'headrace:hungry', 'headrace:bell-feeder'
local MONEY, SPENT, HOLDS, HOLD_LEASES = 'headrace:money', 'headrace:spent', 'headrace:holds', 'headrace:hold-leases'

-- The server's time in milliseconds, moved by what tests put into headrace:clock.
local function now_ms()
    local time = redis.call('TIME')
    local shift = redis.call('GET', 'headrace:clock')
    return time[1] * 1000 + math.floor(time[2] / 1000) + (shift and tonumber(shift) or 0)
end

local function lane_of(queue)
    return string.match(queue, '^[^:]*')
end

local function ring(bell)
    if redis.call('LLEN', bell) == 0 then
        redis.call('RPUSH', bell, '1')
    end
end

-- A queue that may have a job due joins the others at the virtual time of the last served one.
local function activate(queue)
    local lane = lane_of(queue)
    local floor = redis.call('HGET', LANES, 'floor:' .. lane) or '0'
    redis.call('ZADD', ACTIVE .. lane, 'NX', floor, queue)
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
