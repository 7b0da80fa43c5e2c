-- The record, its lock and its queue stand under one hash tag, in that order.
local RECORD, LOCK, QUEUE = KEYS[1], KEYS[2], KEYS[3]

-- What stands before a payload: four bytes that say what it is, then the id of the last write.
local LIVE, BURIED, HEADER = 'skr1', 'skt1', 20

-- How long a waiter who was given the lock has to come for it (or for his lease, if that is shorter: dead, he costs no more than a
-- dead holder), how long a destroyed record is remembered at least, and how long a place outlasts its waiter, for the next one of
-- his process, in ms.
local CLAIM, REMEMBER, HEIR = 1000, 60000, 20

-- The value of a lock is `token|lease|since|channel`. While it is a grant that its waiter has not come for, a mark stands behind:
-- `|c` if the holder before let go, `|g` if not. Once it is held, `|w` says that somebody waits. A place in the queue is the same without a mark, and then `|deadline`.
local function is_of(value, token)
  return value and token ~= '' and string.sub(value, 1, 32) == token
end

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Wakes a waiter, and says whether he may have heard it. A user who may not do this must not find out halfway.
local function tell(channel, token)
  local heard = redis.pcall('PUBLISH', channel, token .. '|' .. RECORD)
  return type(heard) == 'number' and (heard > 0 or not SKIP_DEAF)
end

-- Gives the lock, as a grant with this mark, to the first in the queue who listens and whose time has not run out, and returns its
-- value: nothing if there is nobody, true if the turn is that of one of these tokens, whose business it then is.
local function grant(mark, token, heir)
  local place = redis.call('LPOP', QUEUE)
  local at = place and now()
  while place do
    if is_of(place, token) or is_of(place, heir) then return true end
    local value, name, lease, channel, deadline = string.match(place, '^((%x+)|(%d+)|%d+|(.*))|(%d+)$')
    if value and tonumber(deadline) > at and tell(channel, name) then
      redis.call('SET', LOCK, value .. mark, 'PX', math.min(CLAIM, lease))
      return value .. mark
    end
    place = redis.call('LPOP', QUEUE)
  end
end

-- Ends a hold. Without anybody who waits there is no lock.
local function hand_on(clean)
  if not grant(clean and '|c' or '|g', '', '') then redis.call('DEL', LOCK) end
end

-- Takes the place of a token out of the queue.
local function leave(token)
  if token == '' then return end
  for _, place in ipairs(redis.call('LRANGE', QUEUE, 0, -1)) do
    if is_of(place, token) then redis.call('LREM', QUEUE, 1, place) end
  end
end
