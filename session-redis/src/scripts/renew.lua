-- Moves the end of a lease, and the deadline of the record that it protects if that comes soon.
-- ARGV: token, lease, whether there is a record (1 or 0). Answers 1 renewed, 0 lost, -1 the record is gone.
local lease = tonumber(ARGV[2])
local owner = redis.call('GET', LOCK)
local left = redis.call('PTTL', RECORD)
if ARGV[3] == '1' then
  if redis.call('GETRANGE', RECORD, 0, 3) ~= LIVE then return -1 end
end
if not is_of(owner, ARGV[1]) then return 0 end
redis.call('PEXPIRE', LOCK, lease)
if ARGV[3] == '1' and left < 2 * lease then redis.call('PEXPIRE', RECORD, 2 * lease) end
return 1
