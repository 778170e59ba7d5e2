-- Open the breaker by an operator's hand: no probe goes, and none that is out closes it.
-- KEYS[1]: the breaker's hash (breaker_record.lua)
-- ARGV: duration in ms (0: until an operator closes it, which is a hundred years here)
local duration = tonumber(ARGV[1])
local reopen = now_ms() + (duration > 0 and duration or 3155760000000)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'state', 'open', 'reopen_at', string.format('%.0f', reopen), 'hand', '1')
return 1
