-- Takes locks that are free, as the plain commands of a lone open do, for many sessions at once. Nobody is let in past a queue: whoever
-- took a lock while others wait for it is told, and asks again by `enter.lua`.
-- KEYS: for each the record, the lock and the queue. ARGV: for each the value of the lock, and the lease. Answers for each: 1 if the
-- lock was taken, and 2 more if there is a queue; and what is left of the record's life. Or twice an error, which is of this one alone.
local call, KEYS, ARGV, answers = redis.pcall, KEYS, ARGV, {}
for at = 1, #KEYS / 3 do
  local key, arg = 3 * at, 2 * at
  local taken = call('SET', KEYS[key - 1], ARGV[arg - 1], 'NX', 'PX', ARGV[arg])
  local waiting = call('EXISTS', KEYS[key])
  local left = call('PTTL', KEYS[key - 2])
  local wrong = taken and taken.err and taken or type(waiting) == 'table' and waiting or type(left) == 'table' and left
  answers[arg - 1] = wrong or (taken and 1 or 0) + 2 * waiting
  answers[arg] = wrong or left
end
return answers
