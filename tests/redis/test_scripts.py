"""Scripts: what they reply, next to what Redis replies, byte for byte, in both protocols."""

from __future__ import annotations

import random

import pytest

from tests.redis import servers
from tests.redis.resp import Connection

PLAIN = """
return
return nil
return 1
return -1
return 3.99
return -3.99
return 1e300
return 0/0
return 1/0
return 9007199254740993
return 'a'
return ''
return 'a\\r\\nb\\0c'
return true
return false
return {}
return {1, 2, 3}
return {1, 2, nil, 4}
return {1, 'a', {2, {3, {}}}, true, false}
return {a = 1}
return {[2] = 1}
return {ok = 'fine'}
return {ok = 'two\\r\\nlines'}
return {ok = 1}
return {err = 'MY error'}
return {err = 'MYERROR'}
return {err = 'two\\nlines'}
return {err = 1}
return {double = 3.5}
return {double = 1e100}
return {double = 1/0}
return {double = 'x'}
return {map = {a = 1}}
return {map = {a = {map = {b = 2}}}}
return {map = {}}
return {map = 1}
return {set = {a = true}}
return {set = {}}
return {big_number = '123456789012345678901234567890'}
return {big_number = '1\\r\\n2'}
return {verbatim_string = {format = 'txt', string = 'abc'}}
return {verbatim_string = {format = 'txt'}}
return {{err = 'in an array'}, {ok = 'too'}}
return redis.error_reply('My error')
return redis.error_reply('MYERROR')
return redis.error_reply('-My error')
return redis.error_reply('My error\\r\\n')
return redis.error_reply()
return redis.error_reply({})
return redis.error_reply('a', 'b')
return redis.status_reply('fine')
return redis.status_reply()
return redis.status_reply({})
return redis.status_reply('x').ok
return redis.error_reply('x y').err
return 1, 2, 3
return function() end
return coroutine.create(function() end)
return redis.sha1hex('')
return redis.sha1hex('abc')
return redis.sha1hex(12)
return redis.sha1hex({})
return redis.sha1hex()
return redis.sha1hex('a', 'b')
return redis.replicate_commands()
return redis.set_repl(redis.REPL_ALL)
return redis.set_repl(9)
return redis.set_repl()
return {redis.REPL_NONE, redis.REPL_AOF, redis.REPL_SLAVE, redis.REPL_REPLICA, redis.REPL_ALL}
return {redis.LOG_DEBUG, redis.LOG_VERBOSE, redis.LOG_NOTICE, redis.LOG_WARNING}
return {redis.REDIS_VERSION, redis.REDIS_VERSION_NUM}
return redis.log(redis.LOG_DEBUG, 'quiet')
return redis.log(1)
return redis.log('a', 'b')
return redis.log(9, 'b')
return redis.setresp()
return redis.setresp(4)
return redis.setresp('x')
return redis.setresp(3)
redis.setresp(3) return true
redis.setresp(3) return {true, false}
redis.setresp(3) return redis.call('get', KEYS[1])
redis.setresp(3) return type(redis.call('get', KEYS[1]))
redis.setresp(3) return redis.call('mget', KEYS[1], KEYS[2])
redis.setresp(3) return #redis.call('mget', KEYS[1], KEYS[2])
redis.setresp(3) redis.setresp(2) return type(redis.call('get', KEYS[1]))
redis.setresp(3) return redis.call('memory', 'doctor').verbatim_string ~= nil
redis.setresp(3) return redis.call('lcs', KEYS[1], KEYS[2], 'idx').map.len
redis.setresp(3) return redis.call('lcs', KEYS[1], KEYS[2], 'idx')
return redis.call('lcs', KEYS[1], KEYS[2], 'idx')
return type(redis.call('get', KEYS[1]))
return redis.call('get', KEYS[1])
return redis.call('set', KEYS[1], ARGV[1])
return redis.call('set', KEYS[1], ARGV[1]).ok
return {redis.call('set', KEYS[1], 1), redis.call('incr', KEYS[1]), redis.call('get', KEYS[1])}
return redis.call('SET', KEYS[1], 1.5)
redis.call('set', KEYS[1], 1.5) return redis.call('get', KEYS[1])
redis.call('set', KEYS[1], 1e20) return redis.call('get', KEYS[1])
redis.call('set', KEYS[1], 0.1) return redis.call('get', KEYS[1])
redis.call('set', KEYS[1], 10000000) return redis.call('get', KEYS[1])
redis.call('set', KEYS[1], 'a\\0\\r\\nb') return redis.call('get', KEYS[1])
redis.call('set', KEYS[1], string.char(0, 255, 128)) return redis.call('get', KEYS[1])
redis.call('set', KEYS[1], '9223372036854775807') return redis.call('incrby', KEYS[1], -1)
redis.call('set', KEYS[1], 'x') return redis.call('incr', KEYS[1])
redis.call('set', KEYS[1], 'x') return redis.pcall('incr', KEYS[1])
redis.call('set', KEYS[1], 'x') return {pcall(redis.call, 'incr', KEYS[1])}
redis.call('set', KEYS[1], 'x') local ok, e = pcall(redis.call, 'incr', KEYS[1]) return {tostring(ok), type(e), e}
redis.call('set', KEYS[1], 'x') local r = redis.pcall('incr', KEYS[1]) return {type(r), r.err}
redis.call('set', KEYS[1], 'x') error(redis.pcall('incr', KEYS[1]))
redis.call('set', KEYS[1], 'x') error(redis.pcall('incr', KEYS[1]).err)
return redis.call('mset', KEYS[1], 1, KEYS[2], 2)
redis.call('mset', KEYS[1], 1, KEYS[2], 2) return redis.call('mget', unpack(KEYS))
redis.call('mset', KEYS[1], 1, KEYS[2], 2) return redis.call('del', KEYS[1], KEYS[2])
return redis.call('exists', KEYS[1])
return redis.call('expire', KEYS[1], 100)
redis.call('set', KEYS[1], 'v', 'EX', 100) return redis.call('ttl', KEYS[1])
return redis.call('type', KEYS[1])
redis.call('append', KEYS[1], 'abc') return redis.call('getrange', KEYS[1], 0, 1)
return redis.call('ping')
return redis.call('ping', 'x')
return redis.call('echo', 'x')
return redis.call('dbsize')
return redis.call('select', 0)
return #redis.call('time')
return redis.call('publish', 'channel', 'message')
return redis.call('object', 'encoding', KEYS[1])
return redis.call('bitop', 'or', KEYS[1], KEYS[2])
return redis.call('randomkey')
return redis.call('keys', '*')
return redis.call('flushall')
return redis.call('nosuch')
return redis.call('get')
return redis.call('get', KEYS[1], 'x')
return redis.call()
return redis.call({})
return redis.call('get', {})
return redis.call('get', nil)
return redis.call('get', true)
return redis.call(1)
return redis.call('object', 'nosuch', KEYS[1])
return redis.call('object', 'encoding')
return redis.pcall('nosuch')
return redis.pcall()
return redis.pcall({})
return redis.pcall('nosuch').err
return redis.call('eval', 'return 1', 0)
return redis.call('script', 'flush')
return redis.call('multi')
return redis.call('watch', KEYS[1])
return redis.call('subscribe', 'c')
return redis.call('auth', 'x')
return redis.call('client', 'id')
return redis.call('config', 'get', 'save')
return redis.call('monitor')
return redis.call('quit')
return redis.call('hello', 3)
return redis.call('shutdown')
return redis.call('debug', 'sleep', 0)
return redis.call('wait', 0, 0)
return redis.call('save')
return KEYS
return ARGV
return {KEYS[1], ARGV[2], #KEYS, #ARGV}
KEYS[1] = 'x' return KEYS[1]
return #ARGV[3]
error('text')
error('text', 0)
error('text', 2)
error()
error({err = 'MY error'})
error({err = 'MY error\\r\\n'})
error(12)
return nothing
nothing = 1
local function f() nothing = 1 end f()
redis.x = 1
string.x = 1
KEYS = {}
return string
_G.x = 1
return _G.KEYS[1]
rawset(_G, 'x', 1)
setmetatable(_G, {})
return print
return os
return io
return require
return dofile
return loadfile
return newproxy
return debug
return getfenv
return setfenv
return module
return package
return 1 + nil
return {} .. 'x'
return #nil
return ('x') < 1
local t = nil return t.x
local t = {} return t.x.y
local t = {} t[nil] = 1
return nil()
return ('x'):nosuch()
for i = 1, 'x' do end
return (
return 1 2
x ==
for
return '
goto x
local function f() return 1 + f() end return f()
return pcall(error, 'x')
local ok, e = pcall(error, {err = 'MY error'}) return {tostring(ok), e}
local ok, e = pcall(error, {code = 5}) return e.code
return select(2, xpcall(function() error('x', 0) end, function(e) return 'handled ' .. e end))
return {xpcall(function() return 1 end, error)}
return {pcall(function() return 1, 2 end)}
return tostring(12) .. tostring(nil) .. tostring(true)
return {tonumber('12'), tonumber('0x10'), tonumber('z', 36), tostring(tonumber('x'))}
return type(1) .. type('') .. type({}) .. type(nil) .. type(type)
return {unpack({1, 2, 3}, 2)}
return {unpack({1, 2, 3}, 1, 2)}
return unpack()
return {select('#', 1, nil, 2), select(2, 'a', 'b', 'c')}
return {rawequal('a', 'a'), rawget({a = 1}, 'a')}
local t = setmetatable({}, {__index = function(_, k) return k .. k end}) return t.ab
local t = setmetatable({}, {__call = function(_, x) return x + 1 end}) return t(1)
local t = setmetatable({1}, {__index = function() return 1 end}) return t
return assert(false, 'said')
return assert(nil)
return assert(1, 'x')
return loadstring('return 1 + 1')()
return loadstring('return')
return select(2, load(function() return nil end)) == nil
local n = 0 local f = load(function() n = n + 1 return ({'return ', '5'})[n] end) return f()
return _VERSION
return coroutine.wrap(function(a) local b = coroutine.yield(a + 1) return b end)(1)
local c = coroutine.create(function() error('x', 0) end) return {coroutine.resume(c)}
local c = coroutine.wrap(function() return redis.call('ping') end) return c()
return ('x'):rep(3)
return string.rep('ab', 2)
return string.rep('x', -1)
return string.rep()
return string.rep('x')
return string.rep('x', 'y')
return ('abc'):upper() .. ('DEF'):lower() .. ('abc'):reverse() .. #'abc'
return {string.byte('abc', 1, -1)}
return string.char(104, 105)
return string.format('%5.1f|%d|%s|%q|%x', 3.14159, 42, 'x', 'a"b', 255)
return string.format('%d', 'x')
return string.sub('hello', 2, -2)
return {string.find('hello', 'l')}
return {string.find('hello', 'l+')}
return {string.find('hello', '(l)(l)')}
return {string.find('a.b', '.', 1, true)}
return {string.find('abc', 'b', -1)}
return {string.find('abc', '')}
return {string.find('abc', '', 10)}
return string.find('a')
return string.find(nil, 'x')
return string.match('key=value', '(%w+)=(%w+)')
return {string.match('key=value', '(%w+)=(%w+)')}
return {string.match('  trim  ', '^%s*(.-)%s*$')}
return {string.match('abc', '()b()')}
return string.match('x(a(b)c)y', '%b()')
return string.match('THE (quick) fox', '%f[%a]%a+', 5)
return string.match('abab', '(ab)%1')
return string.match('abc', '[^a-b]')
return string.match('a]b', '[]]')
return string.match('a-b', '[a%-]+')
return string.match('abc', '[')
return string.match('abc', '%')
return string.match('abc', '(')
return string.match('abc', ')')
return string.match('abc', '%1')
return string.match('abc', '%f')
return string.match('abc', '%b')
local t = {} for w in string.gmatch('one two  three', '%a+') do t[#t + 1] = w end return t
local t = {} for k, v in string.gmatch('a=1, b=2', '(%w+)=(%w+)') do t[#t + 1] = k .. v end return t
local t = {} for w in string.gmatch('abc', '') do t[#t + 1] = w .. '.' end return t
return {string.gsub('hello', 'l', 'L')}
return {string.gsub('hello', 'l', 'L', 1)}
return {string.gsub('hello', '', '-')}
return {string.gsub('hello world', '%w+', '%0 %0')}
return {string.gsub('hello world', '(%w+) (%w+)', '%2 %1')}
return {string.gsub('$name is $age', '%$(%w+)', {name = 'x', age = 5})}
return {string.gsub('abc', '%w', function(c) if c == 'b' then return '<' .. c .. '>' end end)}
return {string.gsub('abc', '^a', 'x')}
return {string.gsub('abc', 'b*', 'x')}
return {string.gsub('abc', 'a', '%%')}
return string.gsub('abc', 'a', '%2')
return string.gsub('abc', 'a', function() return {} end)
return string.gsub('abc', 'a')
return string.gsub('abc', 'a', true)
return table.concat({1, 'b', 3}, ', ')
return table.concat({1, {}, 3})
local t = {3, 1, 2} table.sort(t) return t
local t = {3, 1, 2} table.sort(t, function(a, b) return a > b end) return t
local t = {1, 2} table.insert(t, 3) table.insert(t, 1, 0) return t
local t = {1, 2, 3} return {table.remove(t), table.remove(t, 1), #t}
return table.getn({1, 2})
return table.maxn({[5] = 1})
return {math.floor(3.7), math.max(1, 5, 2), math.abs(-3), math.huge > 1, math.fmod(7, 3)}
return tostring(math.pi)
return cjson.encode({1, 2, {a = 1}})
return cjson.encode({})
return cjson.encode('')
return cjson.encode({1.5, 1e20, -0.25, 100, 123456789012})
return cjson.encode({'a\\n\\t"/\\\\\\1\\127é', true, false, cjson.null})
return cjson.encode({[1] = 1, [3] = 3})
return cjson.encode({[1] = 1, [100] = 1})
return cjson.encode({[1.5] = 1})
return cjson.encode({[true] = 1})
return cjson.encode({f = function() end})
return cjson.encode(1/0)
return cjson.encode()
local t = {} t[1] = t return cjson.encode(t)
return cjson.decode('[1, "a", 2.5, null, true, false, [], {}]')
return cjson.decode('{"a": {"b": [1, 2]}}').a.b
return cjson.decode('"\\\\u00e9\\\\ud83d\\\\ude00\\\\n\\\\/"')
return cjson.decode('12')
return cjson.decode('"\\\\b\\\\f\\\\n\\\\r\\\\t\\\\"\\\\\\\\\\\\/"')
return cjson.decode(' [1 , 2 ] ')
return cjson.decode('[1,2')
return cjson.decode('[1 2]')
return cjson.decode('{"a":nul}')
return cjson.decode('{"a" 1}')
return cjson.decode('{1:2}')
return cjson.decode('{"a":1,}')
return cjson.decode('[1,]')
return cjson.decode('[1] 2')
return cjson.decode('')
return cjson.decode()
return cjson.decode({})
return cjson.decode('"abc')
return cjson.decode(string.rep('[', 1001))
return tostring(cjson.decode('[null]')[1] == cjson.null)
return cjson.encode(cjson.decode('{"a":[1,2,{"b":null}]}'))
return {bit.tobit(2^32 + 5), bit.bnot(0), bit.band(255, 15, 7), bit.bor(1, 2, 4), bit.bxor(5, 1)}
return {bit.lshift(1, 31), bit.lshift(1, 33), bit.rshift(-1, 28), bit.arshift(-8, 1), bit.arshift(8, 1)}
return {bit.rol(1, 33), bit.ror(1, 1), bit.rol(0x12345678, 12), bit.bswap(0x12345678), bit.tobit(-1)}
return {bit.tohex(255), bit.tohex(255, 4), bit.tohex(-1, -8), bit.tohex(1, 0)}
return {bit.tobit(1.5), bit.tobit(2.5), bit.tobit(-1.5), bit.band(0xffffffff, -1)}
return bit.band()
return bit.band('a')
return bit.band('7', 3)
return bit.lshift(1)
"""

LINES = [  # what has more lines than one
    "local x = redis.call('nosuch')\nreturn 1",
    "\n\nreturn redis.call('incr', 1, 2)",
    "if true then\n  error('here')\nend",
    "local function f()\n  return redis.call('nosuch')\nend\nreturn 1 + f()",
    "\nreturn (",
    "#!lua\nreturn redis.call('set', KEYS[1], 1)",
    "#!lua flags=no-writes\nreturn redis.call('get', KEYS[1])",
    "#!lua flags=no-writes\nreturn redis.call('set', KEYS[1], 1)",
    "#!lua flags=allow-oom,no-cluster\nreturn 1",
    "#!lua flags=nosuch\nreturn 1",
    "#!js\nreturn 1",
    "#!lua nosuch\nreturn 1",
    "#!lua",
    "if redis.call('get', KEYS[1]) == ARGV[1] then\n    return redis.call('del', KEYS[1])\nelse\n    return 0\nend",
]
SCRIPTS = PLAIN.strip("\n").split("\n") + LINES

COMMANDS = [  # of one connection, in this order
    "EVAL|return 1", "EVAL|return 1|x", "EVAL|return 1|-1", "EVAL|return 1|1", "EVAL|return {KEYS[1], ARGV[1]}|1|a|b", "EVAL",
    "SCRIPT|FLUSH", "EVALSHA|e0e1f9fabfc9d4800c877a703b823ac0578ff8db|0", "EVALSHA|nosuch|0", "SCRIPT|LOAD|return 1",
    "EVALSHA|e0e1f9fabfc9d4800c877a703b823ac0578ff8db|0", "EVALSHA|E0E1F9FABFC9D4800C877A703B823AC0578FF8DB|0",
    "SCRIPT|EXISTS|e0e1f9fabfc9d4800c877a703b823ac0578ff8db|nosuch", "SCRIPT|EXISTS", "SCRIPT|LOAD|return (", "SCRIPT|LOAD",
    "SCRIPT|FLUSH|SYNC", "SCRIPT|EXISTS|e0e1f9fabfc9d4800c877a703b823ac0578ff8db", "SCRIPT|FLUSH|ASYNC", "SCRIPT|FLUSH|NOSUCH",
    "EVAL|return 5|0", "EVALSHA|4ca238f611c9d0ae4e9a75a5dbac22aedc1e44da|0", "SCRIPT|KILL", "SCRIPT|NOSUCH", "SCRIPT",
    "EVAL_RO|return redis.call('get', KEYS[1])|1|k", "EVAL_RO|return redis.call('set', KEYS[1], 1)|1|k",
    "EVAL_RO|return redis.call('publish', 'a', 'b')|0", "EVALSHA_RO|4ca238f611c9d0ae4e9a75a5dbac22aedc1e44da|0", "EVALSHA_RO|nosuch|0",
    "EVAL_RO|#!lua\nreturn 1|0", "EVAL_RO|#!lua flags=no-writes\nreturn 1|0",
    "MULTI", "EVAL|return redis.call('incr', KEYS[1])|1|n", "GET|n", "PUBLISH|c|m", "PING", "SELECT|0",
    "EVAL|return redis.call('nosuch')|0", "EVALSHA|nosuch|0", "EVAL|return 1|x", "SCRIPT|LOAD|return 7", "EXEC",
    "MULTI", "EVAL|return 1", "EXEC", "GET|n",
    "COMMAND|GETKEYS|EVAL|return 1|2|a|b|c", "COMMAND|GETKEYS|EVALSHA|return 1|1|a", "COMMAND|GETKEYS|EVAL|return 1|0",
    "WATCH|n", "EVAL|return redis.call('incr', KEYS[1])|1|n", "MULTI", "GET|n", "EXEC",
]  # fmt: skip


@pytest.fixture
def both():
    """(ours, Redis)"""
    try:
        with servers.redis_server() as theirs, servers.shmcache_server() as ours:
            yield ours[:2], theirs[:2]
    except servers.Missing as e:
        pytest.skip(str(e))


def words_of(line):
    return [word.encode() for word in line.split("|")]


@pytest.mark.parametrize("protocol", [2, 3])
def test_scripts_reply_as_in_redis(both, protocol):
    connections = [Connection(where, 20.0) for where in both]
    different = []
    for connection in connections:
        connection.call(b"HELLO", b"%d" % protocol)
    for script in SCRIPTS:
        for connection in connections:
            connection.call(b"FLUSHALL")
        ours, theirs = (c.call(b"EVAL", script.encode(), b"2", b"{a}1", b"{a}2", b"one", b"", b"\x00\r\n\xff") for c in connections)
        if ours != theirs:
            different.append(f"{script}\n  ours:  {ours!r}\n  redis: {theirs!r}")
    for connection in connections:
        connection.close()
    assert not different, "\n".join(different)


@pytest.mark.parametrize("protocol", [2, 3])
def test_the_commands_reply_as_in_redis(both, protocol):
    connections = [Connection(where, 20.0) for where in both]
    different = []
    for connection in connections:
        connection.call(b"HELLO", b"%d" % protocol)
    for line in COMMANDS:
        ours, theirs = (c.call(*words_of(line)) for c in connections)
        if ours != theirs:
            different.append(f"{line}\n  ours:  {ours!r}\n  redis: {theirs!r}")
    for connection in connections:
        connection.close()
    assert not different, "\n".join(different)


USED = (
    "set K V", "get K", "incr K", "append K V", "del K", "del K K K", "mset K V K V", "msetnx K V K V", "mget K K K", "getset K V", "setnx K V",
    "rename K K", "copy K K", "copy K K replace", "bitop not K K", "bitop or K K K", "strlen K", "exists K K", "expire K 100", "ttl K", "persist K",
    "getdel K", "setrange K 3 V", "type K", "lcs K K len", "incrbyfloat K 1", "bitfield K incrby u8 0 1", "dbsize", "unlink K", "mget MANY", "del MANY",
    "exists MANY", "flushall",
)  # fmt: skip


def used(rng):
    """A script that calls some commands on few keys, and returns what they say."""
    said = ["local r, many = {}, {} for i = 1, 40 do many[i] = 'k' .. i % 8 end"]
    for _ in range(rng.choice((3, 8, 60))):
        words = []
        for word in rng.choice(USED[:-1] if rng.random() < 0.98 else USED[-1:]).split():
            declared = rng.choice(("KEYS[1]", "KEYS[2]"))
            undeclared = f"'k{rng.randrange(8)}'"
            words.append({"K": rng.choice((declared, undeclared, undeclared)), "V": f"'{rng.randrange(300)}'", "MANY": "unpack(many)"}.get(word, f"'{word}'"))
        said.append(f"r[#r + 1] = redis.pcall({', '.join(words)})")
    return "\n".join([*said, "return r"]).encode()


@pytest.mark.parametrize("transaction", [False, True])
def test_scripts_use_keys_as_in_redis_declared_or_not(both, transaction):
    connections = [Connection(where, 20.0) for where in both]
    rng = random.Random(5)
    for number in range(150):
        script, keys = used(rng), (b"k0", b"k%d" % rng.randrange(8))
        replies = []
        for connection in connections:
            if transaction:
                for words in ((b"MULTI",), (b"INCR", b"count"), (b"EVAL", script, b"2", *keys), (b"EVAL", script, b"2", *keys)):
                    connection.call(*words)
            replies.append(connection.call(b"EXEC") if transaction else connection.call(b"EVAL", script, b"2", *keys))
        assert replies[0] == replies[1], (number, script)
        ours, theirs = (connection.call(b"MGET", *(b"k%d" % i for i in range(8))) for connection in connections)
        assert ours == theirs, (number, script)
    for connection in connections:
        connection.close()


def test_there_are_many():
    assert len(SCRIPTS) > 250
    assert len(set(SCRIPTS)) == len(SCRIPTS)
