-- The gates that are closed now. What is no time of ours is passed over: a claim repairs it.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: none
-- Returns {{gate, ms until it opens by itself (-1: never)}, ...}; a breaker's whose time has come is
-- closed for all but a probe, and says 0.
local now, closed = now_ms(), {}
local fields = redis.call('HGETALL', GATES)
for i = 1, #fields, 2 do
    local till = whole_of(fields[i + 1])
    if till == 0 then
        closed[#closed + 1] = {fields[i], -1}
    elseif till and (till > now or string.match(fields[i], '|breaker$')) then
        closed[#closed + 1] = {fields[i], math.max(0, till - now)}
    end
end
return closed
