-- Gives up whatever a token has: the lock, or a place in the queue. A queue that is no list is somebody else's and is left alone.
-- ARGV: the token, or the value of the lock as its holder set it; clean (1 or 0); which lock (0: its own, 1: anybody's, 2: its own if
-- nobody has come for it). Answers 1 if there was a lock to give up.
local token = string.sub(ARGV[1], 1, 32)
local owner = redis.call('GET', LOCK)
if type(redis.pcall('LLEN', QUEUE)) == 'table' then
  if is_of(owner, token) then redis.call('DEL', LOCK) end
  return redis.error_reply('WRONGTYPE the queue of a session is not a list')
end
-- A message can come after its waiter has looked by himself and has the lock: then there is nothing to pass on.
local unclaimed = owner and string.find(owner, '|[cg]$')
if is_of(owner, token) and (ARGV[3] ~= '2' or unclaimed) or owner and ARGV[3] == '1' then
  hand_on(ARGV[2] == '1')
  return 1
end
leave(token)
return 0
