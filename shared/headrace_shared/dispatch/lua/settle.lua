-- Turn holds into what their calls cost, in the windows in which they were taken. A hold
-- that is not known was settled before, or never counted: nothing happens.
-- KEYS: none are declared; one server holds them all (prelude.lua names them)
-- ARGV: epoch, then hold id, cost, suspense, ...
-- Returns 'STALE' when the counters are of another epoch (they were rebuilt from the ledger).
if not is_in_place(ARGV[1]) then return 'STALE' end
for i = 2, #ARGV, 3 do
    local hold = redis.call('HGET', HOLDS, ARGV[i])
    if hold then
        local amount = nil
        for part in string.gmatch(hold, '[^\n]+') do
            if not amount then
                amount = part
            else
                -- Less than nothing is held only where somebody else wrote: nothing here is believed then.
                if redis.call('HINCRBY', SPENT, part .. '|held', amount == '0' and '0' or '-' .. amount) < 0 then damaged() end
                redis.call('HINCRBY', SPENT, part .. '|settled', ARGV[i + 1])
                redis.call('HINCRBY', SPENT, part .. '|suspense', ARGV[i + 2])
            end
        end
        redis.call('HDEL', HOLDS, ARGV[i])
    end
    redis.call('ZREM', HOLD_LEASES, ARGV[i])
end
return 'OK'
