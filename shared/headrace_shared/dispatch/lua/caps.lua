-- How many jobs run under caps, and how many may; changes nothing.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: names of caps
-- Returns for each {jobs that run, how many may (-1: any number)}
local now, reply = now_ms(), {}
for _, cap in ipairs(ARGV) do
    local most = redis.call('HGET', TENANTS, 'concurrent|' .. cap)
    -- As claim.lua counts them: a lease that is over, or longer than any, is nobody's.
    local running = redis.call('ZCOUNT', RUNNING .. cap, '(' .. now, now + BEYOND_ANY_LEASE)
    reply[#reply + 1] = {running, most and count_of(most) or -1}
end
return reply
