-- What nearly every close without a change is: its own lock, and nobody waits. Everything else goes on below.
local call = redis.call
if call('GET', KEYS[2]) == ARGV[1] then
  call('DEL', KEYS[2])
  return 1
end
