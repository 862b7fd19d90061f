-- What a script sees, and what it cannot get round. Called once per state with `ask`, the only way out (scripting.py: Runtime.ask), a number
-- at random, and the chunks of the other files; returns compile(sha, source) and run(sha, keys, arguments, protocol, again).
--
-- Rules
-- - nothing of Python, no `debug`, no bytecode is reachable: `ask` takes strings and returns a string, and is an upvalue
-- - what a script changes is gone when it ends: it gets tables of its own, through which it sees the libraries
-- - the hook ends a script whose time is over; whatever catches errors throws that one again (after())
-- - no function that a script can call works long, or recurses, in C. Those of Lua 5.1 that do are replaced: the patterns, rep, unpack, and
--   those of `table`, since the length of a table can be a billion with thirty entries in it. What is left is linear in what it is given, and
--   a state has MOST_MEMORY (scripting.py). So is a single instruction (a < b of long strings, a string as a number, a table that is rebuilt):
--   some 2 ms for each MB of the state. The larger the state, the more often the hook is called (set_pace) and looks at the clock (weight)
-- - the hook may fail: where C's stack is at its end, 200 calls deep, it cannot be called. That is an error like others, so whatever catches
--   errors looks at the clock itself (after())
-- - what outlives a run is not reachable: what getmetatable() shows of the libraries and of strings is no table, and cannot be changed;
--   the numbers of math.random are a run's own
-- - Lua 5.1's known holes are closed: functions with many parameters and `...` are refused (check), chunks have fixed names, unpack counts

local ask, seed, load_resp, load_patterns, load_cjson, load_bit = ...

local byte, find, format, gsub, len, lower, rep, sub =
    string.byte, string.find, string.format, string.gsub, string.len, string.lower, string.rep, string.sub
local clock, gcinfo, getinfo, sethook = os.clock, gcinfo, debug.getinfo, debug.sethook     -- gcinfo(): KB of the state
local ceil, floor, max, min = math.ceil, math.floor, math.max, math.min
local concat, dump, insert, remove, sort = table.concat, string.dump, table.insert, table.remove, table.sort
local error, getmetatable, load, next, pcall, rawget, rawset, select, setfenv, setmetatable, tostring, type, unpack, xpcall =
    error, getmetatable, load, next, pcall, rawget, rawset, select, setfenv, setmetatable, tostring, type, unpack, xpcall
local metatable_of = debug.getmetatable     -- whatever it says of itself
local create, resume, running, status, yield = coroutine.create, coroutine.resume, coroutine.running, coroutine.status, coroutine.yield

local SOURCE = "@user_script"
local STEPS = 20            -- instructions between two calls of the hook; fewer, if the state has more than
local HEAVY = 6144          -- KB. It looks at the clock when the sizes that it has seen since, in KB, are more than this together
local LOOK = 0.002          -- seconds of work between two questions whether time is over
local PIECE = 65536         -- bytes that are looked at, in C, between two calls of the hook
local CODE = 4096           -- of a script that is compiled
local MOVES = 4096          -- elements of a table that are joined in C
local MOST_MOVED = 65536    -- elements that are moved in C, times KB of the state: each may have the table rebuilt
local MOST_CALL = 67108864  -- bytes of a command
local MOST_RESULTS = 7990   -- of unpack: the stack of a C function has 8,000
local MOST_LEVELS = 5000    -- of the stack that are looked at: each look begins at its top
local MOST_REP = 16777216   -- bytes
local MOST_LOADED = 65536   -- bytes of code that a script may compile at a time
local READONLY = "Attempt to modify a readonly table"

local doom                  -- why the script ends, once it is known
local looked, weight, pace = 0, 0, STEPS
local tail                  -- the line of the script's `return redis.call(...)`: a call in that place leaves no frame

local redis = {
    LOG_DEBUG = 0, LOG_VERBOSE = 1, LOG_NOTICE = 2, LOG_WARNING = 3, REPL_NONE = 0, REPL_AOF = 1, REPL_SLAVE = 2, REPL_REPLICA = 2,
    REPL_ALL = 3, REDIS_VERSION = "7.0.15", REDIS_VERSION_NUM = 0x0007000f,
}

-- ---- errors ---------------------------------------------------------------------------------------------------------------------------

local function line_now()
    local above
    for level = 2, MOST_LEVELS do
        local frame = getinfo(level, "Slf")
        if not frame then return tail end
        if frame.source == SOURCE then return frame.currentline end
        if frame.what == "tail" and above == redis.call and tail then return tail end
        above = frame.func
    end
end

local function fail(text)   -- as C functions do: with the script's line before it
    local line = line_now()
    error(line and "user_script:" .. line .. ": " .. text or text, 0)
end

local function typed(value)
    return value == nil and "nil" or type(value)
end

local function bad(n, name, text)
    fail("bad argument #" .. n .. " to '" .. name .. "' (" .. text .. ")")
end

local function string_of(value, n, name, more)     -- more: an argument follows
    if type(value) == "string" then return value end
    if type(value) == "number" then return tostring(value) end
    bad(n, name, "string expected, got " .. (value == nil and not more and "no value" or typed(value)))
end

local function number_of(value, n, name)
    local number = tonumber(value)
    if not number then bad(n, name, "number expected, got " .. (value == nil and "no value" or type(value))) end
    return number
end

local function die()        -- without the hook, which would be called where nothing catches its error
    sethook()
    error({err = doom}, 0)
end

local function asked(...)
    local reply = ask(...)
    if byte(reply) == 33 then       -- !
        doom = sub(reply, 2)
        die()
    end
    return reply
end

local function look()       -- ends the script if its time is over
    if doom then die() end
    local now = clock()
    if now - looked < LOOK and now >= looked then return end
    looked = now
    asked("over")
end

local hook

local function pace_of(size)        -- the hook's, in a state of so many KB
    return size > HEAVY and max(2, floor(STEPS * HEAVY / size)) or STEPS
end

local function set_pace(thread)     -- in this coroutine, which is about to go on; without: in the one that runs
    pace = pace_of(gcinfo())
    if thread then sethook(thread, hook, "", pace) else sethook(hook, "", pace) end
end

function hook()
    local size = gcinfo()
    weight = weight + size
    if weight < HEAVY and not doom then return end
    weight = 0
    if pace_of(size) ~= pace then set_pace() end
    look()
end

local function after(ok, ...)   -- back from where errors are caught
    if doom or not ok then look() end
    return ok, ...
end

local function text_of(ok, e, ...)      -- pcall of a script is told an error's text
    if not ok and type(e) == "table" and type(e.err) == "string" then return ok, e.err end
    return ok, e, ...
end

local function int_of(value, n, name)   -- as C takes it
    local number = number_of(value, n, name)
    if not (number > -2147483649 and number < 2147483648) then return -2147483648 end
    return number < 0 and ceil(number) or floor(number)
end

local function table_of(value, name)
    if type(value) ~= "table" then bad(1, name, "table expected, got " .. (value == nil and "no value" or type(value))) end
    return value
end

local function function_of(value, name)
    if type(value) ~= "function" then bad(2, name, "function expected, got " .. (value == nil and "no value" or type(value))) end
    return value
end

local function replaced(text, set, by)  -- gsub, of a set of bytes, in pieces
    if len(text) <= PIECE then return (gsub(text, set, by)) end
    local out = {}
    for at = 1, len(text), PIECE do out[#out + 1] = gsub(sub(text, at, at + PIECE - 1), set, by) end
    return concat(out)
end

local resp = load_resp(replaced)
local patterns = load_patterns(fail, string_of, number_of, bad)

-- ---- the libraries ----------------------------------------------------------------------------------------------------------------------

local strings = {
    byte = byte, char = string.char, dump = dump, find = patterns.find, format = format, gfind = patterns.gmatch, gmatch = patterns.gmatch,
    gsub = patterns.gsub, len = len, match = patterns.match, sub = sub,
}

for name, f in next, {lower = lower, reverse = string.reverse, upper = string.upper} do
    strings[name] = function(text)
        text = string_of(text, 1, name)
        if len(text) > PIECE then look() end
        return f(text)
    end
end

function strings.rep(text, n)
    text, n = string_of(text, 1, "rep"), number_of(n, 2, "rep")
    if text == "" or not (n >= 1) then return "" end
    if n * len(text) > MOST_REP then fail("resulting string too large") end
    return rep(text, n)
end

local tables = {getn = table.getn, maxn = table.maxn, setn = table.setn}

function tables.concat(t, between, from, to)
    table_of(t, "concat")
    between = between == nil and "" or string_of(between, 2, "concat")
    from = from == nil and 1 or int_of(from, 3, "concat")
    to = to == nil and #t or int_of(to, 4, "concat")
    local out = {}
    for at = from, to, MOVES do
        local good, text = pcall(concat, t, between, at, min(at + MOVES - 1, to))
        if not good then fail(text) end
        out[#out + 1] = text
    end
    return concat(out, between)
end

function tables.foreach(t, f)
    table_of(t, "foreach")
    function_of(f, "foreach")
    for key, value in next, t do
        local found = f(key, value)
        if found ~= nil then return found end
    end
end

function tables.foreachi(t, f)
    table_of(t, "foreachi")
    function_of(f, "foreachi")
    for i = 1, #t do
        local found = f(i, rawget(t, i))
        if found ~= nil then return found end
    end
end

function tables.insert(t, ...)
    local n = select("#", ...)
    if n == 1 and type(t) == "table" then return insert(t, (...)) end   -- at the end: nothing is moved
    local last = #table_of(t, "insert") + 1
    if n ~= 2 then fail("wrong number of arguments to 'insert'") end
    local at, value = ...
    at = min(int_of(at, 2, "insert"), 2147483647)
    if at > last then last = at end
    if (last - at) * gcinfo() <= MOST_MOVED then return insert(t, at, value) end
    for i = last, at + 1, -1 do rawset(t, i, rawget(t, i - 1)) end
    rawset(t, at, value)
end

function tables.remove(t, at)
    local last = #table_of(t, "remove")
    at = at == nil and last or int_of(at, 2, "remove")
    if at < 1 or at > last then return end
    if (last - at) * gcinfo() <= MOST_MOVED then return remove(t, at) end
    local value = rawget(t, at)
    for i = at, last - 1 do rawset(t, i, rawget(t, i + 1)) end
    rawset(t, last, nil)
    return value
end

function tables.sort(t, before)     -- with a comparison in Lua, in which the hook is called
    table_of(t, "sort")
    if before == nil then
        before = function(a, b) return a < b end
    elseif getinfo(function_of(before, "sort"), "S").what == "C" then
        local of_c = before
        before = function(a, b) return (of_c(a, b)) end
    end
    return sort(t, before)
end

-- The numbers of math.random, as Redis makes them: 48 bits, in two halves.

local high, low = 0, 0

local function seeded(n)
    n = n % 4294967296
    high, low = floor(n / 256), n % 256 * 65536 + 0x330E
end

local function drawn()      -- 31 bits
    local sum = low * 0xECE66D + 11
    high, low = (high * 0xECE66D + low * 0x5DE + floor(sum / 16777216)) % 16777216, sum % 16777216
    return high * 128 + floor(low / 131072)
end

local maths = {}
for name, f in next, math do maths[name] = f end

function maths.random(...)
    local n, from, to = select("#", ...), ...
    local part = drawn() % 2147483647 / 2147483647
    if n == 0 then return part end
    if n > 2 then fail("wrong number of arguments") end
    from = int_of(from, 1, "random")
    if n == 1 then from, to = 1, from else to = int_of(to, 2, "random") end
    if from > to then bad(n, "random", "interval is empty") end
    return floor(part * (to - from + 1)) + from
end

function maths.randomseed(n)
    seeded(int_of(n, 1, "randomseed"))
end

local coroutines = {running = running, status = status, yield = yield}

coroutines.create = create

local function resumed(thread, ...)
    look()                  -- each has a hook of its own, and may end before that is called
    set_pace(thread)
    return after(resume(thread, ...))
end

local function back(...)
    if pace < STEPS then set_pace() end     -- what it has made is here, too: the pace here is not slower than `pace` says
    return ...
end

function coroutines.resume(thread, ...)
    if type(thread) ~= "thread" then bad(1, "resume", "coroutine expected") end
    return back(resumed(thread, ...))
end

local function passed(ok, ...)
    if not ok then error((...), 0) end
    return ...
end

function coroutines.wrap(f)
    local thread = create(f)
    return function(...) return passed(back(resumed(thread, ...))) end
end

local function result(...)      -- of a command; and whether it is an error
    local n = select("#", ...)
    if n == 0 then return {err = "ERR Please specify at least one argument for this redis lib call"}, true end
    if n > MOST_RESULTS then return {err = "ERR too many arguments"}, true end
    local words, size = {...}, 0
    for i = 1, n do
        local kind = type(words[i])
        if kind == "number" then
            words[i] = format("%.17g", words[i])
        elseif kind ~= "string" then
            return {err = "ERR Lua redis lib command arguments must be strings or integers"}, true
        end
        size = size + len(words[i])
    end
    if size > MOST_CALL then return {err = "ERR too many bytes"}, true end     -- the same string many times: there they are copies
    local reply = asked("call", unpack(words, 1, n))
    return (resp.parse(reply, 1)), byte(reply) == 45    -- -
end

function redis.call(...)
    local value, failed = result(...)
    if failed then error(value, 0) end
    return value
end

function redis.pcall(...)
    return (result(...))
end

local function raise(text)
    error({err = "ERR " .. text}, 0)
end

function redis.error_reply(...)
    local text = ...
    if select("#", ...) ~= 1 or type(text) ~= "string" then return {err = "ERR wrong number or type of arguments"} end
    text = resp.trimmed((gsub(text, "^%-", "")))
    return {err = find(text, " ", 1, true) and text or "ERR " .. text}
end

function redis.status_reply(...)
    local text = ...
    if select("#", ...) ~= 1 or type(text) ~= "string" then return {err = "ERR wrong number or type of arguments"} end
    return {ok = text}
end

function redis.sha1hex(...)
    if select("#", ...) ~= 1 then raise("wrong number of arguments") end
    local text = ...
    return asked("sha1", (type(text) == "string" or type(text) == "number") and tostring(text) or "")
end

function redis.log(...)
    local n, level = select("#", ...), ...
    if n < 2 then raise("redis.log() requires two arguments or more.") end
    if type(level) ~= "number" then raise("First argument must be a number (log level).") end
    if level < redis.LOG_DEBUG or level > redis.LOG_WARNING then raise("Invalid debug level.") end
    local words = {}
    for i = 2, n do
        local word = select(i, ...)
        words[#words + 1] = (type(word) == "string" or type(word) == "number") and tostring(word) or ""
    end
    asked("log", format("%d", level), concat(words, " "))
end

function redis.setresp(...)
    if select("#", ...) ~= 1 then raise("redis.setresp() requires one argument.") end
    local protocol = tonumber((...))
    if protocol ~= 2 and protocol ~= 3 then raise("RESP version must be 2 or 3.") end
    resp.script = protocol
    asked("setresp", tostring(protocol))
end

function redis.replicate_commands()
    return true
end

function redis.set_repl(...)
    if select("#", ...) ~= 1 then raise("redis.set_repl() requires two arguments.") end
    local flags = tonumber((...)) or 0
    if flags < 0 or flags > 3 then raise("Invalid replication flags. Use REPL_AOF, REPL_REPLICA, REPL_ALL or REPL_NONE.") end
end

-- ---- what is global ----------------------------------------------------------------------------------------------------------------------

local function refuse()
    fail(READONLY)
end

local locked = newproxy(true)   -- what getmetatable() shows of what cannot be changed. No table: nothing gets into it, rawset() or not
metatable_of(locked).__index, metatable_of(locked).__newindex, metatable_of(locked).__metatable = function() end, refuse, false

local views = {}            -- name of a library: the metatable through which a script sees it
for name, library in next, {
    string = strings, table = tables, math = maths, coroutine = coroutines, redis = redis, bit = load_bit(number_of),
    cjson = load_cjson(fail, bad, string_of, replaced),
} do
    views[name] = {__index = library, __newindex = refuse, __metatable = locked}
end

local views_of = setmetatable({}, {__mode = "k"})
for _, view in next, views do views_of[view] = true end

local function writable(t)
    if type(t) == "table" and views_of[metatable_of(t)] then error(READONLY, 0) end
end

local globals = {
    _VERSION = _VERSION, assert = assert, error = error, getmetatable = getmetatable, ipairs = ipairs, next = next, pairs = pairs,
    rawequal = rawequal, rawget = rawget, select = select, tonumber = tonumber, tostring = tostring, type = type,
}

function globals.pcall(...)
    return text_of(after(pcall(...)))
end

local function handled(handler, ok, ...)
    if ok then return ok, ... end
    return false, (select(2, after(pcall(handler, ...))))
end

function globals.xpcall(f, handler)     -- handled when the error has been caught: where it was raised the hook may be off
    return handled(handler, after(pcall(f)))
end

function globals.unpack(t, from, to)
    if type(t) ~= "table" then bad(1, "unpack", "table expected, got " .. (t == nil and "no value" or type(t))) end
    from = from == nil and 1 or floor(number_of(from, 2, "unpack"))
    to = to == nil and #t or floor(number_of(to, 3, "unpack"))
    if from > to then return end
    if not (to - from < MOST_RESULTS) or from < -2147483648 or to > 2147483647 then fail("too many results to unpack") end
    return unpack(t, from, to)
end

function globals.rawset(t, key, value)
    writable(table_of(t, "rawset"))
    return rawset(t, key, value)
end

function globals.setmetatable(t, metatable)
    writable(table_of(t, "setmetatable"))
    return setmetatable(t, metatable)
end

local function compiled(source, name)       -- a function, or nil and why not
    if byte(source) == 27 then return nil, (gsub(name, "^[@=]", "")) .. ":1: unexpected symbol near 'char(27)'" end
    local at = 1
    local f, e = load(function()
        look()
        if at > len(source) then return nil end
        at = at + CODE
        return sub(source, at - CODE, at - 1)
    end, name)
    if doom then error({err = doom}, 0) end
    if f and asked("check", dump(f)) ~= "" then
        return nil, (gsub(name, "^[@=]", "")) .. ": a function with ... may have three more parameters here, not so many"
    end
    return f, e
end

local env                   -- the globals of the script that runs

function globals.loadstring(source)
    source = string_of(source, 1, "loadstring")
    if len(source) > MOST_LOADED then return nil, "too long" end
    local f, e = compiled(source, "=loadstring")
    return f and setfenv(f, env), e
end

function globals.load(piece)
    if type(piece) ~= "function" then bad(1, "load", "function expected, got " .. typed(piece)) end
    local pieces, size = {}, 0
    repeat
        local part = piece()
        if part ~= nil and type(part) ~= "string" then return nil, "reader function must return a string" end
        pieces[#pieces + 1] = part
        size = size + len(part or "")
    until part == nil or part == "" or size > MOST_LOADED
    return globals.loadstring(concat(pieces))
end

local function missing(_, name)
    fail("Script attempted to access nonexistent global variable '" .. tostring(name) .. "'")
end

local of_globals = {__index = missing}

local function globals_with(keys, arguments)
    local values = {KEYS = keys, ARGV = arguments}
    for name, value in next, globals do values[name] = value end
    for name, view in next, views do values[name] = setmetatable({}, view) end
    local view = {__index = setmetatable(values, of_globals), __newindex = refuse, __metatable = locked}
    views_of[view] = true
    values._G = setmetatable({}, view)
    return values._G
end

local of_strings = metatable_of("")
of_strings.__index, of_strings.__metatable = strings, locked
for _, name in next, {
    "collectgarbage", "debug", "dofile", "gcinfo", "getfenv", "io", "jit", "load", "loadfile", "loadstring", "module", "newproxy", "os",
    "package", "print", "python", "require", "setfenv",
} do
    _G[name] = nil
end

-- ---- running ----------------------------------------------------------------------------------------------------------------------------

local began                 -- the seed of the last run
local known = {}            -- sha: {its function, tail}
local n_known = 0
local MOST_KNOWN = 500      -- functions that a state keeps

local function tail_of(source)
    if not find(source, "\n", 1, true) then return 1 end
    local line, found, at = 1, nil, 1
    for place in string.gmatch(source, "()return%s*redis%.p?call%s*%(") do
        while true do
            local stop = find(source, "\n", at, true)
            if not stop or stop > place then break end
            line, at = line + 1, stop + 1
        end
        if found then return nil end
        found = line
    end
    return found
end

local function compile(sha, source)     -- "", or why it cannot be
    if known[sha] then return "" end
    doom, looked = nil, clock()
    local good, f, e = pcall(compiled, source, SOURCE)
    if not good then error(doom or f, 0) end
    if not f then return e end
    if n_known >= MOST_KNOWN then known, n_known = {}, 0 end
    known[sha], n_known = {f, tail_of(source)}, n_known + 1
    return ""
end

local function run(sha, keys, arguments, protocol, again)   -- the reply. again: its numbers are those of the run before
    local f
    f, tail = unpack(known[sha], 1, 2)
    doom, looked, resp.script, resp.client = nil, clock(), 2, tonumber(protocol)
    if not again then began = seed end
    seeded(began)
    seed = drawn()

    local function failed(e)
        local text = type(e) == "table" and e.err
        if type(text) ~= "string" then text = "ERR " .. tostring(e) end
        local line = line_now()
        local _, ours = find(text, "^ERR sandbox%.lua:%d+: ")   -- Lua's stack was at its end where the hook was called
        if ours and line then text = "ERR user_script:" .. line .. ": " .. sub(text, ours + 1) end
        text = resp.one_line(line and text .. " script: " .. sha .. ", on " .. SOURCE .. ":" .. line .. "." or text)
        sethook()
        return text
    end

    set_pace()      -- what the hook raises here, where nothing catches it, is what the state's caller is told (scripting.py: caught)
    local ok, reply = xpcall(function()
        env = globals_with(resp.parse(keys, 1), resp.parse(arguments, 1))
        setfenv(f, env)
    end, failed)
    if ok then ok, reply = xpcall(f, failed) end
    if ok then ok, reply = xpcall(function() return resp.encode(reply) end, failed) end
    sethook()
    env = nil
    setfenv(f, {})
    if ok then return reply end
    if type(reply) ~= "string" then reply = "ERR error in error handling" end
    if find(reply, "^not enough memory") or find(reply, "^error in error handling") then reply = "ERR " .. reply .. " script: " .. sha end
    return "-" .. reply .. "\r\n"
end

return compile, run
