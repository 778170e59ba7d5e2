-- Count what calls came to, and say how the breaker stands for everybody.
-- KEYS[1]: the breaker's hash: state, reopen_at, probe, probe_until, `ok:<n>` and `bad:<n>` of the
--          last ten slices of its window
-- ARGV: window in ms, successes, failures
-- Returns {state, ms until a probe may go, successes, failures in the window}
local now, slice = now_ms(), tonumber(ARGV[1]) / 10
local present = math.floor(now / slice)
if tonumber(ARGV[2]) > 0 then redis.call('HINCRBY', KEYS[1], 'ok:' .. present, ARGV[2]) end
if tonumber(ARGV[3]) > 0 then redis.call('HINCRBY', KEYS[1], 'bad:' .. present, ARGV[3]) end
local total, fields = {ok = 0, bad = 0}, redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
    local kind, number = string.match(fields[i], '^(%a+):(%d+)$')
    if kind and tonumber(number) > present - 10 then
        total[kind] = total[kind] + tonumber(fields[i + 1])
    elseif kind then
        redis.call('HDEL', KEYS[1], fields[i])
    end
end
redis.call('PEXPIRE', KEYS[1], 86400000)
local reopen = tonumber(redis.call('HGET', KEYS[1], 'reopen_at') or '0')
return {redis.call('HGET', KEYS[1], 'state') or 'closed', math.max(0, reopen - now), total.ok, total.bad}
