"""The time limit of scripts, in every function that one can reach: false lengths, huge arguments, stripes held or not. And what is left of
a script when it has ended."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

import pytest
import redis

from shmcache.core import _resp
from shmcache.sidecar.commands import keys, scripting
from shmcache.sidecar.serve import STOP_LIMIT
from tests.integration.service import LIMIT, running, until
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode

TIME_LIMIT = 0.3  # seconds, of each script; it has ten times as long, for others use the machine, too

FALSE = "local t = {} for i = 29, 0, -1 do t[2 ^ i] = 1 end assert(#t >= 2 ^ 29) "  # thirty entries
BIG = "local s = string.rep('a', 16000000) "
HALF = "local s = string.rep('a', 9000000) "
FULL = "local t = {} for i = 1, 2 ^ 19 - 2 do t[i + 0.5] = 1 end local p = 0 "  # it is rebuilt for each new key
NEW_KEYS = "t[p] = nil p = p + 1 t[p] = 1 " * 8
FULL_AND_FALSE = FALSE.replace("assert", "for i = 1, 2 ^ 17 - 32 do t[i + 0.5] = 1 end assert")
DEEP = "local function spin() while true do end end local function deep(n) pcall(deep, n + 1) while n > 150 do pcall(spin) end end deep(1) "
NUMBERS = "local t = {} for i = 1, 2 ^ 20 do t[i] = 0.1 + i end "

SCRIPTS = [
    # tables
    FALSE + "return {table.getn(t), table.maxn(t), #t}",
    FALSE + "table.insert(t, 1, 'x')",
    "table.insert({1}, -2 ^ 31, 'x')",
    "table.insert({1}, 0 / 0, 'x')",
    "table.insert({1}, 2 ^ 31 - 1, 'x')",
    FALSE + "table.remove(t, 1)",
    FULL_AND_FALSE + "table.insert(t, #t - 4000, 'x')",
    FULL_AND_FALSE + "table.remove(t, #t - 4000)",
    FULL_AND_FALSE + "table.sort(t, function() end)",
    FALSE + "table.foreachi(t, math.randomseed)",
    FALSE + "table.foreachi(t, function() end)",
    NUMBERS + "while true do table.foreach(t, math.randomseed) end",
    FALSE + "table.sort(t, rawequal)",
    FALSE + "table.sort(t, function() return true end)",
    NUMBERS + "while true do table.sort(t, rawequal) end",
    FALSE + "return #table.concat(t)",
    FALSE + "setmetatable(t, {__index = function() return 'x' end}) return #table.concat(t, '', 1, 2 ^ 31 - 1)",
    NUMBERS + "while true do table.concat(t) end",
    NUMBERS + "while true do table.maxn(t) end",
    FALSE + "return unpack(t)",
    FALSE + "return select('#', unpack(t, 1, 2 ^ 31 - 1))",
    FALSE + "for i in ipairs(t) do end while true do next(t) end",
    "local t = {} for i = 1, 2 ^ 20 do t[i] = 1 end for i = 1, 2 ^ 20 do t[i] = nil end while true do " + "next(t) " * 16 + "end",
    FULL + "while true do " + NEW_KEYS + "end",
    FULL + "while true do coroutine.wrap(function() " + NEW_KEYS + "end)() end",
    # what the machine does by itself
    HALF + "local r while true do " + "r = s .. 'x' " * 16 + "end",
    HALF + "local a, b, r = s .. 'x', s .. 'y' while true do " + "r = a < b " * 16 + "end",
    "local s, r = string.rep('1', 16000000) while true do " + "r = s + 1 " * 16 + "end",
    "local s = string.rep('1', 16000000) while true do " + "tonumber(s) tonumber(s, 3) " * 8 + "end",
    "local n, t, pad = 0, {}, string.rep('a', 60) while true do n = n + 1 local d = string.format('%08d', n) t[n] = d:sub(1, 1) .. 'aa' .. d:sub(2, 2) .. pad end",
    # strings
    *(BIG + "while true do " + f"s:{name}() " * 16 + "end" for name in ("upper", "lower", "reverse", "len")),
    "while true do string.rep('a', 16000000) end",
    "return string.rep('', 1e300)",
    HALF + "while true do " + "string.format('%q', s) " * 16 + "end",
    BIG + "while true do " + "string.format(s) " * 16 + "end",
    BIG + "return pcall(string.byte, s, 1, -1)",
    "local s, p = string.rep('a', 16000000), string.rep('a', 61) .. 'b' while true do string.find(s, p, 1, true) end",
    "local s, p = string.rep('a', 64000), string.rep('a', 31000) .. 'b' while true do string.find(s, p, 1, true) end",
    "local s, p = string.rep('a', 16000000), string.rep('a', 6000000) .. 'b' return string.find(s, p, 1, true)",
    BIG + "while true do ('x'):find(s) ('x'):match(s) end",
    "return string.rep('a', 100000):find(('.-'):rep(20) .. 'b')",
    "return string.rep('a', 100000):find(('a?'):rep(100) .. ('a'):rep(100) .. 'b')",
    BIG + "return s:find('(a-)%1%1b')",
    "return string.rep('(', 16000000):find('%b()')",
    "for x in string.rep('a', 1000000):gmatch('a-b') do end",
    "return string.rep('a', 1000000):gsub('a-b', '')",
    "local by = string.rep('b', 10000000) while true do ('aa'):gsub('a', by, 1) end",
    "local by = string.rep('%1', 400000) while true do ('aa'):gsub('a', by, 1) end",
    BIG + "return #s:gsub('a', {})",
    # JSON, bits, code
    "local s = string.rep('\\1', 8000000) while true do pcall(cjson.encode, {s}) end",
    HALF + "while true do cjson.encode({s}) end",
    FALSE + "return cjson.encode(t)",
    "local t = {} for i = 1, 1e6 do t = {t} end return cjson.encode(t)",
    "local t = {} for i = 1, 100 do t[i] = t end return cjson.encode(t)",
    "local t = {1} for i = 1, 30 do t = {t, t} end return cjson.encode(t)",
    "local s = '\"' .. string.rep('a', 10000000) .. '\"' while true do cjson.decode(s) end",
    "local s = '\"' .. string.rep('a', 10000000) while true do pcall(cjson.decode, s) end",
    "local s = '\"' .. string.rep('\\\\n', 4000000) .. '\"' while true do cjson.decode(s) end",
    "local s = string.rep(' ', 16000000) while true do pcall(cjson.decode, s) end",
    "local s = string.rep('1', 16000000) while true do cjson.decode(s) end",
    "local s = string.rep('[', 900) .. string.rep(']', 900) while true do cjson.decode(s) end",
    "while true do pcall(cjson.decode, '[' .. string.rep('1,', 1000000)) end",
    "while true do bit.band(1, 2, 3) bit.tohex(1, 2 ^ 31) bit.lshift(1, 2 ^ 31) end",
    "local s = 'return {' .. string.rep('1,', 32000) .. '1}' while true do loadstring(s) end",
    "local s = string.rep('f=function()end ', 4000) while true do loadstring(s) end",
    "local f = loadstring('return {' .. string.rep('1,', 32000) .. '1}') while true do string.dump(f) end",
    "return load(function() return ' ' end)",
    "return load(function() while true do end end)",
    # the rest
    BIG + "while true do pcall(error, s) pcall(error, {err = s}) tostring(s) end",
    "while true do coroutine.wrap(function() end)() end",
    "while true do coroutine.resume(coroutine.create(function() end)) end",
    "local t = {} for i = 1, 7000 do t[i] = i end while true do select(7000, unpack(t)) end",
    "local function f() f() end while true do pcall(f) end",
    DEEP,  # where C's stack is at its end the hook cannot be called
    DEEP.replace("pcall(spin)", "coroutine.resume(coroutine.create(spin))"),
    DEEP.replace("pcall(spin)", "xpcall(spin, tostring)"),
    "local function spin() while true do end end local of = {} function of.__index(t, k) local _ = setmetatable({}, of)[k + 1] end "
    "local function deep(n) pcall(function() return setmetatable({}, of)[n] end) while true do pcall(spin) end end pcall(deep, 1)",
    "local function f(n) return n > 180 and redis.sha1hex() or pcall(f, n + 1) end while true do pcall(f, 1) end",
    "while true do math.fmod(1e308, 1e-308) math.pow(1e308, 1e308) math.ldexp(1, 2 ^ 31) math.random(2 ^ 31) end",
    # commands and replies
    BIG + "while true do redis.sha1hex(s) end",
    HALF + "while true do redis.log(redis.LOG_NOTICE - 1, s) redis.error_reply(s) redis.status_reply(s) end",
    BIG + "while true do redis.pcall('set', KEYS[1] or 'k', s) end",
    "local t = {} for i = 1, 7000 do t[i] = 'x' end while true do redis.pcall('del', unpack(t)) end",
    FALSE + "return redis.pcall('echo', unpack(t))",
    "return {err = string.rep('x\\n', 4000000)}",
    "return {ok = string.rep('\\r\\n', 4000000)}",
    FALSE + "return t",
    "local t = {} for i = 1, 100 do t[i] = t end return t",
    "local t = {1} for i = 1, 60 do t = {t, t} end return t",
    NUMBERS + "return t",
]


@pytest.mark.parametrize("n", [0, 1], ids=["nothing held", "a key held"])
def test_every_function_ends_with_the_time_limit(serve, n):
    service = serve(size="128M")
    client = service.client(socket_timeout=10 * TIME_LIMIT, retry=None)
    client.config_set("lua-time-limit", int(TIME_LIMIT * 1000))
    for script in SCRIPTS:
        try:
            client.eval(script, n, *["k"] * n)
        except redis.ResponseError:
            pass
        except redis.TimeoutError:
            pytest.fail(f"it goes on and on: {script}")
    assert client.eval("return 'fine'", 0) == b"fine"
    assert "internal error" not in service.said() and "Traceback" not in service.said()


SLOW_TO_COMPILE = "local x if x then " + "elseif x then " * 40_000 + "end return 1"  # 40,000 jumps, each found by way of all before it


def test_scripts_of_a_transaction_are_compiled_within_its_limit(serve):
    client = serve().client(socket_timeout=10, retry=None)
    client.config_set("lua-time-limit", 200)
    with client.pipeline() as pipe:
        for i in range(20):
            pipe.eval(f"{SLOW_TO_COMPILE} -- {i}", 1, "k")
        replies = pipe.execute(raise_on_error=False)
    assert len(replies) == 20 and "lua-time-limit" in str(replies[-1])
    assert client.eval("return 'fine'", 0) == b"fine"


def test_the_arguments_of_a_script_are_read_within_its_limit(serve):
    client = serve().client(socket_timeout=LIMIT, retry=None)
    client.config_set("lua-time-limit", 50)
    with pytest.raises(redis.ResponseError, match="lua-time-limit"):
        client.eval("return #ARGV", 1, "k", *["x"] * 500_000)


def test_the_clock_is_looked_at_more_often_where_instructions_take_long(cache, monkeypatch):
    """Some 20 ms for each comparison here: of 50 instructions it would be six times."""
    inprocess = InProcess(cache.name, {"lua-time-limit": "60000"})
    client, looks, answer = inprocess.connect(), [], scripting.Runtime.answer

    def noted(runtime, what, words):
        looks.append(what)
        return answer(runtime, what, words)

    monkeypatch.setattr(scripting.Runtime, "answer", noted)
    script = "local a, b = string.rep('\\0', 9000000) .. 'x', string.rep('\\0', 9000000) .. 'y' local r redis.setresp(2) " + "r = a < b " * 32
    assert inprocess.say(client, encode([b"EVAL", script.encode(), b"0"])) == b"$-1\r\n"
    assert looks[looks.index(b"setresp") :].count(b"over") >= 10
    inprocess.close()


BUSY = [FALSE + "redis.call('set', KEYS[1], 1) table.insert(t, 1, 'x')", FALSE + "redis.call('set', KEYS[1], 1) table.sort(t, rawequal)"]


@pytest.mark.parametrize("script", BUSY)
def test_script_kill_ends_what_works_in_a_library(serve, script):
    service = serve()
    client, other = service.client(retry=None), service.client(socket_timeout=LIMIT)
    client.config_set("lua-time-limit", 60_000)
    said = []

    def use():
        try:
            client.eval(script, 1, "k")
        except redis.RedisError as e:
            said.append(str(e))

    def killed():
        with contextlib.suppress(redis.ResponseError):
            other.script_kill()
        return said

    with running(threading.Thread(target=use), stop=threading.Event()):
        until(lambda: other.get("k"))
        until(killed)
    assert said[0].startswith("Script killed by user with SCRIPT KILL.")
    assert other.getset("k", 2) == b"1"


@pytest.mark.parametrize("words", [(b"EVAL", b"return 1", b"0"), (b"SCRIPT", b"LOAD", b"return 1"), (b"EVAL", b"return loadstring('return 1')()", b"0")])
def test_script_kill_ends_what_is_compiled(cache, monkeypatch, words):
    inprocess = InProcess(cache.name)
    client, other = inprocess.connect(), inprocess.connect()
    said = []

    def looked_at(*_):  # the last thing that is done of a compilation
        said.append(inprocess.say(other, encode([b"SCRIPT", b"KILL"])))
        return True

    assert inprocess.say(client, encode([b"EVAL", b"return 2", b"0"])) == b":2\r\n"
    client.transport.written.clear()
    monkeypatch.setattr(scripting, "sound", looked_at)
    killed = inprocess.say(client, encode(list(words)))
    monkeypatch.undo()
    assert said[0] == b"+OK\r\n" and b"Script killed by user with SCRIPT KILL." in killed
    client.transport.written.clear()
    assert inprocess.say(client, encode([b"EVAL", b"return 3", b"0"])) == b":3\r\n"
    inprocess.close()


def test_it_ends_in_good_order_while_scripts_work_in_a_library(serve):
    service = serve()
    client = service.client(retry=None)
    client.config_set("lua-time-limit", 60_000)

    def use():
        with contextlib.suppress(redis.RedisError):
            service.client(retry=None).eval(BUSY[0], 1, "k")

    with running(threading.Thread(target=use), stop=threading.Event()):
        until(lambda: client.get("k"))
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < STOP_LIMIT - 2  # it had not to be killed


# ---- what is left of it -----------------------------------------------------------------------------------------------------------------

EVERYTHING = """
    local queue, seen = {_G, '', 0, true, tostring, coroutine.create(function() end), KEYS, cjson.null}, {}
    for _, library in ipairs({'string', 'table', 'math', 'coroutine', 'redis', 'bit', 'cjson'}) do
        queue[#queue + 1] = _G[library]
        for _, name in ipairs({'call', 'rep', 'insert', 'random', 'wrap', 'band', 'encode', 'null', 'REPL_ALL'}) do queue[#queue + 1] = _G[library][name] end
    end
    local i = 0
    local function each(use)
        while i < #queue do
            i = i + 1
            local thing = queue[i]
            if not seen[thing] then
                seen[thing] = true
                for _, part in ipairs({getmetatable(thing) or 0, select(2, pcall(function() return thing.__index end)) or 0}) do queue[#queue + 1] = part end
                use(thing)
            end
        end
    end
"""
LEAVE = """
    each(function(thing)
        pcall(rawset, thing, 'secret', ARGV[1])
        pcall(table.insert, thing, ARGV[1])
        pcall(setmetatable, thing, {__index = function() return ARGV[1] end})
        pcall(function() thing.secret = ARGV[1] end)
        pcall(function() thing.__index = function() return ARGV[1] end end)
    end)
"""
FIND = """
    local found = 0
    each(function(thing)
        for _, name in ipairs({'secret', 1}) do
            local good, value = pcall(function() return thing[name] end)
            if good and value ~= nil then found = found + 1 end
        end
    end)
    return {found, #queue}
"""


def of_one_state(client, *scripts):
    """What they reply: one after the other in the same state of Lua."""
    with client.pipeline() as pipe:
        for script in scripts:
            pipe.eval(script, 0, "the secret")
        return pipe.execute()


def test_a_script_leaves_nothing_for_the_next(serve):
    client = serve().client()
    *_, (found, looked_at) = of_one_state(client, EVERYTHING + LEAVE, EVERYTHING + FIND)
    assert found == 0 and looked_at > 40
    assert of_one_state(client, "return rawequal(getmetatable('').x, nil)", "return ('x'):rep(2)") == [1, b"xx"]


def test_the_numbers_of_a_script_are_its_own(serve):
    client = serve().client()
    draw = "return {math.random(2 ^ 31 - 2), math.random(10), tostring(math.random())}"
    seeded = "math.randomseed(7) " + draw
    first, second, third, fourth = of_one_state(client, seeded, draw, seeded, draw)
    assert first == third and second != fourth
    assert client.eval("math.randomseed(7) return {tostring(math.random()), math.random(10), math.random(5, 9)}", 0) == [b"0.26644419658298", 7, 6]  # Redis'


# ---- commands that take long --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["KEYS", "*"], ["BITOP", "XOR", "k", "k", "l"], ["BITOP", "NOT", "new", "k"]])
def test_a_command_looks_whether_its_script_may_go_on(cache, words):
    inprocess = InProcess(cache.name)
    client = inprocess.connect()
    inprocess.say(client, encode([b"MSET", b"k", b"v", b"l", b"w"]))

    def over():
        raise _resp.CommandError(b"ERR its time is over")

    client.check_time = over
    assert inprocess.say(client, encode([word.encode() for word in words])) == b"+OK\r\n-ERR its time is over\r\n"
    assert cache.get("k") == b"v" and cache.get("new") is None
    del client
    inprocess.close()


def test_a_command_of_a_script_ends_with_it(serve):
    client = serve(size="256M").client(socket_timeout=10, retry=None)
    client.config_set("lua-time-limit", 200)
    client.set("big", os.urandom(20_000_000))
    client.set("long", os.urandom(16_000))
    many = "local t = {} for i = 1, 1000 do t[i] = KEYS[1] end redis.call('bitop', 'xor', KEYS[2], unpack(t))"
    with pytest.raises(redis.ResponseError, match="lua-time-limit"):
        client.eval(many, 2, "big", "new")
    assert client.exists("new") == 0
    with pytest.raises(redis.ResponseError, match="LCS exceeds"):
        client.eval("return redis.call('lcs', KEYS[1], KEYS[1], 'len')", 1, "long")
    with client.pipeline() as pipe:
        pipe.lcs("long", "long", len=True)
        (said,) = pipe.execute(raise_on_error=False)
    assert "LCS exceeds" in str(said)
    assert client.lcs("long", "long", len=True) == 16_000


@pytest.mark.parametrize("words", [["KEYS"], ["SCAN", "0", "COUNT", "1000", "MATCH"]])
def test_a_match_that_takes_long_is_one_of_few(cache, words):
    """A script's time is looked at between two keys; a pattern has as many bytes as a key."""
    inprocess = InProcess(cache.name)
    client, calls = inprocess.connect(), []
    client.check_time = lambda: calls.append(1)
    for i in range(20):
        cache.set("a" * 4000 + str(i), 1)
    assert inprocess.say(client, encode([*(word.encode() for word in words), b"*" + b"a" * 2000 + b"b"])).endswith(b"*0\r\n")
    assert len(calls) >= 20
    assert b"-ERR a pattern has at most 4096 bytes" in inprocess.say(client, encode([*(word.encode() for word in words), b"[" + b"a" * 4096]))
    del client.check_time
    inprocess.close()


def test_what_a_script_says_is_a_line_that_a_pipe_takes_at_once(serve):
    """Its stripes are held meanwhile: select.PIPE_BUF, with whatever its bytes are shown as."""
    service = serve()
    for byte in ("\\255", "\\0", "x"):
        service.client().eval(f"redis.log(redis.LOG_WARNING, string.rep('{byte}', 100000))", 0)
    lines = until(lambda: [line for line in service.said().splitlines() if "a script says" in line][2:] and service.said().splitlines())
    assert all(len(line) < select.PIPE_BUF for line in lines)


def test_what_a_script_could_not_have_is_not_made(serve):
    """The same string many times is one to the script, but each a copy in a command and in a reply."""
    service = serve(size="128M")
    client = service.client(socket_timeout=LIMIT, retry=None)
    client.config_set("lua-time-limit", 10_000)
    client.set("k", "x" * 8_000_000)
    with pytest.raises(redis.ResponseError, match="too many bytes"):
        client.eval("local s, t = string.rep('x', 8000000), {} for i = 1, 20 do t[i] = s end return redis.call('del', unpack(t))", 0)
    with pytest.raises(redis.ResponseError, match="the reply is larger than"):
        client.eval("local t = {} for i = 1, 20 do t[i] = KEYS[1] end return redis.call('mget', unpack(t))", 1, "k")
    assert client.eval("return #redis.call('mget', KEYS[1], KEYS[1])[2]", 1, "k") == 8_000_000
    assert [len(value) for value in client.mget(["k"] * 20)] == [8_000_000] * 20


@pytest.mark.parametrize(("first", "rest", "wanted"), [(b"\x80", b"\0", 1), (b"\x7f", b"\xff", 0)])
def test_bitpos_in_a_large_value_takes_no_time(make, first, rest, wanted):
    """The first byte has such a bit, but before the range."""
    cache = make("128M")
    inprocess = InProcess(cache.name)
    client = inprocess.connect()
    cache.set("k", first + rest * 15_000_000)
    began = time.monotonic()
    for _ in range(16):
        said = inprocess.say(client, encode([b"BITPOS", b"k", b"%d" % wanted, b"1", b"-1", b"BIT"]))
        client.transport.written.clear()
        assert said == b":-1\r\n"
    assert time.monotonic() - began < 10
    cache.set("k", first + rest * 1000 + bytes([rest[0] ^ 0x10]) + rest)
    assert inprocess.say(client, encode([b"BITPOS", b"k", b"%d" % wanted, b"1", b"-1", b"BIT"])) == b":%d\r\n" % (8 * 1001 + 3)
    inprocess.close()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("BITFIELD k", "GET u8 0"), ("BITFIELD_RO k", "GET u8 0"), ("LCS k l", "LEN"), ("SCAN 0", "COUNT 9"), ("RESTORE k 0 x", "REPLACE"), ("SET k v", "XX"),
        ("GETEX k", "PERSIST"), ("COPY k l", "REPLACE"), ("HELLO 3", "SETNAME n"), ("ACL SETUSER u", "+get"),
    ],
)  # fmt: skip
def test_many_options_are_read_in_a_time_that_grows_with_them(cache, words, option):
    inprocess = InProcess(cache.name)
    client = inprocess.connect()
    began = time.monotonic()
    assert inprocess.say(client, encode([*words.encode().split(), *option.encode().split() * (600_000 // len(option.split()))]))
    assert time.monotonic() - began < 30
    inprocess.close()


@pytest.mark.parametrize(("words", "each"), [("CONFIG SET", "x{} 1"), ("ACL SETUSER u", "+set|x{}")])
def test_many_words_of_which_none_is_like_another_are_read_in_a_time_that_grows_with_them(cache, words, each):
    inprocess = InProcess(cache.name)
    client = inprocess.connect()
    began = time.monotonic()
    assert inprocess.say(client, encode([*words.encode().split(), *" ".join(each.format(i) for i in range(80_000)).encode().split()]))
    assert time.monotonic() - began < 30
    inprocess.close()


def test_config_set_says_of_the_first_wrong_name_what_is_wrong_as_redis_does(cache):
    inprocess = InProcess(cache.name)
    client = inprocess.connect()
    for words, said in (
        (b"foo 1 foo 2", b"-ERR Unknown option or number of arguments for CONFIG SET - 'foo'"),
        (b"timeout 5 foo 3 timeout 6", b"-ERR Unknown option or number of arguments for CONFIG SET - 'foo'"),
        (b"timeout -5 TIMEOUT 3", b"-ERR CONFIG SET failed (possibly related to argument 'timeout') - duplicate parameter"),
        (b"maxmemory 1 maxmemory 2", b"-ERR CONFIG SET failed (possibly related to argument 'maxmemory') - duplicate parameter"),
        (b"port 1 port 2", b"-ERR CONFIG SET failed (possibly related to argument 'port') - can't set immutable config"),
        (b"timeout 1 maxclients 5 maxclients 6 timeout 2", b"-ERR CONFIG SET failed (possibly related to argument 'maxclients') - duplicate parameter"),
    ):
        assert inprocess.say(client, encode([b"CONFIG", b"SET", *words.split()])) == said + b"\r\n"
        client.transport.written.clear()
    assert inprocess.settings["timeout"] == "0"
    inprocess.close()


HOSTILE = b"*" + b"a" * 4000 + b"b"  # of which each byte of many a's is compared with thousands


def test_a_channel_or_pattern_that_takes_long_to_match_is_refused(cache):
    inprocess = InProcess(cache.name)
    client, other = inprocess.connect(), inprocess.connect()
    assert inprocess.say(other, encode([b"PSUBSCRIBE", HOSTILE])).startswith(b"*3")
    long = b"a" * 4097
    for words, said in (
        ([b"PUBLISH", long, b"m"], b"-ERR the name of a channel has at most 4096 bytes\r\n"),
        ([b"SUBSCRIBE", b"c", long], b"-ERR the name of a channel has at most 4096 bytes\r\n"),
        ([b"PSUBSCRIBE", b"c", long], b"-ERR a pattern has at most 4096 bytes\r\n"),
        ([b"PUBSUB", b"CHANNELS", long], b"-ERR a pattern has at most 4096 bytes\r\n"),
        ([b"CONFIG", b"GET", long], b"-ERR a pattern has at most 4096 bytes\r\n"),
        ([b"COMMAND", b"LIST", b"FILTERBY", b"PATTERN", long], b"-ERR a pattern has at most 4096 bytes\r\n"),
        ([b"PUBLISH", long[1:], b"m"], b":0\r\n"),
        ([b"PUBSUB", b"NUMPAT"], b":1\r\n"),
    ):
        assert inprocess.say(client, encode(words)) == said
        client.transport.written.clear()
    assert not client.in_pubsub
    inprocess.close()


@pytest.mark.parametrize("words", [[b"PUBLISH", b"a" * 4000, b"m"], [b"PUBSUB", b"CHANNELS", HOSTILE]])
def test_a_script_looks_at_its_time_between_two_matches_that_take_long(cache, words):
    inprocess = InProcess(cache.name)
    client, other = inprocess.connect(), inprocess.connect()
    inprocess.say(other, encode([b"SUBSCRIBE", b"a" * 4000, b"c"]))
    inprocess.say(other, encode([b"PSUBSCRIBE", b"a*", HOSTILE, b"?" + HOSTILE]))
    other.transport.written.clear()

    def over():
        raise _resp.CommandError(b"ERR its time is over")

    client.check_time = over
    assert inprocess.say(client, encode(words)) == b"-ERR its time is over\r\n"
    other.flush()
    assert not other.transport.written  # nobody has been sent a part
    del client.check_time
    client.transport.written.clear()
    inprocess.say(client, encode([b"PUBLISH", b"ab", b"m"]))
    other.flush()
    assert b"pmessage" in b"".join(other.transport.written)
    inprocess.close()


def test_a_script_that_publishes_ends_within_its_limit(cache):
    """Its key is held meanwhile. One that subscribes needs no right but that."""
    inprocess = InProcess(cache.name, {"lua-time-limit": "300"})
    client, other = inprocess.connect(), inprocess.connect()
    assert inprocess.say(other, encode([b"PSUBSCRIBE", HOSTILE])).startswith(b"*3")
    script = b"redis.call('set', KEYS[1], 1) return redis.pcall('publish', string.rep('a', 4000000), 'm').err"
    began = time.monotonic()
    assert b"at most 4096 bytes" in inprocess.say(client, encode([b"EVAL", script, b"1", b"k"]))
    assert time.monotonic() - began < 10 * TIME_LIMIT
    inprocess.close()


@pytest.fixture
def given_to_pool(cache):
    """(say(words) -> reply; how often it was executed in the pool so far)"""
    inprocess = InProcess(cache.name)
    client, given = inprocess.connect(), []
    submit = inprocess.soon.submit
    inprocess.soon.submit = lambda *words: given.append(words) or submit(*words)

    def say(words):
        client.transport.written.clear()
        return inprocess.say(client, encode(words.encode().split())), len(given)

    yield say
    inprocess.close()


def test_a_large_value_is_dumped_in_the_pool(cache, given_to_pool):
    for size, wanted in ((1000, 0), (1_000_000, 1)):
        cache.set("k", b"x" * size)
        said, given = given_to_pool("DUMP k")
        assert given == wanted and keys.undumped(said[said.index(b"\n") + 1 : -2]) == b"x" * size


@pytest.mark.parametrize("size", [1000, 1_000_000])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("BITCOUNT k", ":{}"), ("BITCOUNT k 0 0", ":1"), ("BITPOS k 0", ":0"), ("BITFIELD_RO k GET u8 #1", "*1 :1"), ("BITFIELD k GET u8 #1", "*1 :1"),
        ("BITFIELD k SET u8 #1 2 GET u8 #1", "*2 :1 :2"), ("BITOP NOT l k", ":{}"), ("BITOP XOR l k k k", ":{}"),
    ],
)  # fmt: skip
def test_the_bits_of_a_large_value_are_looked_at_in_the_pool(cache, given_to_pool, words, said, size):
    cache.set("k", b"\1" * size)
    reply, given = given_to_pool(words)
    assert reply.decode().split() == said.format(size).split() and given == (size > 1000)


def test_a_field_far_behind_the_end_is_set_in_the_pool(cache, given_to_pool):
    assert given_to_pool("BITFIELD k SET u8 8000000 1 GET u8 8000000") == (b"*2\r\n:0\r\n:1\r\n", 1)
    assert given_to_pool("BITFIELD l GET u8 8000000") == (b"*1\r\n:0\r\n", 1)  # nothing is made for it


@pytest.mark.parametrize("words", ["GET {}", "PUBLISH {} m", "SCAN {0}", "OBJECT {0}", "ACL DRYRUN reader GET {}"])
def test_a_word_that_is_no_key_is_not_looked_at_byte_by_byte(make, words):
    """By the rules of a user, or in an error: the event loop serves nobody meanwhile."""
    inprocess = InProcess(make("64M").name, {"proto-max-bulk-len": str(1 << 26)})
    admin, client = inprocess.connect(), inprocess.connect()
    pattern = "*" + "a" * 4000 + "b"
    rules = f"ACL SETUSER reader on nopass +@all ~{pattern} &{pattern}"
    assert inprocess.say(admin, encode(rules.encode().split())) == b"+OK\r\n"
    assert inprocess.say(client, encode([b"AUTH", b"reader", b"x"])) == b"+OK\r\n"
    began = time.monotonic()
    for byte in ("a", "\0"):
        assert inprocess.say(client, encode([word.format(byte * 10_000_000).encode() for word in words.split()]))
    assert time.monotonic() - began < 20
    inprocess.close()


def test_a_monitor_sees_large_words_in_time(make):
    """Whoever sends them keeps all others waiting meanwhile."""
    inprocess = InProcess(make("64M").name, {"proto-max-bulk-len": str(1 << 26)})
    monitor, client = inprocess.connect(), inprocess.connect()
    inprocess.say(monitor, encode([b"MONITOR"]))
    every = bytes(range(256))
    inprocess.say(client, encode([b"ECHO", every]))
    shown = "".join({34: '\\"', 92: "\\\\", 10: "\\n", 13: "\\r", 9: "\\t", 7: "\\a", 8: "\\b"}.get(c) or (chr(c) if 32 <= c < 127 else f"\\x{c:02x}") for c in every)
    assert f'"ECHO" "{shown}"\r\n'.encode() in b"".join(monitor.transport.written)
    monitor.transport.written.clear()
    began = time.monotonic()
    for _ in range(8):
        inprocess.say(client, encode([b"ECHO", b"\0" * 10_000_000]))
        client.transport.written.clear()
        assert sum(map(len, monitor.transport.written)) > 40_000_000
        monitor.transport.written.clear()
    assert time.monotonic() - began < 20
    inprocess.close()
