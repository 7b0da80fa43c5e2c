-- Takes the lock or a place in the queue, and reads. Run again by a waiter who was woken or slept long enough.
-- ARGV: token, value, lease, wait, want (`existing`, `any` or `lock`), queued before (1 or 0), the token of a place to take over.
local token, value, lease, wait, want, queued, heir = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6] == '1', ARGV[7]
local owner = redis.call('GET', LOCK)
local waiting = redis.call('LLEN', QUEUE)
local body = want ~= 'lock' and redis.call('GET', RECORD)
local own = is_of(owner, token)
local inherited = is_of(owner, heir)

if want == 'existing' and not (body and string.sub(body, 1, 4) == LIVE) then
  leave(token)
  leave(heir)
  if own or inherited then hand_on(true) end
  return {2}
end

-- Something that is nobody's lock is left alone, and told of.
if owner and not string.find(owner, '^%x+|%d+|') then return {0, owner, 0, 0} end

local granted = inherited or own and (queued or waiting == 0)
local clean = granted and string.sub(owner, -2) == '|c'
if not granted and (own or not owner) then
  -- The lock is free. Whoever finds it so while others wait lets the first of them in.
  local given = waiting > 0 and grant('|g', token, heir)
  if type(given) == 'string' then owner = given else granted = true end
end

if granted then
  leave(token)
  leave(heir)
  redis.call('SET', LOCK, redis.call('LLEN', QUEUE) > 0 and value .. '|w' or value, 'PX', lease)
  local left = -2
  if body then
    left = redis.call('PTTL', RECORD)
    if string.sub(body, 1, 4) == LIVE and left < 2 * lease then
      left = 2 * lease
      redis.call('PEXPIRE', RECORD, left)
    end
  end
  return {1, body, left, clean and 1 or 0}
end

if wait <= 0 then
  -- Whoever has stood in the queue leaves his place to the next one of his process, who has to come soon.
  if not queued then leave(token) end
  leave(heir)
  return {0, owner, 0, 0}
end
if owner and not string.find(owner, '|[cgw]$') then redis.call('SET', LOCK, owner .. '|w', 'KEEPTTL') end
local entry = value .. '|' .. (now() + wait + HEIR)
local at = 0
for index, place in ipairs(redis.call('LRANGE', QUEUE, 0, -1)) do
  if is_of(place, token) or is_of(place, heir) then
    at = index
    redis.call('LSET', QUEUE, index - 1, entry)
    break
  end
end
if at == 0 then at = redis.call('RPUSH', QUEUE, entry) end
if redis.call('PTTL', QUEUE) < wait + REMEMBER then redis.call('PEXPIRE', QUEUE, wait + REMEMBER) end
return {0, owner, redis.call('PTTL', LOCK), at}
