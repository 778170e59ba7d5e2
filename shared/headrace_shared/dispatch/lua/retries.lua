-- Let retries go out while they are few beside the provider's successes.
-- KEYS[1]: the provider's hash: `ok:<ms>` successes (counted by breaker_record.lua), `again:<ms>` retries
--          and `no:<ms>` refusals of the slices of the window, by the millisecond each begins
-- ARGV: retries that are asked for, share of the successes, retries that are always allowed in a
--       window, window in ms
-- Returns {how many may go, ms after which it is the turn of the first of the others, ms between two turns}
local now, wanted, window = now_ms(), tonumber(ARGV[1]), tonumber(ARGV[4])
local total, fields = {ok = 0, again = 0, no = 0}, redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
    local kind, begun = string.match(fields[i], '^(%a+):(%d+)$')
    if total[kind] and tonumber(begun) > now - window and tonumber(begun) <= now then
        total[kind] = total[kind] + read(whole_of, fields[i + 1])
    else
        redis.call('HDEL', KEYS[1], fields[i])
    end
end
local allowed = math.max(tonumber(ARGV[3]), math.floor(tonumber(ARGV[2]) * total.ok))
local granted = math.max(0, math.min(wanted, allowed - total.again))
local slice = string.format('%.0f', slice_of(now, window))
if granted > 0 then redis.call('HINCRBY', KEYS[1], 'again:' .. slice, granted) end
if wanted > granted then redis.call('HINCRBY', KEYS[1], 'no:' .. slice, wanted - granted) end
redis.call('PEXPIRE', KEYS[1], 2 * window)
-- Those that are refused come back one after the other, at the pace that is allowed.
local pace = window / allowed
local wait = math.max(0, math.min((total.no + 1) * pace, 86400000))
return {granted, math.floor(wait), math.ceil(pace)}
