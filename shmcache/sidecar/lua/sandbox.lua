-- What a script sees, and what it cannot get round. Called once per state with `ask`, the only way out (scripting.py: Runtime.ask), and the
-- chunks of the other files; returns compile(sha, source) and run(sha, keys, arguments, protocol).
--
-- Rules
-- - nothing of Python, no `debug`, no bytecode is reachable: `ask` takes strings and returns a string, and is an upvalue
-- - what a script changes is gone when it ends: it gets tables of its own, through which it sees the libraries
-- - the hook ends a script whose time is over; whatever catches errors throws that one again (after())
-- - no function that a script can call works long, or recurses, in C. Those of Lua 5.1 that do are replaced: the patterns, rep, sort, unpack
-- - Lua 5.1's known holes are closed: functions with many parameters and `...` are refused (check), chunks have fixed names, unpack counts

local ask, load_resp, load_patterns, load_cjson, load_bit = ...

local byte, find, format, gsub, len, lower, rep, sub =
    string.byte, string.find, string.format, string.gsub, string.len, string.lower, string.rep, string.sub
local clock, concat, dump, floor, getinfo, sethook, sort = os.clock, table.concat, string.dump, math.floor, debug.getinfo, debug.sethook, table.sort
local error, getmetatable, loadstring, next, pcall, rawset, select, setfenv, setmetatable, tostring, type, unpack, xpcall =
    error, getmetatable, loadstring, next, pcall, rawset, select, setfenv, setmetatable, tostring, type, unpack, xpcall
local metatable_of = debug.getmetatable     -- whatever it says of itself
local create, resume, running, status, yield = coroutine.create, coroutine.resume, coroutine.running, coroutine.status, coroutine.yield

local SOURCE = "@user_script"
local STEPS = 100           -- instructions between two looks at the clock
local LOOK = 0.002          -- seconds of work between two questions whether time is over
local MOST_RESULTS = 7990   -- of unpack: the stack of a C function has 8,000
local MOST_LEVELS = 5000    -- of the stack that are looked at: each look begins at its top
local MOST_REP = 16777216   -- bytes
local MOST_LOADED = 65536   -- bytes of code that a script may compile at a time
local READONLY = "Attempt to modify a readonly table"

local doom                  -- why the script ends, once it is known
local looked = 0
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

local function asked(...)
    local reply = ask(...)
    if byte(reply) == 33 then       -- !
        doom = sub(reply, 2)
        error({err = doom}, 0)
    end
    return reply
end

local function hook()
    if not doom then
        local now = clock()
        if now - looked < LOOK and now >= looked then return end
        looked = now
        asked("over")
        return
    end
    error({err = doom}, 0)
end

local function after(...)   -- back from where errors are caught
    if doom then error({err = doom}, 0) end
    return ...
end

local function text_of(ok, e, ...)      -- pcall of a script is told an error's text
    if not ok and type(e) == "table" and type(e.err) == "string" then return ok, e.err end
    return ok, e, ...
end

local resp = load_resp()
local patterns = load_patterns(fail, string_of, number_of, bad)

-- ---- the libraries ----------------------------------------------------------------------------------------------------------------------

local strings = {
    byte = byte, char = string.char, dump = dump, find = patterns.find, format = format, gfind = patterns.gmatch, gmatch = patterns.gmatch,
    gsub = patterns.gsub, len = len, lower = lower, match = patterns.match, reverse = string.reverse, sub = sub, upper = string.upper,
}

function strings.rep(text, n)
    text, n = string_of(text, 1, "rep"), number_of(n, 2, "rep")
    if text == "" or not (n >= 1) then return "" end
    if n * len(text) > MOST_REP then fail("resulting string too large") end
    return rep(text, n)
end

local tables = {}
for name, f in next, table do tables[name] = f end

function tables.sort(t, before)     -- with a comparison in Lua, in which the hook is called
    if type(t) ~= "table" then bad(1, "sort", "table expected, got " .. typed(t)) end
    if before ~= nil and type(before) ~= "function" then bad(2, "sort", "function expected, got " .. type(before)) end
    return sort(t, before or function(a, b) return a < b end)
end

local coroutines = {running = running, status = status, yield = yield}

function coroutines.create(f)
    local thread = create(f)
    sethook(thread, hook, "", STEPS)
    return thread
end

function coroutines.resume(...)
    return after(resume(...))
end

local function passed(ok, ...)
    if not ok then error((...), 0) end
    return ...
end

function coroutines.wrap(f)
    local thread = coroutines.create(f)
    return function(...) return passed(after(resume(thread, ...))) end
end

local function result(...)      -- of a command; and whether it is an error
    local n = select("#", ...)
    if n == 0 then return {err = "ERR Please specify at least one argument for this redis lib call"}, true end
    if n > MOST_RESULTS then return {err = "ERR too many arguments"}, true end
    local words = {...}
    for i = 1, n do
        local kind = type(words[i])
        if kind == "number" then
            words[i] = format("%.17g", words[i])
        elseif kind ~= "string" then
            return {err = "ERR Lua redis lib command arguments must be strings or integers"}, true
        end
    end
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

local locked = setmetatable({}, {__newindex = refuse, __metatable = false})     -- what getmetatable() shows of what cannot be changed
local views = {}            -- name of a library: the metatable through which a script sees it
for name, library in next, {
    string = strings, table = tables, math = math, coroutine = coroutines, redis = redis, bit = load_bit(number_of),
    cjson = load_cjson(fail, bad, string_of),
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
    writable(t)
    return rawset(t, key, value)
end

function globals.setmetatable(t, metatable)
    writable(t)
    return setmetatable(t, metatable)
end

local function compiled(source, name)       -- a function, or nil and why not
    if byte(source) == 27 then return nil, (gsub(name, "^[@=]", "")) .. ":1: unexpected symbol near 'char(27)'" end
    local f, e = loadstring(source, name)
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
    doom, looked = nil, clock()
    if known[sha] then return "" end
    local f, e = compiled(source, SOURCE)
    if not f then return e end
    if n_known >= MOST_KNOWN then known, n_known = {}, 0 end
    known[sha], n_known = {f, tail_of(source)}, n_known + 1
    return ""
end

local function run(sha, keys, arguments, protocol)      -- the reply
    local f
    f, tail = unpack(known[sha], 1, 2)
    doom, looked, resp.script, resp.client = nil, clock(), 2, tonumber(protocol)
    env = globals_with(resp.parse(keys, 1), resp.parse(arguments, 1))
    setfenv(f, env)

    local function failed(e)
        local text = type(e) == "table" and e.err
        if type(text) ~= "string" then text = "ERR " .. tostring(e) end
        local line = line_now()
        return resp.one_line(line and text .. " script: " .. sha .. ", on " .. SOURCE .. ":" .. line .. "." or text)
    end

    sethook(hook, "", STEPS)
    local ok, reply = xpcall(f, failed)
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
