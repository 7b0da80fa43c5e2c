-- What nearly every save is: its own lock, nobody waits, the record as it was read. Everything else goes on below. Numbers are written
-- as strings here: turning one into the other is a tenth of the whole.
local call = redis.call
if ARGV[5] == 'wewc' and call('GET', KEYS[2]) == ARGV[1] and call('GETRANGE', KEYS[1], '0', '19') == ARGV[2] then
  call('SET', KEYS[1], ARGV[4], 'PX', ARGV[3])
  call('DEL', KEYS[2])
  return 1
end
