-- Count what calls came to, and say how the breaker stands for everybody.
-- KEYS[1]: the breaker's hash: state, reopen_at, probe, probe_until, `hand` where an operator opened it,
--          `ok:<ms>` and `bad:<ms>` of the slices of its window, by the millisecond each begins
-- KEYS[2]: the hash of the provider's retries (retries.lua)
-- ARGV: window in ms, healthy replies, failures, answers that are a success, window of retries in ms;
--       without any of the counts it only looks
-- Returns {state, ms until a probe may go, healthy replies, failures in the window, 1 if an operator opened it,
--          1 if a probe is out}
local now, window = now_ms(), tonumber(ARGV[1])
local present = string.format('%.0f', slice_of(now, window))
local answered, failed, succeeded = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if succeeded > 0 then
    local of_retries = tonumber(ARGV[5])
    redis.call('HINCRBY', KEYS[2], 'ok:' .. string.format('%.0f', slice_of(now, of_retries)), succeeded)
    redis.call('PEXPIRE', KEYS[2], 2 * of_retries)
end
if answered > 0 then redis.call('HINCRBY', KEYS[1], 'ok:' .. present, answered) end
if failed > 0 then redis.call('HINCRBY', KEYS[1], 'bad:' .. present, failed) end
local total, fields = {ok = 0, bad = 0}, redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
    local kind, begun = string.match(fields[i], '^(%a+):(%d+)$')
    if total[kind] and tonumber(begun) > now - window then
        total[kind] = total[kind] + read(whole_of, fields[i + 1])
    elseif kind and answered + failed > 0 then
        -- Who only looks may look at another window, and takes nothing away.
        redis.call('HDEL', KEYS[1], fields[i])
    end
end
if answered + failed > 0 then redis.call('PEXPIRE', KEYS[1], 86400000) end
local state, probe_until = unpack(redis.call('HMGET', KEYS[1], 'state', 'probe_until'))
local wait, by_hand = wait_for_probe(KEYS[1], now)
local probing = probe_until and read(whole_of, probe_until) > now
return {state or 'closed', wait, total.ok, total.bad, by_hand and 1 or 0, probing and 1 or 0}
