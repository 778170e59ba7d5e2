-- Put ids into a queue: those that its window has room for; the rest waits in Postgres.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: queue, window, what becomes of an id that is there (`keep`: it stays as it is; `replace`: it
--       gets the new time; `wake`: so it does, but one that is leased does when its run ends; or
--       milliseconds: it gets the new time if it is due later than so much from now), then id, delay in ms, ...
-- Returns how many were taken. A window that is full marks its queue as deep: there may be more.
local queue, window, known_ones = ARGV[1], tonumber(ARGV[2]), ARGV[3]
-- A run that died finishes nothing here: its id is due all the same after the first time, and its mark is gone
-- after the second.
local WOKEN_ANYWAY_MS, WOKEN_MS = 5000, 60000
local now, key = now_ms(), Q .. ARGV[1]
-- No lease ends later than this; an id that does is one whose row is due earlier than it says.
local latest = tonumber(known_ones) and now + tonumber(known_ones)

local function is_replaced(score)
    return known_ones == 'replace' or known_ones == 'wake' or latest and tonumber(score) > latest
end

-- A run holds it that is not finished here yet: finish.lua makes it due. Were it due now, that finish would undo
-- the lease of the next run.
local function has_still_to_end(id)
    local till = known_ones == 'wake' and redis.call('ZSCORE', RUNNING .. cap_of(tenant_of(queue)), id)
    return till and tonumber(till) > now and tonumber(till) < now + BEYOND_ANY_LEASE
end

-- What is due has room of its own: ids that wait for later, or are leased, do not starve it.
local room_later = window - redis.call('ZCARD', key)
local room_now = window - redis.call('ZCOUNT', key, '-inf', now)
local taken, soonest = 0, nil
for i = 4, #ARGV, 2 do
    local id, due = ARGV[i], now + tonumber(ARGV[i + 1])
    local known = redis.call('ZSCORE', key, id)
    local later = due > now
    if known and has_still_to_end(id) then
        redis.call('ZADD', WOKEN, now + WOKEN_MS, id)
        redis.call('ZREMRANGEBYSCORE', WOKEN, '-inf', now)
        redis.call('ZADD', key, 'LT', now + WOKEN_ANYWAY_MS, id)
        redis.call('ZADD', WAITING, 'LT', now + WOKEN_ANYWAY_MS, queue)
    elseif known or (later and room_later or room_now) > 0 then
        if not known then
            if later then room_later = room_later - 1 else room_now = room_now - 1 end
        end
        if not known or is_replaced(known) then redis.call('ZADD', key, due, id) end
        taken = taken + 1
        if not soonest or due < soonest then soonest = due end
    end
end
if room_now <= 0 then
    redis.call('SADD', DEEP, queue)
end
if soonest and soonest <= now then
    activate(queue)
    ring(BELL .. lane_of(queue))
elseif soonest then
    redis.call('ZADD', WAITING, 'LT', soonest, queue)
end
return taken
