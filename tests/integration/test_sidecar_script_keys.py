"""Keys that a script touches and has not declared: what is held for it, when it begins again, what it is told when it does not get them."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import redis

import shmcache
from shmcache.core import _resp
from shmcache.sidecar import undeclared
from shmcache.sidecar.commands import scripting
from tests.integration.service import LIMIT, running, until
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode
from tests.stress.prefixes import SCRIPTS

PATIENT = "60000"  # ms: longer than any test


@contextlib.contextmanager
def busy(cache, *keys):
    """Somebody who runs has the stripes of these keys. Yields a function: does anybody wait for one of them?"""

    def words():
        return cache.views().stripes["word"].copy()

    executor, before = _resp.Executor(cache, {}, impatient=False), words()
    executor.hold(keys)
    mine = (words() != 0) & (before == 0)
    try:
        yield lambda: bool((words()[mine] >> 63).any())
    finally:
        if executor.holds:
            executor.release()


@contextlib.contextmanager
def in_process(*arguments):
    server = InProcess(*arguments)
    try:
        yield server
    finally:
        server.close()


def are_apart(cache):
    """Has each of the keys that tests make busy a stripe of its own?"""
    executor, seen = _resp.Executor(cache, {}, impatient=False), set()
    for key in (b"a", b"b", b"c", b"d", b"k", b"n"):
        before = cache.views().stripes["word"] != 0
        executor.hold([key])
        seen.add(int(((cache.views().stripes["word"] != 0) & ~before).argmax()))
        executor.release()
    return len(seen) == 6


@pytest.fixture
def service(serve, name):
    while True:
        service = serve()
        with shmcache.attach(name) as cache:
            if are_apart(cache):
                return service
        service.stop()
        shmcache.unlink(name)


@pytest.fixture
def served(service, name):
    """(client, the segment)"""
    with shmcache.attach(name) as cache:
        yield service.client(socket_timeout=LIMIT), cache


def error_of(client, script, *arguments):
    with pytest.raises(redis.ResponseError) as caught:
        client.eval(script, *(arguments or (0,)))
    return str(caught.value)


def in_thread(call, *arguments):
    """(a thread that makes the call, its result or error)."""
    got = []

    def run():
        try:
            got.append(call(*arguments))
        except redis.ResponseError as e:
            got.append(str(e))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


# ---- what they may ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [name for name in SCRIPTS if "del" in name or "unlink" in name])
def test_a_prefix_is_cleared(serve, name, script):
    client = serve("--workers", "2", "--lua-time-limit", PATIENT).client(socket_timeout=LIMIT)
    client.mset({f"p:{i}": "v" for i in range(3000)})
    client.mset({f"q:{i}": "v" for i in range(3000)})
    client.eval(SCRIPTS[script], 0, "p:")
    assert client.keys("p:*") == []
    assert len(client.keys("q:*")) == 3000
    client.eval(SCRIPTS[script], 1, "q:0", "q:")  # with one that is held all the time
    assert client.dbsize() == 0


USES = [  # a script, KEYS, its result
    ("return redis.call('get', 'a')", 0, b"1"),
    ("return redis.call('mget', KEYS[1], 'b', 'none')", 1, [b"1", b"2", None]),
    ("return redis.call('mset', 'c', 3, KEYS[1], 4, 'd', 5)", 1, b"OK"),
    ("return redis.call('msetnx', 'c', 3, 'd', 5)", 0, 1),
    ("return redis.call('msetnx', 'c', 3, KEYS[1], 5)", 1, 0),
    ("return redis.call('del', 'a', 'b', 'none')", 0, 2),
    ("redis.call('rename', KEYS[1], 'c') return redis.call('get', 'c')", 1, b"1"),
    ("redis.call('rename', 'b', KEYS[1]) return redis.call('get', KEYS[1])", 1, b"2"),
    ("redis.call('copy', 'b', 'c') redis.call('copy', 'c', 'b', 'replace') return redis.call('get', 'c')", 0, b"2"),
    ("redis.call('bitop', 'or', 'c', KEYS[1], 'b') return redis.call('get', 'c')", 1, b"3"),
    ("return redis.call('lcs', 'a', 'b', 'len')", 0, 0),
    ("return {redis.call('incr', 'a'), redis.call('incr', 'a'), redis.call('expire', 'a', 100), redis.call('ttl', 'a')}", 0, [2, 3, 1, 100]),
    ("return redis.call('object', 'encoding', 'a')", 0, b"int"),
    ("redis.call('restore', 'c', 0, redis.call('dump', 'a')) return redis.call('get', 'c')", 0, b"1"),
    ("redis.call('set', 'c', 1) redis.call('set', 'd', 2) redis.call('getdel', 'c') return redis.call('exists', 'c', 'd')", 0, 1),
    ("redis.call('set', '', 7) return redis.call('get', '')", 0, b"7"),
    ("redis.call('set', 'c', 1) redis.call('flushall') redis.call('set', 'd', 2) return {redis.call('exists', 'c', 'd'), redis.call('dbsize')}", 0, [1, 1]),
    ("redis.call('get', 'a') redis.call('flushall') return redis.call('incr', 'a')", 0, 1),
    ("for i = 1, 100 do redis.call('incr', 'n' .. i % 50) end return redis.call('mget', 'n0', 'n49')", 0, [b"2", b"2"]),
    ("for i = 1, 100 do redis.call('incr', 'n' .. i % 50) end return redis.call('mget', 'n0', 'n49')", 1, [b"2", b"2"]),
    ("local k = {} for i = 1, 100 do k[i] = 'n' .. i redis.call('set', k[i], i) end return #redis.call('mget', unpack(k))", 0, 100),
    ("local k = {} for i = 1, 100 do k[i] = 'n' .. i end redis.call('mget', unpack(k)) k[101] = 'a' return redis.call('del', unpack(k))", 0, 1),
    ("return redis.pcall('get', string.rep('k', 5000))", 0, None),
    ("return redis.pcall('set', string.rep('k', 5000), 1).err ~= nil", 0, 1),
]  # fmt: skip


@pytest.mark.parametrize(("script", "n", "result"), USES)
def test_each_command_takes_keys_that_are_not_declared(name, make, script, n, result):
    cache = make()
    with in_process(name) as server:
        server.say(server.connect(), encode([b"MSET", b"a", b"1", b"b", b"2"]))
        said = server.say(server.connect(), encode([b"EVAL", script.encode(), b"%d" % n, *([b"a"] * n)]))
        assert said == reply_of(result)
        assert not cache.views().stripes["word"].any()  # nothing is held


def reply_of(value):
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(reply_of, value))
    return b":%d\r\n" % value if isinstance(value, int) else b"+OK\r\n" if value == b"OK" else b"$%d\r\n%b\r\n" % (len(value), value)


def test_other_databases(serve):
    service = serve("--databases", "4")
    client, first = service.client(db=2), service.client()
    first.set("a", "of 0")
    client.set("a", "of 2")
    assert client.eval("redis.call('set', 'b', redis.call('get', 'a')) return redis.call('get', 'b')", 0) == b"of 2"
    assert first.keys() == [b"a"]
    assert client.eval(
        "return {redis.call('copy', 'a', 'a', 'db', 3), redis.call('get', 'a'), redis.call('copy', 'a', KEYS[1], 'db', 1)}", 1, "k"
    ) == [1, b"of 2", 1]
    assert service.client(db=3).get("a") == b"of 2" == service.client(db=1).get("k")
    assert client.eval("redis.call('get', 'a') redis.call('flushdb') redis.call('set', 'c', 1) return redis.call('keys', '*')", 0) == [b"c"]
    assert first.get("a") == b"of 0"


def test_a_user_touches_allowed_keys_alone(serve):
    service = serve()
    admin = service.client()
    admin.mset({"mine:a": 1, "other": 2})
    admin.execute_command("ACL", "SETUSER", "alice", "on", ">secret", "~mine:*", "+@all")
    client = service.client(username="alice", password="secret")
    assert client.eval("return redis.call('incr', 'mine:a')", 0) == 2
    for script in (
        "return redis.call('get', 'other')",
        "return redis.call('set', 'other', 1)",
        "return redis.call('mget', KEYS[1], 'other')",
    ):
        assert "can't access at least one of the keys" in error_of(client, script, 1, "mine:a")
    assert admin.get("other") == b"2"


def test_a_script_that_only_reads(served):
    client, _ = served
    client.mset({f"k{i}": i for i in range(200)})
    assert client.eval_ro("local n = 0 for i = 0, 199 do n = n + redis.call('get', 'k' .. i) end return n", 0) == 19900
    with pytest.raises(redis.ResponseError, match="Write commands are not allowed from read-only scripts"):
        client.eval_ro("return redis.call('del', 'k1')", 0)


def test_who_watches_a_key_finds_it_changed(served):
    client, _ = served
    client.set("k", 1)
    with client.pipeline() as pipe:
        pipe.watch("k")
        client.eval("return redis.call('incr', 'k')", 0)
        pipe.multi()
        pipe.get("k")
        with pytest.raises(redis.WatchError):
            pipe.execute()


def test_it_is_switched_off(serve):
    service = serve("--no-scripts-undeclared", "--databases", "2")
    client = service.client(socket_timeout=LIMIT)
    assert client.config_get("scripts-undeclared") == {"scripts-undeclared": "no"}
    client.set("other", "v")
    for script in ("return redis.call('get', 'other')", "return redis.call('mget', KEYS[1], 'other')"):
        assert "the key 'other', which is not among its KEYS: name it there" in error_of(client, script, 1, "k")
    client.set("k", 1)
    assert client.eval("return redis.call('copy', KEYS[1], KEYS[1], 'db', 1)", 1, "k") == 1


def test_in_front_of_a_store_its_keys_are_declared(serve, tmp_path):
    """What is not declared would have to be loaded."""
    client = serve("--store", f"sqlite:///{tmp_path}/rows.db", "--policy", "back").client(socket_timeout=LIMIT)
    client.set("k", "v")
    for evaluate in (client.eval, client.eval_ro):
        assert evaluate("return redis.call('get', KEYS[1])", 1, "k") == b"v"
        with pytest.raises(redis.ResponseError, match="the key 'k', which is not among its KEYS"):
            evaluate("return redis.call('get', 'k')", 0)


# ---- beginning again --------------------------------------------------------------------------------------------------------------------


def test_a_script_that_finds_a_key_busy_begins_again_with_it(served):
    """And holds nothing while it waits, whichever stripe is the first."""
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    for first, second in ("ab", "ba", "cd", "dc"):
        script = f"local a = redis.call('get', '{first}') return {{a, redis.call('get', '{second}')}}"
        client.mset({first: 1, second: 2})
        with busy(cache, second.encode()) as waited_for:
            thread, got = in_thread(client.eval, script, 0)
            until(waited_for)
            assert cache.set(first, b"3") is None
            assert got == []
        thread.join(LIMIT)
        assert got == [[b"3", b"2"]]
    client.config_set("lua-time-limit", "300")
    with busy(cache, b"b"):
        assert "the key 'b' is busy" in error_of(client, "redis.call('get', 'a') return redis.call('get', 'b')")


def test_it_begins_again_as_if_it_never_had(make, name, monkeypatch):
    """Its globals, numbers, protocol are those of a first run; what it tells monitors is told once."""
    make()
    run, beginnings, drawn = undeclared.Reach.run, [], []

    def begun_again(reach, caller, words, keys, writes):
        if (0, b"k") in keys:
            beginnings.append(reach.beginnings)
            reach.begin_again(keys)
        run(reach, caller, words, keys, writes)

    def noted(runtime, what, words):
        if words[:1] == (b"echo",) and words[1] != b"0":
            drawn.append(words[1])
        return answer(runtime, what, words)

    answer = scripting.Runtime.answer
    monkeypatch.setattr(undeclared.Reach, "run", begun_again)
    monkeypatch.setattr(scripting.Runtime, "answer", noted)
    script = b"""
        local before = {string[1] == nil, KEYS.x == nil, ARGV[1], type(redis.call('get', 'none'))}
        table.insert(string, 'mine') KEYS.x = 1 redis.setresp(3)
        redis.call('echo', math.random())
        pcall(redis.call, 'get', 'k')
        return before
    """
    with in_process(name) as server:
        client, monitor = server.connect(), server.connect()
        server.say(monitor, encode([b"MONITOR"]))
        said = server.say(client, encode([b"EVAL", script, b"0", b"argument"]))
        shown = b"".join(monitor.transport.written)
    assert said == b"*4\r\n:1\r\n:1\r\n$8\r\nargument\r\n$7\r\nboolean\r\n"
    assert beginnings == list(range(1, undeclared.MOST_BEGINNINGS + 1))
    assert len(drawn) == undeclared.MOST_BEGINNINGS
    assert len(set(drawn)) == 1
    assert shown.count(b'"echo"') == 1


EFFECTS = ["redis.call('set', KEYS[1], 'written')", "redis.call('publish', 'c', 'm')", "redis.log(redis.LOG_WARNING, 'said')"]


@pytest.mark.parametrize("effect", EFFECTS)
def test_after_an_effect_a_busy_key_is_an_error_that_names_it(service, name, effect):
    client = service.client(socket_timeout=LIMIT)
    with client.pubsub() as listener, shmcache.attach(name) as cache:
        listener.subscribe("c")
        assert listener.get_message(timeout=LIMIT)["type"] == "subscribe"
        with busy(cache, b"b"):
            began = time.monotonic()
            error = error_of(client, effect + " return redis.call('incr', 'b')", 1, "k")
            assert time.monotonic() - began < 5
            assert error.startswith("the key 'b' is busy") and "KEYS" in error  # redis-py takes TRYAGAIN off
        client.eval("return redis.call('incr', 'b')", 0)
        if "set" in effect:
            assert client.get("k") == b"written"
        elif "publish" in effect:
            client.publish("c", "the last")
            assert [listener.get_message(timeout=LIMIT)["data"] for _ in range(2)] == [b"m", b"the last"]
        else:
            client.eval("redis.log(redis.LOG_WARNING, 'the last')", 0)
            until(lambda: "the last" in service.said())
            assert service.said().count("a script says: said") == 1


def test_a_script_that_holds_nothing_waits_for_a_key(served):
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    with busy(cache, b"b") as waited_for:
        thread, got = in_thread(client.eval, "redis.call('set', 'a', 1) return redis.call('incr', 'b')", 0)
        until(waited_for)
        assert cache.set("a", b"3") is None  # nor does it hold what it has written
    thread.join(LIMIT)
    assert got == [1]
    client.config_set("lua-time-limit", "300")
    with busy(cache, b"b"):
        assert "the key 'b' is busy" in error_of(client, "redis.call('set', 'a', 1) return redis.call('incr', 'b')")


def test_in_a_transaction_a_key_is_only_tried(served):
    client, cache = served
    client.set("b", 1)
    script = "return redis.call('get', KEYS[1]) .. redis.call('incr', 'b')"

    def transact():
        with client.pipeline() as pipe:
            pipe.set("k", "v")
            pipe.eval(script, 1, "k")
            pipe.eval("return redis.call('incr', 'c')", 0)
            pipe.incr("n")
            return pipe.execute(raise_on_error=False)

    assert transact() == [True, b"v2", 1, 1]
    with busy(cache, b"b"):
        first, second, third, fourth = transact()
        assert (first, third, fourth) == (True, 2, 2)
        assert "the key 'b' is busy" in str(second)
    with busy(cache, b"b", b"c", b"k", b"n"):  # it has let go of all
        pass
    with client.pipeline() as pipe:  # without a key of its own
        pipe.eval("return redis.call('incr', 'c')", 0)
        pipe.eval("for i = 1, 100 do redis.call('set', 'n' .. i, i) end return redis.call('get', 'n7')", 0)
        assert pipe.execute() == [3, b"7"]
    with busy(cache, b"c"):
        pass


def test_over_all_its_beginnings_a_script_has_one_time_limit(make, name, monkeypatch):
    make()
    monkeypatch.setattr(undeclared, "MOST_BEGINNINGS", 1_000_000)
    monkeypatch.setattr(undeclared.Reach, "run", lambda reach, caller, words, keys, writes: reach.begin_again(keys))
    with in_process(name, {"lua-time-limit": "300"}) as server:
        began = time.monotonic()
        assert b"lua-time-limit" in server.say(server.connect(), encode([b"EVAL", b"return redis.call('get', 'k')", b"0"]))
        assert time.monotonic() - began < 3


# ---- with others ------------------------------------------------------------------------------------------------------------------------


def test_workers_do_not_wait_for_a_script_that_goes_on(served):
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    for script in ("redis.call('set', 'k', 1) while true do end", "redis.call('get', 'k') while true do end",
                   "redis.call('set', 'k', 1) while true do redis.call('get', 'other') end",
                   "for i = 1, 40 do redis.call('get', 'k' .. i) end redis.call('get', 'k') while true do end"):  # fmt: skip
        cache.delete("begun")
        thread, got = in_thread(client.eval, "redis.call('set', 'begun', 1) " + script, 0)
        until(lambda: cache.get("begun"))
        for _ in range(200):
            cache.set("k", b"mine")
        assert got == []
        client.script_kill()
        thread.join(LIMIT)
        assert "SCRIPT KILL" in got[0]


COUNT = "local n = redis.call('get', ARGV[1]) or 0 {} redis.call('set', ARGV[1], n + 1) return n"
COUNTS = [
    "redis.call('incr', ARGV[1])",
    COUNT.format(""),
    COUNT.format("for i = 1, 40 do redis.call('get', 'other' .. i) end"),
    COUNT.format("redis.call('keys', '*')"),
    COUNT.format("redis.call('set', KEYS[1], 1)"),
    "redis.call('set', 'other', 1) for i = 1, 40 do redis.call('incr', 'more' .. i) end " + COUNT.format(""),
    "for i = 1, 40 do redis.call('get', 'other' .. i) end " + COUNT.format("redis.call('get', 'more')"),
]


def test_no_increment_is_lost_whatever_the_script_does_in_between(serve, name):
    service = serve("--workers", "2", "--lua-time-limit", PATIENT)
    done, wrong, stop = [], [], threading.Event()

    def by_script(number):
        client = service.client(socket_timeout=LIMIT)
        for i in range(80):
            script = COUNTS[(number + i) % len(COUNTS)]
            try:
                client.eval(script, 1, f"k{number}", "n")
                done.append(script)
            except redis.ResponseError as e:  # after a write
                if not str(e).startswith(("the key 'n' was changed", "the key 'n' is busy", "the key 'more", "the key 'other")):
                    wrong.append(e)

    def by_transaction():
        client = service.client(socket_timeout=LIMIT)
        for _ in range(100):
            with client.pipeline() as pipe:
                pipe.incr("n")
                pipe.eval("return redis.call('incr', ARGV[1])", 0, "m")
                done.append(pipe.execute()[0])

    with shmcache.attach(name) as cache:

        def by_worker():
            for _ in range(200):
                while True:
                    value, version = cache.gets("n")
                    if cache.add("n", b"1") if value is None else cache.cas("n", b"%d" % (int(value) + 1), version):
                        break
                done.append(version)

        threads = [threading.Thread(target=by_script, args=(i,)) for i in range(3)] + [
            threading.Thread(target=by_worker),
            threading.Thread(target=by_transaction),
        ]
        with running(*threads, stop=stop):
            pass
        assert wrong == []
        assert len(done) >= 300 + 80
        assert int(cache["n"]) == len(done)
        assert cache.verify() == []


def test_a_key_that_others_change_in_between_is_an_error_that_names_it(served):
    """Where it cannot begin again. It is read, and let go of for 40 others; nothing is lost."""
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    script = (
        "local n = redis.call('get', 'n') for i = 1, 40 do redis.call('set', 'k' .. i, i) end "
        "while #redis.call('keys', 'go') == 0 do end redis.call('set', 'n', n + 1) return n"
    )
    cache.set("n", b"1")
    thread, got = in_thread(client.eval, script, 0)
    until(lambda: cache.get("k40"))
    cache.set("n", b"7")
    cache.set("go", b"1")
    thread.join(LIMIT)
    assert "the key 'n' was changed by others" in got[0]
    assert cache["n"] == b"7"
    cache.delete("go")
    hits = cache.stats()["hits"]
    thread, got = in_thread(client.eval, script.replace("'set', 'k' .. i, i", "'get', 'k' .. i"), 0)  # nothing written: it begins again
    until(lambda: cache.stats()["hits"] >= hits + 41)
    cache.set("n", b"8")
    cache.set("go", b"1")
    thread.join(LIMIT)
    assert got == [b"8"]
    assert cache["n"] == b"9"


def test_two_scripts_that_name_two_keys_crosswise(serve):
    service = serve("--workers", "2")
    stop, wrong, done = threading.Event(), [], []

    def use(keys):
        client = service.client(socket_timeout=LIMIT)
        for _ in range(200):
            try:
                done.append(
                    client.eval("redis.call('get', ARGV[1]) redis.call('get', ARGV[2]) return redis.call('incr', ARGV[1])", 0, *keys)
                )
            except redis.ResponseError as e:
                wrong.append(str(e))

    with running(*(threading.Thread(target=use, args=(keys,)) for keys in (("a", "b"), ("b", "a")) * 2), stop=stop):
        pass
    assert wrong == []
    assert len(done) == 800
