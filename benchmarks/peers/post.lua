-- What wrk sends and prints. Arguments: a Content-Type, then files with whole bodies, which are sent in turn.

local requests = {}
local turn = 0

function init(args)
  for i = 2, #args do
    local file = assert(io.open(args[i], "rb"))
    requests[i - 1] = wrk.format("POST", nil, { ["Content-Type"] = args[1] }, file:read("*a"))
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\n{"seconds": %f, "answers": %d, "refused": %d, "broken": %d, "p50_ms": %f, "p99_ms": %f}\n',
    summary.duration / 1e6, summary.requests, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
