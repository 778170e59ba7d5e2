-- Close a gate for a time, or until somebody opens it.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: gate, duration in ms (0: until it is opened), epoch under which a budget had no room ('': none had):
--       under another one the limit may be another, and nobody would open what is closed now
-- Returns the millisecond at which it opens (0: when it is opened; -1: it was not closed, the epoch is another).
if ARGV[3] ~= '' and redis.call('HGET', MONEY, 'epoch') ~= ARGV[3] then return -1 end
local duration = tonumber(ARGV[2])
local till = duration == 0 and 0 or now_ms() + duration
shut(ARGV[1], till)
return till
