-- Has many changes judged, one after the other: the short way for what nearly every save is, as in `save_fast.lua`, and what `one`
-- says for the others. What goes wrong with one is the answer to that one alone.
-- KEYS: for each the record, the lock and the queue. ARGV: for each what `save.lua` says. Answers for each what that answers.
local call, KEYS, ARGV, answers = redis.call, KEYS, ARGV, {}
local function judge(key, arg)
  local value, found, how = ARGV[arg], ARGV[arg + 1], ARGV[arg + 4]
  if how == 'wewc' and call('GET', KEYS[key + 1]) == value and call('GETRANGE', KEYS[key], '0', '19') == found then
    call('SET', KEYS[key], ARGV[arg + 3], 'PX', ARGV[arg + 2])
    call('DEL', KEYS[key + 1])
    return 1
  end
  return one({KEYS[key], KEYS[key + 1], KEYS[key + 2]}, {value, found, ARGV[arg + 2], ARGV[arg + 3], how})
end
for at = 1, #KEYS / 3 do
  local fine, answer = pcall(judge, 3 * at - 2, 5 * at - 4)
  if not fine then answer = redis.error_reply(type(answer) == 'table' and answer.err or tostring(answer)) end
  answers[at] = answer
end
return answers
