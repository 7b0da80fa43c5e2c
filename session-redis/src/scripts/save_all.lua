-- Has changes judged, one after the other: the short way for what nearly every save is (its own lock, nobody waits, the record as it
-- was read), and what `one` says for the others. What goes wrong with one is the answer to that one alone.
-- KEYS: for each the record, the lock, the queue and the place of the new body; the record again if the body comes as an argument.
-- ARGV: for each what `save.lua` says; of a body that has a place, the header. Answers for each what that answers.
local call, KEYS, ARGV, answers = redis.call, KEYS, ARGV, {}
local function judge(key, arg)
  local record, lock, place = KEYS[key], KEYS[key + 1], KEYS[key + 3]
  local value, found, how, placed = ARGV[arg], ARGV[arg + 1], ARGV[arg + 4], place ~= record
  if placed and how == 'wewc' and call('GET', lock) == value and call('GETRANGE', record, '0', '19') == found then
    call('RENAME', place, record)
    call('DEL', lock)
    return 1
  end
  return one({record, lock, KEYS[key + 2], placed and place}, {value, found, ARGV[arg + 2], ARGV[arg + 3], how})
end
for at = 1, #KEYS / 4 do
  local fine, answer = pcall(judge, 4 * at - 3, 5 * at - 4)
  -- A body that is not in force is not left behind.
  if answer ~= 1 and answer ~= 3 and KEYS[4 * at] ~= KEYS[4 * at - 3] then redis.pcall('DEL', KEYS[4 * at]) end
  if not fine then answer = redis.error_reply(type(answer) == 'table' and answer.err or tostring(answer)) end
  answers[at] = answer
end
return answers
