"""Scripts in `shmcache serve`: what they hold, when they end, what they cannot reach, who knows them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

import pytest
import redis

import shmcache
from shmcache.sidecar.commands.scripting import sha_of
from shmcache.sidecar.serve import STOP_LIMIT
from tests.integration.service import LIMIT, running, until
from tests.redis.resp import Connection, encode, parse

INCREMENT = "local n = redis.call('get', KEYS[1]) redis.call('set', KEYS[1], (n or 0) + ARGV[1]) return redis.call('get', KEYS[1])"


def error_of(client, script, *arguments):
    with pytest.raises(redis.ResponseError) as caught:
        client.eval(script, *(arguments or (0,)))
    return str(caught.value)


# ---- what they hold ---------------------------------------------------------------------------------------------------------------------


def test_no_increment_is_lost_among_scripts_transactions_and_workers(serve, name):
    service = serve("--workers", "2")
    wrong, stop = [], threading.Event()

    def counted(use, rounds=150):
        def loop():
            try:
                for _ in range(rounds):
                    use()
            except BaseException as e:
                wrong.append(e)

        return threading.Thread(target=loop)

    def by_script():
        client = service.client()
        return lambda: client.eval(INCREMENT, 1, "n", 1)

    def by_transaction():
        client = service.client()

        def use():
            with client.pipeline() as pipe:
                pipe.ping()
                pipe.eval(INCREMENT, 1, "n", 1)
                pipe.publish("c", "m")
                assert pipe.execute()[0] is True

        return use

    with shmcache.attach(name) as cache:

        def by_worker():
            while True:
                value, version = cache.gets("n")
                if cache.add("n", b"1") if value is None else cache.cas("n", b"%d" % (int(value) + 1), version):
                    return

        threads = [counted(by_script()), counted(by_script()), counted(by_transaction()), counted(by_worker)]
        with running(*threads, stop=stop):
            pass
        assert wrong == []
        assert int(cache["n"]) == 4 * 150
        assert cache.verify() == []


def test_nobody_writes_a_key_between_two_commands_of_a_script(serve, name):
    service = serve()
    client, other = service.client(), service.client()
    script = """
        redis.call('set', KEYS[1], 'mine')
        local s = 0 for i = 1, 300000 do s = s + i end
        return redis.call('get', KEYS[1])
    """
    stop, done = threading.Event(), []
    with shmcache.attach(name) as cache:

        def write():
            while not stop.is_set():
                cache.set("k", b"worker")
                other.set("k", "client")
                done.append(1)

        with running(threading.Thread(target=write), stop=stop):
            until(lambda: done)
            assert {client.eval(script, 1, "k") for _ in range(5)} == {b"mine"}


def test_a_key_that_was_not_declared_is_refused(serve):
    client = serve("--no-scripts-undeclared").client()
    client.set("other", "v")
    for script in ("return redis.call('get', 'other')", "return redis.call('set', 'other', 1)", "return redis.call('mget', KEYS[1], 'other')",
                   "return redis.call('rename', KEYS[1], 'other')", "return redis.call('bitop', 'not', KEYS[1], 'other')",
                   "return redis.call('object', 'encoding', 'other')", "return redis.call('memory', 'usage', 'other')"):  # fmt: skip
        assert error_of(client, script, 1, "k").startswith("Script attempted to access the key 'other', which is not among its KEYS")
    assert client.get("other") == b"v"
    assert "the key 'a  +OK" in error_of(client, "return redis.call('get', 'a\\r\\n+OK\\255')", 1, "k")
    assert client.eval("return redis.pcall('get', 'other').err ~= nil", 1, "k") == 1
    assert client.eval("return redis.call('get', KEYS[2])", 2, "k", "other") == b"v"


def test_in_a_transaction_the_keys_of_its_scripts_are_held_with_the_others(serve):
    client = serve("--no-scripts-undeclared").client()
    with client.pipeline() as pipe:
        pipe.set("a", 1)
        pipe.eval(INCREMENT, 1, "b", 5)
        pipe.eval("return redis.call('get', 'a')", 0)  # held by the transaction, not declared by this script
        pipe.script_load("return 1")
        pipe.get("b")
        first, second, third, sha, fifth = pipe.execute(raise_on_error=False)
    assert (first, second, fifth) == (True, b"5", b"5")
    assert "not among its KEYS" in str(third)
    assert client.evalsha(sha, 0) == 1


# ---- when they end ----------------------------------------------------------------------------------------------------------------------

ENDLESS = [
    "while true do end",
    "while true do pcall(function() while true do end end) end",
    "pcall(function() while true do end end) return 'lived'",
    "return {xpcall(function() while true do end end, function() while true do end end)}",
    "while true do pcall(coroutine.wrap(function() while true do end end)) end",
    "local c = coroutine.create(function() while true do pcall(error) end end) while true do coroutine.resume(c) end",
    "local t = setmetatable({}, {__index = function() while true do end end}) return t.x",
    "error(setmetatable({}, {__tostring = function() while true do end end}))",
    "local t = {} t[1], t[2] = t, t return t",
    "return string.find(string.rep('a', 3000), string.rep('a-', 50) .. 'b')",
    "return string.gsub(string.rep('a', 3000), string.rep('a*', 50) .. 'b', '')",
    "local t = {} for i = 1, 3000 do t[i] = i end table.sort(t, function(a, b) while true do end end)",
    "while true do redis.pcall('ping') end",
    "while true do redis.pcall() end",
    "while true do cjson.encode({1, 2, 3}) end",
    "while true do string.rep('x', 10000000) end",
]


def test_a_script_that_goes_on_and_on_is_ended(serve):
    service = serve()
    client, other = service.client(), service.client()
    client.config_set("lua-time-limit", 200)
    for script in ENDLESS:
        began = time.monotonic()
        assert "longer than 200 ms (lua-time-limit)" in error_of(client, "redis.call('set', KEYS[1], 'written') " + script, 1, "k"), script
        assert time.monotonic() - began < 5, script
        assert other.getset("k", "free") == b"written", script
    assert client.eval("return 'fine'", 0) == b"fine"


def test_of_a_transaction_all_scripts_together_have_the_limit(serve):
    client = serve().client()
    client.config_set("lua-time-limit", 300)
    half = "local t = 0 for i = 1, 1e9 do if i % 1000 == 0 then t = redis.call('time') end end"
    began = time.monotonic()
    with client.pipeline() as pipe:
        for _ in range(20):
            pipe.eval(half, 1, "k")
        replies = pipe.execute(raise_on_error=False)
    assert all("lua-time-limit" in str(reply) for reply in replies)
    assert time.monotonic() - began < 5


def test_script_kill_ends_it_and_the_loop_answers_meanwhile(serve):
    service = serve()
    client, other = service.client(), service.client()
    client.config_set("lua-time-limit", 60_000)
    with pytest.raises(redis.ResponseError, match="NOTBUSY No scripts in execution right now"):
        other.script_kill()
    said = []
    thread = threading.Thread(
        target=lambda: said.append(error_of(client, "redis.call('set', KEYS[1], 1) while true do pcall(error) end", 1, "k"))
    )
    thread.start()

    def killed():
        with contextlib.suppress(redis.ResponseError):
            return other.script_kill()

    until(lambda: other.get("k"))
    assert other.ping()
    until(killed)
    thread.join(LIMIT)
    assert said[0].startswith("Script killed by user with SCRIPT KILL.")
    assert other.getset("k", 2) == b"1"


# ---- what they cannot reach -------------------------------------------------------------------------------------------------------------

NOTHING = [  # each is nil or false, or an error
    "return python", "return os", "return io", "return debug", "return require", "return package", "return dofile", "return loadfile",
    "return newproxy", "return collectgarbage", "return getfenv", "return setfenv", "return module", "return jit", "return gcinfo",
    "return rawget(_G, 'python')", "return redis.debug", "return redis.breakpoint", "return coroutine.running()",
    "return loadstring(string.dump(function() return 1 end))()", "return load(function() return string.dump(function() return 1 end) end)()",
    "return getmetatable('').__index", "getmetatable('').__index = nil", "getmetatable('').__add = function() end",
    "setmetatable(string, {})", "rawset(_G, 'x', 1)", "rawset(string, 'rep', 1)", "string.rep = 1", "_G.tostring = 1", "cjson.encode = 1",
    "return getmetatable(_G).__index", "getmetatable(_G).__index = nil", "return getmetatable(redis).__index",
    "return loadstring('return getfenv')()", "return loadstring('x = 1')()",
    "return unpack({}, -2147483648, 2147483647)", "return unpack({}, 0, 2147483647)", "return unpack({}, 1, 1e308)",
    "return string.rep('x', 2^31)", "return string.rep('x', 1e308)", "return ('x'):rep(1e9)",
    "return string.find(string.rep('a', 100000), string.rep('a?', 100000))",
    "return string.find(string.rep('a', 100000), string.rep('(', 100000))",
    "local function f() return 1 + f() end return f()", "local function f() return pcall(f) end return select(2, pcall(error))  == 1",
    "local function f() return coroutine.wrap(f)() end return f()", "local function f() return (('a'):gsub('a', f)) end return f()",
    "local m = {} local t = setmetatable({}, m) m.__index = function(t, k) return t[k] .. '' end return t.x",
    "local m = {} local t = setmetatable({}, m) m.__tostring = function(t) return tostring(t) .. '' end return tostring(t)",
    "return loadstring('return ' .. string.rep('(', 10000))", "return loadstring('return ' .. string.rep('{', 10000))",
    "return loadstring('return ' .. string.rep('a..', 10000) .. 'a')", "return loadstring(string.rep('x', 1000000))",
    "return loadstring('local function f(a, b, c, d, ...) return ... end return f')",
    "return cjson.decode(string.rep('[', 100000))", "return cjson.decode(string.rep('{\"a\":', 100000))",
]  # fmt: skip


def test_nothing_of_it_can_be_reached_or_broken(serve):
    service = serve()
    client = service.client()
    pids = service.workers()
    for script in NOTHING:
        try:
            assert client.eval(script, 0) in (None, False, [], b""), script
        except redis.ResponseError as e:
            assert not str(e).startswith(("internal error", "the script failed")), (script, e)
    assert client.eval("return {('x'):rep(2), tostring(1), cjson.encode({1}), #redis.sha1hex('')}", 0) == [b"xx", b"1", b"[1]", 40]
    assert service.workers() == pids
    assert "internal error" not in service.said() and "Traceback" not in service.said()


def test_what_a_script_changes_is_gone_when_it_ends(serve):
    client = serve().client()
    for _ in range(20):  # every thread of the pool
        client.eval("table.insert(string, 'mine') KEYS.x = 1 redis.setresp(3) math.randomseed(1)", 0)
        assert client.eval("return {string[1] == nil, KEYS.x == nil, type(redis.call('get', KEYS[1]))}", 1, "k") == [1, 1, b"boolean"]


HUNGRY = [
    "local s = 'x' while true do s = s .. s end",
    "local t = {} for i = 1, 1e9 do t[i] = string.rep('x', 100) .. i end",
    "local t = {} for i = 1, 1e9 do t[i] = {} end",
    "local t = {} pcall(function() for i = 1, 1e9 do t[i] = string.rep('x', 1000) .. i end end) return redis.sha1hex('a') .. error('still there')",
    "local t = {} while true do t[#t + 1] = redis.call('get', KEYS[1]) .. #t end",
    "local t = {} for i = 1, 1e9 do t[i] = {pcall(redis.call, 'get', KEYS[1] .. i)} end",
    "local t = {} for i = 1, 1e9 do t[i] = coroutine.create(function() end) end",
    "local f = {} for i = 1, 1e9 do f[i] = loadstring('return \"' .. string.rep('x', 1000) .. i .. '\"') end",
    "return cjson.encode({string.rep('\\1', 16000000)})",
    "return string.gsub(string.rep('x', 16000000), 'x', string.rep('y', 1000))",
]


def test_its_memory_has_a_limit_and_is_given_back(serve):
    service = serve()
    client = service.client(socket_timeout=LIMIT)
    client.config_set("lua-time-limit", 2000)
    client.set("k", b"v" * 1_000_000)

    def resident():
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    (pid,) = service.workers()
    before = resident()
    for script in HUNGRY:
        with contextlib.suppress(redis.ResponseError):
            client.eval(script, 1, "k")
        assert client.eval("return redis.call('strlen', KEYS[1])", 1, "k") == 1_000_000, script
    assert service.workers() == [pid]
    peak = int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    assert peak - before < 300 << 20
    assert resident() - before < 150 << 20
    assert "not enough memory" in error_of(client, HUNGRY[0])
    assert "internal error" not in service.said() and "Traceback" not in service.said()


def test_a_large_value_is_read_and_returned(serve):
    client = serve().client()
    client.set("k", os.urandom(5_000_000))
    assert client.eval("return redis.call('get', KEYS[1])", 1, "k") == client.get("k")
    value = os.urandom(1_000_000)
    assert client.eval("redis.call('set', KEYS[1], ARGV[1]) return redis.call('get', KEYS[1])", 1, "k", value) == value


# ---- who knows them ---------------------------------------------------------------------------------------------------------------------


def test_all_workers_know_a_script_also_one_that_was_started_again(serve):
    service = serve("--workers", "3")
    client = service.client()
    sha = client.script_load("return 'loaded'")
    client.eval("return 'evaluated'", 0)
    shas = (sha, "7bb8ae04b4cd3d2a2b4f4b2d5fd1b9ea9a8ae5f1", client.eval("return redis.sha1hex(\"return 'evaluated'\")", 0).decode())

    def of_each():
        """What each process says, by its pid."""
        found = {}
        while len(found) < 3:
            with contextlib.closing(redis.Redis(port=service.port, retry=None)) as one, contextlib.suppress(redis.ConnectionError):
                found[one.info("server")["process_id"]] = tuple(one.script_exists(*shas))
        return found

    until(lambda: set(of_each().values()) == {(True, False, True)})
    victim = service.workers()[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len([pid for pid in service.workers() if pid != victim]) == 3)
    until(lambda: set(of_each().values()) == {(True, False, True)})
    assert victim not in of_each()
    service.client().script_flush()
    until(lambda: set(of_each().values()) == {(False, False, False)})


def test_the_oldest_are_forgotten(serve):
    client = serve().client()
    first = client.script_load("return 0")
    for i in range(1000):
        last = client.script_load(f"return {i + 1}")
    assert client.script_exists(first, last) == [False, True]
    assert client.info("memory")["number_of_cached_scripts"] == 1000
    long = client.script_load("--" + "x" * 1_000_000 + "\nreturn 'long'")
    assert client.script_exists(long) == [True]
    assert client.evalsha(long, 0) == b"long"
    assert "at most" in error_of(client, "--" + "x" * 2_000_000)


# ---- with others ------------------------------------------------------------------------------------------------------------------------


def test_publish_from_a_script_reaches_the_subscribers_of_all_workers(serve):
    service = serve("--workers", "2")
    subscribers = [service.client().pubsub() for _ in range(6)]
    for each in subscribers:
        each.subscribe("c")
        assert each.get_message(timeout=LIMIT)["type"] == "subscribe"
    client = service.client()
    until(lambda: client.execute_command("PUBSUB", "NUMSUB", "c") == [b"c", 6])
    assert client.eval("return redis.call('publish', 'c', ARGV[1])", 0, "hello") == 6
    assert [each.get_message(timeout=LIMIT)["data"] for each in subscribers] == [b"hello"] * 6
    for each in subscribers:
        each.close()


def test_messages_do_not_get_into_the_reply_of_what_the_pool_runs(serve):
    """A RESP3 connection that has subscribed is answered by a thread while others publish to it."""
    service = serve()
    busy = "local s = 0 for i = 1, 20000 do s = s + i end return 'done'"
    stop = threading.Event()

    def publish():
        client = service.client()
        while not stop.is_set():
            client.publish("c", "m")

    connection = Connection((service.path, 0), LIMIT)
    connection.call(b"HELLO", b"3")
    connection.call(b"SUBSCRIBE", b"c")
    with running(threading.Thread(target=publish), stop=stop):
        for _ in range(30):
            connection.send(b"".join(encode(w) for w in ([b"MULTI"], *[[b"EVAL", busy.encode(), b"0"]] * 5, [b"EXEC"])))
            while True:
                item = parse(connection.reply())[0]
                if item.kind == b"*":
                    break
                assert item.kind == b">" or item.value in (b"OK", b"QUEUED")
            assert [(each.kind, each.value) for each in item.value] == [(b"$", b"done")] * 5
    connection.close()


def test_commands_that_act_on_the_connection_work_beside_a_script_in_a_transaction(serve):
    service = serve()
    connection = Connection((service.path, 0), LIMIT)
    connection.call(b"HELLO", b"3")
    for words in ([b"MULTI"], [b"EVAL", b"return redis.call('incr', KEYS[1])", b"1", b"n"], [b"CLIENT", b"SETNAME", b"me"], [b"SUBSCRIBE", b"c"],
                  [b"CLIENT", b"GETNAME"], [b"GET", b"n"]):  # fmt: skip
        connection.call(*words)
    item = parse(connection.call(b"EXEC"))[0]
    assert [each.kind for each in item.value] == [b":", b"+", b">", b"$", b"$"]
    assert [each.value for each in item.value if each.kind != b">"] == [b"1", b"OK", b"me", b"1"]
    assert service.client().publish("c", "m") == 1
    assert b"message" in connection.reply()
    connection.close()


def test_monitors_see_the_commands_of_a_script(serve):
    service = serve()
    with service.client().monitor() as monitor:
        lines = monitor.listen()
        service.client().eval("return redis.call('set', KEYS[1], ARGV[1])", 1, "k", "v")
        seen = [next(lines) for _ in range(2)]
        while not seen[-1]["command"].startswith("set "):
            seen.append(next(lines))
    assert seen[-1]["client_type"] == "lua"
    assert seen[-2]["command"].startswith("EVAL")


def test_it_ends_in_good_order_while_scripts_run(serve):
    service = serve()
    client = service.client(retry=None)
    client.config_set("lua-time-limit", 60_000)
    said = []

    def use():
        try:
            said.append(service.client(retry=None).eval("redis.call('set', KEYS[1], 1) while true do redis.call('publish', 'c', 'm') end", 1, "k"))
        except redis.RedisError:
            said.append("ended")

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: client.get("k"))
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < STOP_LIMIT - 2  # nobody had to be killed
    for thread in threads:
        thread.join(LIMIT)
    assert said == ["ended"] * 6
    assert "Traceback" not in service.said()


def test_what_a_script_wrote_is_durable_before_it_is_answered(serve, name, tmp_path):
    service = serve("--data-dir", str(tmp_path / "data"), "--log", "always")
    other = service.client()
    with shmcache.attach(name) as cache:
        supervisor = cache.supervisor()["pid"]
    connection = Connection((service.path, 0), LIMIT)
    os.kill(supervisor, signal.SIGSTOP)
    try:
        connection.send(encode([b"EVAL", b"return redis.call('set', KEYS[1], 'v')", b"1", b"k"]))
        until(lambda: other.get("k") == b"v")
        assert select.select([connection.socket], [], [], 0.5)[0] == []
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert connection.reply() == b"+OK\r\n"
    connection.close()


def test_scripts_that_were_loaded_or_forgotten_are_so_in_every_event_loop(serve):
    service = serve("--workers", "2")
    by_loop: dict[bytes, Connection] = {}
    with contextlib.ExitStack() as stack:
        while len(by_loop) < 2:
            connection = stack.enter_context(contextlib.closing(Connection(("127.0.0.1", service.port), LIMIT)))
            by_loop[connection.call(b"INFO", b"server").split(b"\r\nworker:")[1].split(b"\r\n")[0]] = connection
        one, other = by_loop.values()
        for i in range(40):
            source = b"return %d" % i
            sha = parse(one.call(b"SCRIPT", b"LOAD", source))[0].value
            assert other.call(b"EVALSHA", sha, b"0") == b":%d\r\n" % i, i
            assert one.call(b"SCRIPT", b"FLUSH") == b"+OK\r\n"
            assert other.call(b"SCRIPT", b"EXISTS", sha) == b"*1\r\n:0\r\n", i
            assert other.call(b"SCRIPT", b"LOAD", source).startswith(b"$40")
            assert other.call(b"SCRIPT", b"EXISTS", sha) == one.call(b"SCRIPT", b"EXISTS", sha) == b"*1\r\n:1\r\n", i
            assert other.call(b"EVAL", b"return -%d" % i, b"0") == b":-%d\r\n" % i or i == 0
            assert one.call(b"SCRIPT", b"EXISTS", sha_of(b"return -%d" % i)) == b"*1\r\n:1\r\n", i
