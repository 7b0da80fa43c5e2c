-- Judges a write or a touch, applies it, and gives the lock back unless it is to be kept.
-- A fourth key is where the new body is already, with its deadline; the argument is then only its header.
-- ARGV: the value of the lock as its holder set it, the header of what was found, ttl, body, how.
-- how: the basis (w: a write was found, a: nothing was found, u: nothing was looked at), the access (e, o), the change (w, t), and
-- what comes next (k: keep, c: close, r: close after what may be a repeat of the write that was found).
-- Answers: 1 applied, 3 applied while others wait, 2 applied before, 0 refused, -1 gone, -2 not a record of ours.
local value, body, how = ARGV[1], ARGV[4], ARGV[5]
local token, prev, id = string.sub(value, 1, 32), string.sub(ARGV[2], 5), string.sub(body, 5, HEADER)
local owner = redis.call('GET', LOCK)
local head = redis.call('GETRANGE', RECORD, '0', HEADER - 1)
local waiting = redis.call('LLEN', QUEUE)
local own = is_of(owner, token)
local basis, exclusive, writes, keeps =
  string.sub(how, 1, 1), string.sub(how, 2, 2) == 'e', string.sub(how, 3, 3) == 'w', string.sub(how, 4, 4) == 'k'
local kind, last = string.sub(head, 1, 4), string.sub(head, 5)
local live, buried = kind == LIVE, kind == BURIED

local function judge()
  if head ~= '' and not live and not buried then return -2 end
  if writes and live and last == id then return 2 end
  if basis == 'w' then
    if not live then return -1 end
    if last ~= prev or owner and not own then return 0 end
  elseif basis == 'a' and exclusive then
    if live then return 0 end
    -- Something was created and has ended since, so the id is not as absent as it was found.
    if buried and last ~= prev then return -1 end
    if not own then return 0 end
  else
    if not writes or buried and last == id then return -1 end
    if live or buried or owner and not own then return 0 end
    return 1
  end
  if STRICT and exclusive and not own then return 0 end
  return 1
end

local outcome = judge()
if outcome == 1 then
  if writes then
    if KEYS[4] then redis.call('RENAME', KEYS[4], RECORD) else redis.call('SET', RECORD, body, 'PX', ARGV[3]) end
  else
    redis.call('PEXPIRE', RECORD, ARGV[3])
  end
end
if keeps and outcome > 0 then
  if basis == 'u' and exclusive and not owner then
    redis.call('SET', LOCK, waiting > 0 and value .. '|w' or value, 'PX', string.match(value, '^%x+|(%d+)|'))
  end
elseif own and outcome ~= 0 or not owner and waiting > 0 then
  -- Whoever is refused under his own lock may be a late copy of an earlier write, and the holder is still at work.
  if waiting > 0 then hand_on(own) else redis.call('DEL', LOCK) end
end
if outcome == 1 and waiting > 0 and not keeps then return 3 end
return outcome
