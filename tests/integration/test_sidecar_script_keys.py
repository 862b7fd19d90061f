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
        return run(reach, caller, words, keys, writes)

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


# ---- what is held, and seen, of the many and the large ------------------------------------------------------------------------------------


def held(cache):
    return int((cache.views().stripes["word"] != 0).sum())


@pytest.fixture
def evaluated(make, name, monkeypatch):
    """(the segment, a function). It runs a script and returns the reply; between: called once, before the script's first STRLEN. Each of its
    commands notes in `ran`: its name, the stripes that are held when it is over; `longest`: the most that were held while one ran."""
    cache = make(size="128M")
    run = undeclared.Reach.run

    def hooked(reach, caller, words, keys, writes):
        if words[0].lower() == b"strlen" and pending:
            pending.pop()()
        try:
            return run(reach, caller, words, keys, writes)
        finally:
            ran.append((words[0].lower(), held(cache)))

    pending, ran = [], []
    monkeypatch.setattr(undeclared.Reach, "run", hooked)
    with in_process(name, {"lua-time-limit": PATIENT, "databases": "4"}) as server:

        def evaluate(script, *keys, arguments=(), between=None, command=b"EVAL"):
            ran.clear()
            pending[:] = [] if between is None else [between]
            said = server.say(server.connect(), encode([command, script.encode(), b"%d" % len(keys), *keys, *arguments]))
            assert pending == []
            assert held(cache) == 0
            return said

        evaluate.ran, evaluate.pending = ran, pending
        evaluate.server = server
        yield cache, evaluate


ONWARDS = "redis.call('strlen', 'w') redis.call('set', 'n', (n or 0) + 1) return n"
WRITTEN = "redis.call('set', 'w', 1) "


@pytest.mark.parametrize(
    "flush",
    ["", "redis.call('flushall')", "redis.call('flushdb')", "redis.pcall('flushall', 'nonsense')", "redis.pcall('flushdb', 'async', 1)"],
)
def test_what_comes_after_a_flush_is_not_lost(evaluated, flush):
    """Nor what came before one that was refused. The script names another key behind it, and so lets go of n."""
    cache, evaluate = evaluated
    cache.set("n", b"10")
    said = evaluate(
        f"local n = redis.call('get', 'n') redis.call('keys', 'x') {WRITTEN} {flush} redis.call('get', 'other') {ONWARDS}", between=lambda: cache.set("n", b"100")
    )
    assert b"the key 'n' was changed by others" in said or b"the key 'n' is busy" in said
    assert cache["n"] == b"100"


@pytest.mark.parametrize("many", [1, 40])
@pytest.mark.parametrize("written", ["", WRITTEN])
@pytest.mark.parametrize("flush", ["flushall", "flushdb"])
def test_what_came_before_a_flush_of_its_own_is_not_lost(evaluated, flush, written, many):
    """It begins again, or fails, and has removed nothing."""
    cache, evaluate = evaluated
    cache.set("n", b"10")
    reads = f"for i = 1, {many} do redis.call('get', 'o' .. i) end redis.call('keys', 'x')"
    script = f"local n = redis.call('get', 'n') {reads} {written} redis.call('strlen', 'x') redis.call('{flush}') return redis.call('set', 'n', n + 1)"
    said = evaluate(script, between=lambda: cache.set("n", b"100"))
    if written:
        assert b"the key 'n' was changed by others" in said
        assert cache["n"] == b"100"
        assert "w" in cache
    else:
        assert cache["n"] == b"101"


def test_a_flush_of_its_own_is_not_anothers_write(evaluated):
    cache, evaluate = evaluated
    other = cache.namespace("db:1")
    cache.set("n", b"10")
    other.set("n", b"20")
    script = "redis.call('copy', 'n', 'n', 'db', 1, 'replace') redis.call('keys', '*') redis.call('flushdb') "
    assert evaluate(script + "return redis.call('incr', 'n')") == b":1\r\n"
    assert other["n"] == b"10"
    cache.set("n", b"10")
    said = evaluate(
        "local n " + script + ONWARDS.replace("return n", "redis.call('copy', 'n', 'n', 'db', 1, 'replace')"),
        between=lambda: other.set("n", b"7"),
    )
    assert b"the key 'n' was changed by others" in said
    assert other["n"] == b"7"


MANY = "local k = {} for i = 1, 40 do k[i] = 'm' .. i end "


@pytest.mark.parametrize(
    "call",
    [
        "'bitop', 'or', 'd', unpack(k)",
        "'msetnx', unpack(k)",
        "'del', unpack(k)",
        "'unlink', unpack(k)",
        "'mset', unpack(k)",
        "'mget', unpack(k)",
    ],
)
def test_the_keys_of_a_large_command_have_been_seen(evaluated, call):
    """It reads or writes over 32; another changes one of them after that."""
    cache, evaluate = evaluated
    pairs = "for i = 80, 1, -1 do k[i] = i % 2 == 1 and 'm' .. (i + 1) / 2 or 'v' end " if "mset" in call else ""
    if "msetnx" not in call:
        for i in range(1, 41):
            cache.set(f"m{i}", b"\1")
    script = f"{MANY} {pairs} {WRITTEN} redis.call({call}) redis.call('strlen', 'other') redis.call('set', 'm1', 'lost')"
    said = evaluate(script, between=lambda: cache.set("m1", b"another's"))
    assert b"the key 'm1' was changed by others" in said
    assert cache["m1"] == b"another's"


JOINED = [  # with 100 keys, of which every second is there
    ("del", b":50\r\n"),
    ("unlink", b":50\r\n"),
    ("exists", b":50\r\n"),
    ("touch", b":50\r\n"),
    ("mget", b"*100\r\n" + b"$1\r\nv\r\n$-1\r\n" * 50),
]


@pytest.mark.parametrize(("word", "reply"), JOINED)
def test_a_command_of_many_keys_holds_few_at_a_time(evaluated, word, reply):
    cache, evaluate = evaluated
    for keys in ((), (b"k1",), (b"none",)):
        for i in range(0, 100, 2):
            cache.set(f"k{i}", b"v")
        assert (
            evaluate("return redis.call(ARGV[1], unpack(ARGV, 2))", *keys, arguments=[word.encode(), *(b"k%d" % i for i in range(100))])
            == reply
        )
        assert max(n for _, n in evaluate.ran) <= undeclared.MOST_KEPT + len(keys)
    assert evaluate("local k = {} for i = 1, 99 do k[i] = 'x' end return redis.pcall('mset', unpack(k)).err").startswith(b"$")
    assert cache.get("x") is None


def test_a_script_that_begins_again_holds_few_keys(evaluated):
    """It has read 3,000, and deletes them all; another has changed one."""
    cache, evaluate = evaluated
    for i in range(3000):
        cache.set(f"p:{i}", b"1")
    script = "for i = 1, #ARGV do redis.call('get', ARGV[i]) end redis.call('strlen', 'x') return redis.call('del', unpack(ARGV))"
    assert evaluate(script, arguments=[b"p:%d" % i for i in range(3000)], between=lambda: cache.set("p:5", b"2")) == b":3000\r\n"
    assert max(n for _, n in evaluate.ran) <= undeclared.MOST_KEPT
    for i in range(1, 200):
        cache.set(f"m{i}", b"1")
    script = "local k = {} for i = 1, 199 do k[i] = 'm' .. i redis.call('get', k[i]) end redis.call('strlen', 'x') return redis.call('bitop', 'or', 'd', unpack(k))"
    assert evaluate(script, between=lambda: cache.set("m5", b"2")) == b":1\r\n"
    assert cache["d"] == b"3"
    assert max(n for _, n in evaluate.ran) <= undeclared.MOST_KEPT


def test_a_step_over_many_keys_waits_for_one_while_it_has_no_other(served):
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    script = "local k = {} for i = 1, 100 do k[i] = 'o' .. i end k[51] = 'b' return redis.call('bitop', 'or', 'd', unpack(k))"
    with busy(cache, b"b") as waited_for:
        thread, got = in_thread(client.eval, script, 0)
        until(waited_for)
        for i in range(1, 101):
            cache.set(f"o{i}", b"1")
        assert got == []
    thread.join(LIMIT)
    assert got == [1]
    assert cache["d"] == b"1"


LARGE = 4 << 20
COMPUTING = [
    "'bitcount', 'a'",
    "'bitpos', 'a', 1",
    "'dump', 'a'",
    "'lcs', 'l', 'm', 'len'",
    "'get', 'a'",
    "'getrange', 'a', 0, -1",
    "'substr', 'a', 0, -1",
    "'mget', 'a', 'b'",
]


@pytest.mark.parametrize("call", COMPUTING)
def test_a_command_that_reads_and_computes_for_long_holds_nothing(evaluated, call, monkeypatch):
    cache, evaluate = evaluated
    cache.set("a", bytes(LARGE))
    cache.set("l", b"ab" * 1000)
    cache.set("m", b"ba" * 1000)
    while_it_ran = []

    def noted(caller, words):
        while_it_ran.append(held(cache))
        calls(caller, words)

    calls = undeclared.call
    monkeypatch.setattr(undeclared, "call", noted)
    key = call.split("'")[3]
    assert not evaluate(f"return redis.call({call})").startswith(b"-")
    assert while_it_ran == [0]
    said = evaluate(
        f"{WRITTEN} redis.call({call}) redis.call('strlen', 'x') return redis.call('set', '{key}', 1)", between=lambda: cache.set(key, b"7")
    )
    assert f"the key '{key}' was changed by others".encode() in said
    assert cache[key] == b"7"
    cache.set("a", b"abc")
    cache.set("l", b"ab")
    while_it_ran.clear()
    script = f"redis.call({call}) return redis.call('set', '{key}', 1)"
    assert evaluate(script) == b"+OK\r\n"
    assert while_it_ran[-1] >= 1  # of small ones it is a step


def test_a_pattern_among_the_keys_is_not_held_while_its_keys_are_gone_through(evaluated):
    cache, evaluate = evaluated
    for walk in (
        "for _, k in ipairs(redis.call('keys', KEYS[1])) do redis.call('del', k) end",
        "local c = '0' repeat local r = redis.call('scan', c, 'match', KEYS[1]) c = r[1] for _, k in ipairs(r[2]) do redis.call('del', k) end until c == '0'",
    ):
        for i in range(100):
            cache.set(f"p:{i}", b"1")
        evaluate(walk, b"p:*")
        assert evaluate.ran[0][1] == evaluate.ran[-1][1] == 0
        assert len(cache) == 0
    for first in ("redis.call('keys', '*')", "redis.call('scan', 0)", "redis.call('get', 'other') redis.call('keys', '*')"):
        count = (
            first
            + " local n = redis.call('get', KEYS[1]) redis.call('keys', '*') redis.call('set', 'w', 1) redis.call('set', KEYS[1], n + 1)"
        )
        cache.set("n", b"1")
        evaluate(count, b"n")
        assert cache["n"] == b"2"
        assert [n for name, n in evaluate.ran if name == b"set"][-1] >= 1  # held from when it was named, to the end
        assert evaluate.ran[-3][1] >= 1


POPS = "local v = redis.call('get', 'n') {} redis.call('strlen', 'x') redis.call('del', 'n') return v"


def test_what_was_read_is_taken_by_one_alone(evaluated):
    """A script deletes what it has read, which another has taken meanwhile: it fails, or begins again and reads that there is nothing."""
    cache, evaluate = evaluated
    for between in (lambda: cache.delete("n"), lambda: cache.set("n", b"2")):
        cache.set("n", b"1")
        assert b"the key 'n' was changed" in evaluate(POPS.format("redis.call('keys', 'x')" + WRITTEN), between=between)
    cache.set("n", b"1")
    assert evaluate(POPS.format("redis.call('keys', 'x')"), between=lambda: cache.delete("n")) == b"$-1\r\n"
    cache.set("n", b"1")
    assert evaluate(POPS.format("redis.call('keys', 'x')"), between=lambda: cache.set("n", b"2")) == b"$1\r\n2\r\n"


@pytest.mark.parametrize("written", ["", WRITTEN])
@pytest.mark.parametrize("n", [40, 20])  # so many of the 40 that it deletes
@pytest.mark.parametrize("word", ["del", "unlink"])
def test_of_what_was_read_all_is_deleted_or_nothing(evaluated, written, n, word):
    cache, evaluate = evaluated
    names = [f"m{i}" for i in range(1, 41)]
    for name in names:
        cache.set(name, b"1")
    script = f"{MANY} local v = redis.call('mget', unpack(k, 1, {n})) redis.call('keys', 'x') {written} redis.call('strlen', 'x') redis.call('{word}', unpack(k)) return v"
    said = evaluate(script, between=lambda: cache.delete("m20"))
    if written:
        assert b"the key 'm20' was changed" in said
        assert [name for name in names if name not in cache] == ["m20"]
    else:
        assert said.count(b"$-1\r\n") == 1
        assert not [name for name in names if name in cache]


def test_keys_whose_names_alone_are_known_may_be_gone(evaluated, monkeypatch):
    """They have expired, were evicted, or others have deleted them: what clears a prefix goes on. Also if it has begun again with them."""
    cache, evaluate = evaluated
    keep = undeclared.Reach.keep

    def busy_at_first(reach, keys, size):
        if (0, b"p:0") in keys and reach.beginnings == 1:
            reach.begin_again(keys)
        keep(reach, keys, size)

    def delete():
        for i in range(40):
            cache.delete(f"p:{i}")

    script = (
        "local n = 0 for _, k in ipairs(redis.call('keys', 'p:*')) do redis.call('strlen', 'x') n = n + redis.call('del', k) end return n"
    )
    for hook, between in ((keep, delete), (busy_at_first, lambda: evaluate.pending.append(delete))):
        monkeypatch.setattr(undeclared.Reach, "keep", hook)
        cache.set("p:0", b"1")
        assert evaluate(script, between=between) == b":0\r\n"
    monkeypatch.setattr(undeclared.Reach, "keep", keep)
    cache.set("p:0", b"1")
    script = f"local k = redis.call('keys', 'p:*') {WRITTEN} redis.call('keys', 'x') redis.call('strlen', 'x') return redis.call('del', unpack(k))"
    assert evaluate(script, between=delete) == b":0\r\n"


def test_a_queue_that_scripts_drain_delivers_once(serve):
    """Consumers read all that there is, and delete it, in one script."""
    service = serve("--workers", "2", "--lua-time-limit", PATIENT)
    drain = "local k = redis.call('keys', 'job:*') if #k == 0 then return {} end local v = redis.call('mget', unpack(k)) redis.call('del', unpack(k)) return v"
    most, got, produced = 4000, [], threading.Event()

    def consume():
        client = service.client(socket_timeout=LIMIT)
        while True:
            last = produced.is_set()
            try:
                found = client.eval(drain, 0)
            except redis.ResponseError as e:
                assert "was changed by others" in str(e) or "is busy" in str(e)
                continue
            got.extend(value for value in found if value)
            if last and not found:
                return

    def produce():
        client = service.client(socket_timeout=LIMIT)
        for i in range(0, most, 100):
            with client.pipeline(transaction=False) as pipeline:
                for j in range(i, i + 100):
                    pipeline.set(f"job:{j}", j)
                pipeline.execute()
        produced.set()

    threads = [threading.Thread(target=consume) for _ in range(3)]
    for thread in threads:
        thread.start()
    produce()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(int(value) for value in got) == list(range(most))


# ---- waiting for other scripts, being ended, room in the log ------------------------------------------------------------------------------


HOLDS_ON = "while #redis.call('keys', 'go') == 0 do end"


def test_other_scripts_of_the_server_are_waited_for(served):
    """They hold a key that nobody else uses: what is said of another's is not that it is busy."""
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    first, ended = in_thread(client.eval, f"redis.call('set', KEYS[1], 1) {HOLDS_ON}", 1, "own")
    until(lambda: cache.get("own"))
    client.config_set("lua-time-limit", "100")
    second, got = in_thread(client.eval, "return redis.call('incr', 'x')", 0)
    error = error_of(client, "redis.log(redis.LOG_WARNING, 'an effect') return redis.call('incr', 'y')")
    assert error.startswith("other scripts of this server hold keys") and "'y'" not in error
    assert got == []
    cache.set("go", b"1")
    first.join(LIMIT)
    second.join(LIMIT)
    assert ended == [None]
    assert got == [1]


@pytest.mark.parametrize("script", ["redis.call('set', 'a', 1) return redis.call('get', 'b')", "redis.call('get', 'a') return redis.call('get', 'b')",
                                    "return redis.call('get', 'b')"])  # fmt: skip
def test_a_script_that_waits_for_a_key_is_killed(served, script):
    client, cache = served
    client.config_set("lua-time-limit", PATIENT)
    with busy(cache, b"b") as waited_for:
        thread, got = in_thread(client.eval, script, 0)
        until(waited_for)
        thread.join(1.5)  # beyond the segment's lock_limit: a script has its own time
        assert got == []
        client.script_kill()
        thread.join(LIMIT)
        assert "SCRIPT KILL" in got[0]


@pytest.fixture
def logged(serve, name, tmp_path):
    """(client, the segment), with the log's policy always."""
    service = serve("--data-dir", str(tmp_path / "data"), "--log", "always", "--lua-time-limit", PATIENT)
    with shmcache.attach(name) as cache:
        yield service.client(socket_timeout=LIMIT), cache


def test_what_only_reads_needs_no_room_in_the_log(logged):
    client, _ = logged
    script = "local k = {} for i = 1, 3000 do k[i] = 'r' .. i redis.call('get', k[i]) end return #redis.call('mget', unpack(k))"
    assert client.eval(script, 0) == 3000
    assert client.eval_ro(script, 0) == 3000
    client.mset({f"r{i}": 1 for i in range(1, 3001)})
    assert client.eval(script.replace("#redis.call('mget'", "redis.call('del'"), 0) == 3000


@pytest.mark.parametrize("policy", ["always", "everysec"])
@pytest.mark.parametrize("read", ["get", "exists"])
@pytest.mark.parametrize("size", [1500, 9000])
def test_what_writes_what_it_has_read_finds_room_in_the_log(serve, name, tmp_path, policy, read, size):
    """Under stripes that it holds it asks for no more: much more than a buffer takes is written by one script."""
    client = serve("--data-dir", str(tmp_path / "data"), "--log", policy, "--lua-time-limit", PATIENT).client(socket_timeout=LIMIT)
    script = f"for i = 1, 400 do redis.call('{read}', 'k' .. i) redis.call('set', 'k' .. i, ARGV[1]) end return 1"
    for _ in range(3):
        assert client.eval(script, 0, "v" * size) == 1
    with shmcache.attach(name) as cache:
        assert int(cache.segment.header["log_gaps"]) == 0
        assert len(cache) == 400


def test_scripts_side_by_side_find_room_in_the_log(logged):
    client, cache = logged
    script = "for i = 1, #ARGV do redis.call('set', 'k' .. i, ARGV[i]) end return #ARGV"
    done, wrong = [], []

    def run():
        for _ in range(20):
            try:
                done.append(client.eval(script, 0, *["v" * 1500] * 30))
            except redis.ResponseError as e:
                wrong.append(str(e))

    with running(*(threading.Thread(target=run) for _ in range(4)), stop=threading.Event()):
        pass
    assert wrong == []
    assert done == [30] * 80
    assert int(cache.segment.header["log_gaps"]) == 0
