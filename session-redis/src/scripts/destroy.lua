-- Buries the record, whoever holds the lock, and answers with what was there and what was left of its life.
-- ARGV: token, mark, lease, close (1 or 0), leave a trace in any case (1 or 0).
local owner = redis.call('GET', LOCK)
local body = redis.call('GET', RECORD)
local waiting = redis.call('LLEN', QUEUE)
local left = body and redis.call('PTTL', RECORD) or -2
local kind = body and string.sub(body, 1, 4)
if body and kind ~= LIVE and kind ~= BURIED then return {-2} end
if body or owner or ARGV[5] == '1' then
  local lease = math.max(tonumber(ARGV[3]), owner and tonumber(string.match(owner, '^%x+|(%d+)|') or 0) or 0)
  redis.call('SET', RECORD, BURIED .. ARGV[2], 'PX', math.max(REMEMBER, 2 * lease))
end
if ARGV[4] == '1' and is_of(owner, ARGV[1]) then
  hand_on(true)
elseif waiting > 0 then
  -- Whoever waits for a session that is gone need not wait for its holder.
  for _, place in ipairs(redis.call('LRANGE', QUEUE, 0, -1)) do
    local name, channel = string.match(place, '^(%x+)|%d+|%d+|(.*)|%d+$')
    if name then tell(channel, name) end
  end
end
if kind == LIVE then return {1, body, left} end
return {0}
