"""What scripts have of Lua: patterns, JSON and bits of our own beside the originals; functions that are refused; no Lua at all."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lupa.lua51 import LuaRuntime

from shmcache.core import _resp
from shmcache.sidecar import commands
from shmcache.sidecar.commands import scripting

FOLDER = resources.files("shmcache.sidecar") / "lua"
HELPERS = b"""
    local function fail(text) error(text, 0) end
    local function bad(n, name, text) fail("bad argument #" .. n .. " to '" .. name .. "' (" .. text .. ")") end
    local function typed(value, n, name, wanted, of)
        if not of(value) then bad(n, name, wanted .. " expected, got " .. type(value)) end
        return of(value)
    end
    local function string_of(value, n, name) return typed(value, n, name, "string", function(v) return type(v) ~= "table" and v and tostring(v) end) end
    local function number_of(value, n, name) return typed(value, n, name, "number", tonumber) end
    return fail, bad, string_of, number_of, string.gsub
"""


@pytest.fixture(scope="module")
def lua():
    return LuaRuntime(encoding=None, unpack_returned_tuples=True)


@pytest.fixture(scope="module")
def chunk(lua):
    fail, bad, string_of, number_of, replaced = lua.execute(HELPERS)
    arguments = {"pattern": (fail, string_of, number_of, bad), "cjson": (fail, bad, string_of, replaced), "bit": (number_of,)}
    return lambda name: lua.compile((FOLDER / f"{name}.lua").read_bytes())(*arguments[name])


# ---- patterns ---------------------------------------------------------------------------------------------------------------------------

ITEM = st.one_of(
    st.sampled_from(["a", "b", ".", "%a", "%d", "%s", "%w", "%A", "%%", "%.", "[ab]", "[^a]", "[a-c%d]", "[%w_]", "[^%s]", "[]", "[]ab]", "-", "^", "$", "(", ")", "()", "%1", "%2", "%b()", "%bab", "%f[%w]", "%f[^a]", "%", "[a"]),
    st.sampled_from(["(a)", "(%a*)", "(.-)", "(b?)", "((a)b)"]),
)
PATTERN = st.lists(st.tuples(ITEM, st.sampled_from(["", "", "", "*", "+", "-", "?"])), max_size=5).map(
    lambda items: "".join(item + how for item, how in items).encode()
)
SUBJECT = st.text("aabbc1 ()_.-%", max_size=12).map(str.encode)
BOTH = b"""
    local ours, name, a, b, c, d = ...
    local function said(library)
        if name == "gmatch" then
            local all = {}
            for x, y in library.gmatch(a, b) do all[#all + 1] = tostring(x) .. ":" .. tostring(y) end
            return table.concat(all, ",")
        end
        local found = {library[name](a, b, c, d)}
        for i = 1, #found do found[i] = tostring(found[i]) end
        return table.concat(found, ",")
    end
    local one, first = pcall(said, ours)
    local two, second = pcall(said, string)
    return one, first, two, second
"""


@given(PATTERN, SUBJECT, st.sampled_from(["find", "match", "gmatch", "gsub"]), st.sampled_from([b"<%0>", b"%1", b"", b"%%x"]), st.integers(-4, 14))
@settings(max_examples=400, deadline=None)
def test_patterns_match_as_lua_matches_them(lua, chunk, pattern, subject, name, by, init):
    ours = chunk("pattern")
    third = by if name == "gsub" else init
    good, found, wanted_good, wanted = lua.execute(BOTH, ours, name.encode(), subject, pattern, third, None)
    assert good == wanted_good, (found, wanted)
    if good:
        assert found == wanted
    else:
        assert wanted.endswith(found), (found, wanted)


# ---- JSON -------------------------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-(10**9), 10**9), st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), st.text(max_size=8)),
    lambda inner: st.lists(inner, min_size=1, max_size=4) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, min_size=1, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.sampled_from([None, 1]))
@settings(max_examples=100, deadline=None)
def test_json_comes_back_as_it_was(chunk, value, indent):
    cjson = chunk("cjson")
    text = json.dumps(value, indent=indent, ensure_ascii=indent is None).encode()
    assert json.loads(cjson.encode(cjson.decode(text))) == value


@given(st.text("[]{}:,\"\\ntruefalsn0.1e-+ u", max_size=12))
@settings(max_examples=200, deadline=None)
def test_what_is_not_json_is_an_error(lua, chunk, text):
    good, _ = lua.execute(b"return pcall(...)", chunk("cjson").decode, text.encode())
    try:
        json.loads(text)
    except ValueError:
        return  # numbers like 01 and .5 are read all the same
    assert good


# ---- bits -------------------------------------------------------------------------------------------------------------------------------

WORDS = st.integers(-(1 << 31), (1 << 32) - 1)


def signed(n):
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >> 31 else n


@given(WORDS, WORDS, st.integers(0, 63))
@settings(deadline=None)
def test_bits(chunk, a, b, by):
    bit = chunk("bit")
    n, k = a & 0xFFFFFFFF, by % 32
    assert (bit.band(a, b), bit.bor(a, b), bit.bxor(a, b)) == (signed(a & b), signed(a | b), signed(a ^ b))
    assert (bit.bnot(a), bit.tobit(a), bit.bswap(a)) == (signed(~a), signed(a), signed(int.from_bytes(n.to_bytes(4, "big"), "little")))
    assert (bit.lshift(a, by), bit.rshift(a, by), bit.arshift(a, by)) == (signed(n << k), signed(n >> k), signed(a) >> k)
    assert (bit.rol(a, by), bit.ror(a, by)) == (signed(n << k | n >> (32 - k)), signed(n >> k | n << (32 - k)))
    assert bit.tohex(a) == b"%08x" % n


# ---- functions that are refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("return 1", True),
        ("local function f(a, b, c, ...) return ... end", True),
        ("local function f(a, b, c, d, ...) return ... end", False),
        ("local function f(a, b, c, d, ...) end", False),
        ("local function f(a, b, c, d, e, f) end", True),
        ("local x, y = 'text', 1.5 return function() local z = true return function(a, b, c, d, ...) return x, y, z, ... end end", False),
        ("local x, y = 'text', 1.5 return function() local z = true return function(a, ...) return x, y, z, nil, ... end end", True),
    ],
)
def test_functions_with_many_parameters_and_more(lua, source, good):
    dump = lua.execute(b"return string.dump(loadstring(...))", source.encode())
    assert scripting.sound(dump) == good
    assert scripting.sound(lua.execute(b"return string.dump(loadstring(...), true)", source.encode())) == good


# ---- where commands run ----------------------------------------------------------------------------------------------------------------


def test_what_acts_on_connections_is_called_in_the_loop(make):
    class Calls(_resp.Client):
        def __init__(self, executor, server):
            self.server, self.seen = server, {}

        def call(self, words):
            self.seen[words[0]] = threading.get_ident()

    server = Server(make())
    server.loop = asyncio.new_event_loop()
    thread = threading.Thread(target=server.loop.run_forever)
    thread.start()
    of_the_pool = _resp.Executor(server.cache, commands.table(), impatient=False)
    client = Calls(of_the_pool, server)
    for word in (b"PUBLISH", b"client", b"INFO", b"GET", b"ping", b"INCRBYFLOAT"):
        commands.transactions.call(client, [word])
    server.loop.call_soon_threadsafe(server.loop.stop)
    thread.join()
    server.loop.close()
    here = threading.get_ident()
    assert client.seen == {b"PUBLISH": thread.ident, b"client": thread.ident, b"INFO": thread.ident, b"GET": here, b"ping": here, b"INCRBYFLOAT": here}
    of_the_loop = Calls(server.executor, server)
    commands.transactions.call(of_the_loop, [b"INFO"])
    assert of_the_loop.seen == {b"INFO": here}
    del client, of_the_loop, of_the_pool, server.executor


# ---- without lupa -----------------------------------------------------------------------------------------------------------------------


class Client(_resp.Client):
    def __init__(self, executor, server):
        self.server = server


class Server:
    def __init__(self, cache):
        self.cache = cache
        self.executor = _resp.Executor(cache, commands.table(), impatient=False)
        self.scripts = scripting.Scripts()
        self.local = type("Local", (), {})()


def test_without_lua_it_says_what_to_install(make, monkeypatch):
    server = Server(make())
    monkeypatch.setitem(sys.modules, "lupa.lua51", None)
    client = Client(server.executor, server)
    client.feed(b"EVAL 'return 1' 0\r\nEVALSHA abc 0\r\nPING\r\n")
    assert client.take().split(b"\r\n")[:3] == [
        b'-ERR this server has no Lua: pip install "shmcache[scripts]"',
        b"-NOSCRIPT No matching script. Please use EVAL.",
        b"+PONG",
    ]
    del client, server.executor


def test_scripts_that_are_known_are_bounded():
    scripts = scripting.Scripts()
    assert scripts.learn(b"a") and not scripts.learn(b"a")
    for i in range(scripting.MOST_SCRIPTS):
        scripts.learn(b"%d" % i)
    assert len(scripts.known) == scripting.MOST_SCRIPTS
    assert scripting.sha_of(b"a") not in scripts.known
    big = b"x" * (scripting.MOST_SOURCE - 1)
    scripts.learn(big)
    assert scripts.size <= scripting.MOST_SOURCE and scripting.sha_of(big) in scripts.known
    assert not scripts.learn(b"x" * (scripting.MOST_SOURCE + 1))
    scripts.flush()
    assert scripts.known == {} and scripts.size == 0
