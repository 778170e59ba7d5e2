-- Put a budget in place of a scope that nobody has spent from, beside the counters that are there.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: epoch, run id of the server, format of the counters, scope, limit, policy
-- Returns 'STALE' when the counters are of another epoch, server or format, or have the budget already.
local scope, window = ARGV[4], redis.call('HGET', MONEY, 'window|total')
local limit, name = 'limit|' .. scope .. '|total', scope .. '|' .. (window or '')
if not is_in_place(ARGV[1]) or redis.call('HGET', MONEY, 'run_id') ~= ARGV[2]
   or redis.call('HGET', MONEY, 'format') ~= ARGV[3] or not window
   or redis.call('HEXISTS', MONEY, limit) == 1 then
    return 'STALE'
end
redis.call('HSET', SPENT, name .. '|settled', '0', name .. '|suspense', '0')
redis.call('HSET', MONEY, limit, ARGV[5], 'policy|' .. scope .. '|total', ARGV[6])
return 'OK'
