-- Learn from what calls came to: settle what they reserved, give back their permits, take note of what
-- the provider said of its limits, and slow down the whole fleet when it refused some.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: for each limiter 22 values:
--       name, lease of a permit in ms, calls answered, their tokens, those that they had reserved, their
--       input tokens, the most these were said to be, their output tokens, then for requests and for
--       tokens each the limit, what is left and the ms until it is whole (-1: not said), the ms since the
--       provider said so; calls refused for requests, for tokens, the ms to wait (-1: not said), the ms
--       since the first of these was sent; jobs that were claimed and came to no call; permits given back,
--       and those that are kept; then so many ids
-- Returns the standing of each limiter.
local MOMENT = 2000 -- ms in which little can be learnt: what happens in it is of one piece
local now = now_ms()

local function settle(l, tokens, reserved)
    local speed = rate(l, 'tokens', now)
    if speed < UNLIMITED and l['tokens.next'] then
        put(l, 'tokens.next', opens_at(l, 'tokens', now) + (tokens - reserved) / speed)
    end
end

local function blend(l, field, value, count, before)
    local weight = 1 - math.exp(-count / 20)
    put(l, field, (l[field] or before) * (1 - weight) + value * weight)
end

local function average(l, count, tokens, reserved, input, bound, output)
    count_in(l, 'requests.seen', count, now)
    count_in(l, 'tokens.seen', tokens, now)
    if count > 0 and tokens > 0 then
        blend(l, 'mean', tokens / count, count, reserved / count)
        blend(l, 'output', output / count, count, 2 * output / count)
        if bound > 0 then blend(l, 'ratio', input / bound, count, RATIO) end
    end
end

-- What is left, spread over the time until it is whole again, is as much as may be used of it: with a
-- bucket that somebody else drains as well it settles at what he leaves, and in a window it lasts to its end.
local function listen(l, kind, limit, left, whole_in, age)
    if limit <= 0 or now - age < (l[kind .. '.said_at'] or 0) then return end
    put(l, kind .. '.said_at', now - age)
    put(l, kind .. '.told', limit)
    if left < 0 or whole_in < 0 then return end
    local pace = left * 60000 / math.max(whole_in, 1)
    put(l, kind .. '.paced_till', pace < 0.9 * limit and whole_in > MOMENT and now - age + whole_in or 0)
    put(l, kind .. '.pace', math.min(pace, 1e15))
end

-- A rate that was refused is cut, deeper where it happens again at once, and less where it had grown by then.
-- Calls that were on their way by then say nothing new, nor do those of a time in which the provider says itself
-- how little is left. Where nothing was known, what is cut is the rate at which calls were let go.
local function cut(l, kind, wait, age)
    local resumed = l.cool or 0
    put(l, 'cool', math.max(l.cool or 0, now + (wait >= 0 and wait or 1000)))
    if now - age <= (l[kind .. '.cut_at'] or 0) or (l[kind .. '.paced_till'] or 0) > now then return end
    local depth, since = l[kind .. '.depth'] or FIRST_CUT, now - math.max(l[kind .. '.cut_at'] or 0, resumed)
    local speed = rate(l, kind, now) * 60000
    local top = speed
    if speed == UNLIMITED then
        local counted = math.max(100, now - (l[kind .. '.let_since'] or 0))
        top, depth = math.max(1, fading(l, kind .. '.let', now) / (1 - math.exp(-counted / SEEN))), DEEPEST_CUT
    elseif since < MOMENT then
        depth = math.min(DEEPEST_CUT, 1.6 * depth)
    elseif since < RECOVERY / 2 then
        depth = math.max(FIRST_CUT, 0.6 * depth)
    else
        depth = FIRST_CUT
    end
    put(l, kind .. '.depth', depth)
    put(l, kind .. '.cut', top)
    put(l, kind .. '.cut_at', now)
end

-- Queues that wait for room look for it now: somebody has made some.
local function look_again()
    for _, queue in ipairs(redis.call('ZRANGEBYSCORE', WAITING, now, now + AHEAD, 'LIMIT', 0, 100)) do
        if redis.call('SISMEMBER', PARKED, queue) == 1 then
            redis.call('ZADD', WAITING, now, queue)
            ring(BELL .. lane_of(queue))
        end
    end
end

local reply, i, made_room = {}, 1, false
while i <= #ARGV do
    local function number(place) return tonumber(ARGV[i + place]) end
    local l = limiter(ARGV[i], now)
    settle(l, number(3), number(4))
    average(l, number(2), number(3), number(4), number(5), number(6), number(7))
    listen(l, 'requests', number(8), number(9), number(10), number(14))
    listen(l, 'tokens', number(11), number(12), number(13), number(14))
    for place, kind in ipairs(KINDS) do
        if number(14 + place) > 0 then cut(l, kind, number(17), number(18)) end
    end
    if number(19) > 0 and l.claimed then
        claim_more(l, -number(19), now)
        made_room = true
    end
    local given_back, kept = number(20), number(21)
    for id = 1, given_back + kept do
        if id <= given_back then
            redis.call('ZREM', PERMITS .. l.name, ARGV[i + 21 + id])
        elseif l.caps.concurrent then
            redis.call('ZADD', PERMITS .. l.name, now + number(1), ARGV[i + 21 + id])
        end
    end
    reply[#reply + 1] = standing(l, now)
    i = i + 22 + given_back + kept
end
store_limiters()
if made_room then look_again() end
return reply
