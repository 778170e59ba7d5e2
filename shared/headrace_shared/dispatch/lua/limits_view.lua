-- How limiters stand.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: names of limiters
-- Returns for each {name, ms until a call may go, requests and tokens a minute in force, the most under way
-- (-1: no limit each), the same three as the provider said, as configured, requests and tokens a minute
-- of late, calls under way, ms until a call may go by requests and by tokens alone, how many jobs may be
-- claimed (-1: any number), ms until claims ask again}
local now, reply = now_ms(), {}
for _, name in ipairs(ARGV) do
    local l = limiter(name, now)
    local view = standing(l, now)
    local most, again = room(l, now)
    for _, value in ipairs({l['requests.told'] or -1, l['tokens.told'] or -1, l.caps.requests or -1, l.caps.tokens or -1,
                            fading(l, 'requests.seen', now), fading(l, 'tokens.seen', now), l.under_way or 0,
                            math.max(0, opens_at(l, 'requests', now) - now),
                            math.max(0, opens_at(l, 'tokens', now) - now),
                            most == UNLIMITED and -1 or most, again}) do
        view[#view + 1] = math.floor(value + 0.5)
    end
    reply[#reply + 1] = view
end
return reply
