"""Memoized functions: none is given another's results, and a call has one key, in whatever process it is made."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import itertools
import math
import os
import subprocess
import sys
import threading
import typing
import warnings
import weakref

import pytest

import shmcache
from shmcache import errors, memoize
from tests.integration.test_policy import Hooked


def keys(functions, *args):
    return [f.cache_key(*args) for f in functions]


def apart(functions, *args):
    """Has each a key of its own, for the same arguments?"""
    return len(set(keys(functions, *args))) == len(functions)


def test_two_lambdas(cache):
    add, double = cache.memoize()(lambda x: x + 1), cache.memoize()(lambda x: x * 2)
    assert [add(5), double(5), add(5), double(5)] == [6, 10, 6, 10]


def test_closures_of_one_function(cache):
    def adder(n):
        @cache.memoize()
        def add(x):
            return x + n

        return add

    assert [adder(n)(1) for n in (1, 2, 1, 2)] == [2, 3, 2, 3]
    assert adder(1).cache_key(1) == adder(1).cache_key(1)
    by_default = [cache.memoize()(lambda x, i=i: x + i) for i in range(3)]
    assert [f(0) for f in by_default] == [0, 1, 2]
    sharing = [cache.memoize()(lambda x: x + i) for i in range(3)]  # noqa: B023
    assert [f(0) for f in sharing] == [2, 2, 2]


def test_functions_that_differ_by_an_attribute(cache):
    def times(n):
        @cache.memoize()
        def multiplied(x):
            return x * multiplied.n

        multiplied.n = n
        return multiplied

    assert [times(n)(3) for n in (1, 2, 1, 2)] == [3, 6, 3, 6]


def test_a_function_of_singledispatch(cache):
    def made(*kinds):
        @functools.singledispatch
        def of(x):
            return "any"

        memoized = cache.memoize()(of)
        for kind in kinds:
            memoized.register(kind, lambda x: kind.__name__)  # noqa: B023
        return memoized

    assert [made(int)(1), made(str)(1), made(int)(1), made(int)("a"), made(str)("a")] == ["int", "any", "int", "any", "str"]
    late = made(list)
    assert late(2.5) == "any"
    late.register(float, lambda x: "float")  # behind its first call
    assert [late(2.5), made(list)(2.5), late(2.5)] == ["float", "any", "float"]


def holding(value):
    return lambda x: value


class Dispatching:
    @functools.singledispatchmethod
    def of(self, x):
        return "any"


@pytest.mark.parametrize("around", [
    lambda of: functools.partial(of), lambda of: lambda x: of(x), lambda of: lambda x, f=of: f(x), lambda of: functools.lru_cache(lambda x: of(x)),
    lambda of: holding({"of": [{(of,)}]}), lambda of: holding(of.dispatch), lambda of: lambda x, dispatch=of.dispatch: dispatch(type(x))(x),
])  # fmt: skip
def test_what_is_registered_with_a_function_that_another_has(cache, around):
    of = functools.singledispatch(lambda x: "any")
    memoized = cache.memoize()(around(of))
    before = memoized.cache_key(2.5)
    assert memoized.cache_key(2.5) == before
    of.register(float, lambda x: "float")
    assert memoized.cache_key(2.5) != before
    assert memoized.cache_key(2.5) == memoized.cache_key(2.5) == cache.memoize()(around(of)).cache_key(2.5)


def test_what_is_registered_with_a_method(cache):
    memoized = cache.memoize()(Dispatching().of)
    assert memoized(2.5) == "any"
    assert Dispatching().of(1) == "any"  # which it keeps in a cache of its own
    assert memoized.cache_key(2.5) == cache.memoize()(Dispatching().of).cache_key(2.5)
    Dispatching.of.register(float, lambda self, x: "float")
    assert memoized(2.5) == "float"


def test_registering_while_another_thread_calls(cache, monkeypatch):
    identify, entered, go = memoize.identified, threading.Event(), threading.Event()

    def slow(function, called):
        made = identify(function, called)
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert go.wait(60)
        return made

    monkeypatch.setattr(memoize, "identified", slow)

    @cache.memoize()
    @functools.singledispatch
    def of(x):
        return "any"

    of.register(int, lambda x: "int")
    thread = threading.Thread(target=of, args=(2.5,))
    thread.start()
    assert entered.wait(60)
    before = of.cache_key(2.5)
    of.register(float, lambda x: "float")
    after = of.cache_key(2.5)
    go.set()
    thread.join()
    assert before != after == of.cache_key(2.5)


def test_closures_whose_variable_comes_later(cache):
    def adder(n):
        @cache.memoize()
        def add(x):
            return x + later

        later = n
        return add

    assert [adder(n)(1) for n in (1, 2, 1, 2)] == [2, 3, 2, 3]


def among(function):
    functions = {function}
    return lambda x: next(iter(functions))(x)


def test_a_decorator_that_only_calls_what_it_wraps_by_its_attribute(cache):
    def shouting(f):
        @functools.wraps(f)
        def inner(x):
            return inner.__wrapped__(x).upper()

        return inner

    def made(text):
        return lambda x: text + x

    for around in (shouting, lambda f: shouting(cache.memoize()(f)), lambda f: shouting(functools.lru_cache(f))):
        memoized = [cache.memoize()(around(made(text))) for text in "aba"]
        assert [f("c") for f in memoized] == ["AC", "BC", "AC"]
        assert memoized[0].cache_key("c") == memoized[2].cache_key("c")


def test_a_decorator_that_reads_annotations(cache):
    class Local(str):
        pass

    def converting(f):
        def inner(x):
            return f.__annotations__["x"](x)

        return inner

    def made(kind, result=None):
        def f(x):
            return x

        f.__annotations__ = {"x": kind, "return": result}
        return cache.memoize()(converting(f))

    assert [made(kind)("1") for kind in (int, str, float, int)] == [1, "1", 1.0, 1]
    assert made(int, Local)("2") == 2
    assert made(str, Local)("2") == "2"
    assert made(int, Local).cache_key("2") == made(int, Local).cache_key("2")
    local = lambda x: x  # noqa: E731
    local.__annotations__ = {"x": Local}
    assert cache.memoize()(functools.lru_cache(local))("2") == "2"


def annotated(n, **annotations):
    function = eval(f"lambda x: x + {n}")
    function.__annotations__ = annotations
    return function


def of_itself(n, kind):
    function = annotated(n)
    function.__annotations__ = {"x": typing.Annotated[kind, function], "y": [{"of": function}], "z": {function}}
    return function


def of_each_other(n, kind):
    functions = [annotated(i) for i in (n, 7, 8)]
    for function in functions:
        function.__annotations__ = {str(i): [kind, other] for i, other in enumerate(functions)}
    return functions[0]


def endless(n, kind):
    loop = {"kind": kind}
    loop["loop"] = loop
    return annotated(n, x=kind, y=loop, z=[functools.reduce(lambda inner, _: [inner], range(5000), [])])


def of_other_names(n, kind):
    function = annotated(n, x=kind)
    function.__annotations__ |= {1: int, None: str, (1, "a"): kind, threading.Lock: kind}
    return function


@pytest.mark.parametrize("form", [of_itself, of_each_other, endless, of_other_names])
def test_annotations_of_any_form(cache, form):
    made = [cache.memoize()(form(n, kind)) for n in (1, 2) for kind in (int, str)]
    assert [f(10) for f in made] == [11, 11, 12, 12]
    assert apart(made, 10)
    assert made[0].cache_key(10) == cache.memoize()(form(1, int)).cache_key(10)

    def deeper(n):
        return cache.memoize()(form(1, int)) if n == 0 else deeper(n - 1)

    assert deeper(300).cache_key(10) == made[0].cache_key(10)


def test_functions_in_a_closure_whose_variable_comes_later(cache):
    def made(n, around):
        def inner(x):
            return x + later

        memoized = cache.memoize()(around(inner))
        later = n
        return memoized

    for around in (functools.singledispatch, functools.partial, lambda f: lambda x: f(x), among):
        assert [made(n, around)(1) for n in (1, 2, 1, 2)] == [2, 3, 2, 3]
        cache.clear()


def test_closures_over_functions(cache):
    def twice(f):
        return cache.memoize()(lambda x: f(f(x)))

    def wrapped(f):
        @functools.wraps(f)
        def inner(x):
            return -f(x)

        return inner

    def one(x):
        return x + 1

    def two(x):
        return x * 2

    assert [twice(one)(5), twice(two)(5)] == [7, 20]
    assert [cache.memoize()(wrapped(f))(5) for f in (one, two)] == [-6, -10]
    assert [twice(cache.memoize()(f))(5) for f in (one, two)] == [7, 20]
    assert [twice(functools.partial(int.__add__, n))(5) for n in (1, 2)] == [7, 9]


def test_a_decorator_above_memoize_is_another_function(cache):
    def negative(f):
        return functools.wraps(f)(lambda x: -f(x))

    def twice(f):
        return cache.memoize()(lambda x: f(x))

    memoized = cache.memoize()(lambda x: x)
    assert vars(negative(memoized)).keys() >= vars(memoized).keys()
    assert [twice(memoized)(5), twice(negative(memoized))(5)] == [5, -5]


def test_a_function_that_calls_itself(cache):
    def made(first):
        @cache.memoize()
        def fibonacci(n):
            return fibonacci(n - 1) + fibonacci(n - 2) if n > 1 else first + n

        return fibonacci

    assert [made(n)(30) for n in (0, 1, 0)] == [832040, 2178309, 832040]


def test_a_function_that_is_defined_again(cache):
    source = "def f(x):\n    return x + {n}\n"
    made = []
    for n in (1, 2):
        found = {"__name__": "notebook"}
        exec(source.format(n=n), found)
        made.append(cache.memoize()(found["f"]))
    assert [f(1) for f in made] == [2, 3]


PROGRAM = """
import sys
import shmcache
cache = shmcache.attach(sys.argv[1])

class Kind:
    pass

def helper():
    pass

@cache.memoize()
def f(x):
    return "{result}"

def closure(over):
    return cache.memoize()(lambda x: over)

@cache.memoize()
def counted(*args, **kwargs):
    return cache.incr("calls", default=0)

if __name__ == "__main__":
    print(f(1), *[key.hex() for key in (f.cache_key(1), closure(helper).cache_key(1), f.cache_key(Kind))], sep=",")
"""


def output(*command, **environment):
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_main_of_two_programs(cache, tmp_path):
    printed = []
    for program, result in (("one", "of one"), ("two", "of two"), ("again", "of one")):
        path = tmp_path / f"{program}.py"
        path.write_text(PROGRAM.format(result=result))
        printed += output(path, cache.name, PYTHONHASHSEED="1")
        assert output(path, cache.name, PYTHONHASHSEED="2") == printed[-1:]
    results, of_f, of_closure, of_class = zip(*(line.split(",") for line in printed), strict=True)
    assert results == ("of one", "of two", "of one")
    for same in (of_f, of_closure, of_class):
        assert len(set(same)) == 3


def test_a_program_finds_its_results_again(cache, tmp_path):
    """However it is started, and wherever in its file the function stands; if its code was changed, it does not."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(result="old"))
    first = output(path, cache.name)
    path.write_text("# a comment\n\n\n" + PROGRAM.format(result="old"))
    assert output(path, cache.name) == first
    path.write_text(PROGRAM.format(result="new"))
    assert output(path, cache.name)[0].startswith("new,")
    module = output("-m", "program", cache.name, PYTHONPATH=str(tmp_path))
    assert module[0].startswith("new,")
    code = "import program as p; print(p.f(1), *[key.hex() for key in (p.f.cache_key(1), p.closure(p.helper).cache_key(1), p.f.cache_key(p.Kind))], sep=',')"
    assert output("-c", code, cache.name, PYTHONPATH=str(tmp_path)) == module


def test_equal_calls_of_several_processes_are_one(cache, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(result="any"))
    calls = """
import program, collections
words = [f"word {i}" for i in range(50)]
text = "".join(["a", "b"])
calls = [((set(words),), {}), (({"b": {1, 2}, "a": frozenset(words)},), {}), ((), {"b": 1, "a": [set("xyz")]}), (((text, "ab"), (text, text)), {})]
print([program.counted(*args, **kwargs) for args, kwargs in calls])
"""
    turned = calls.replace('{"b": {1, 2}, "a": frozenset(words)}', '{"a": frozenset(reversed(words)), "b": {2, 1}}').replace('{"b": 1, "a": [set("xyz")]}', '{"a": [set("zxy")], "b": 1}')
    printed = [output("-c", code, cache.name, PYTHONPATH=str(tmp_path), PYTHONHASHSEED=seed) for code in (calls, turned) for seed in "123"]
    assert printed == [["[1, 2, 3, 4]"]] * 6


SPAWNED = """
import multiprocessing, sys
import shmcache
cache = shmcache.attach(sys.argv[1])

@cache.memoize()
def f(x):
    return cache.incr("calls", default=0)

def called(x):
    print(f(x), f.cache_key(x), flush=True)

if __name__ == "__main__":
    called(1)
    for how in ("spawn", "fork", "forkserver"):
        child = multiprocessing.get_context(how).Process(target=called, args=(1,))
        child.start()
        child.join()
"""


def test_spawned_and_forked_children_share_their_parents_results(cache, tmp_path):
    path = tmp_path / "spawned.py"
    path.write_text(SPAWNED)
    printed = output(path, cache.name)
    assert len(printed) == 4
    assert len(set(printed)) == 1


# ---- arguments ---------------------------------------------------------------------------------------------------------------------


SIGNATURES = ["a", "a, b=2", "a=1, b=2", "a, /, b=2", "a, *, b=2", "*, a, b=2", "*args", "a, *args", "a, *args, b=2", "**kw", "a, **kw", "a, /, **kw", "a=1, *args, b=2, **kw", ""]
CALLS = [(args, dict(kwargs)) for args in [(), (1,), (2,), (1, 2), (1, 2, 3), (1, 3)]
         for n in range(3) for kwargs in itertools.combinations([("a", 1), ("b", 2), ("b", 3), ("c", 1), ("args", (1,)), ("kw", 1)], n)]  # fmt: skip


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_call_has_one_key_however_it_is_written(cache, signature):
    function = eval(f"lambda {signature}: 1")
    memoized = cache.memoize()(function)
    seen = {}
    for args, kwargs in CALLS:
        try:
            function(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError) as refused:
                memoized(*args, **kwargs)
            try:
                inspect.signature(function).bind(*args, **kwargs)  # of Python 3.13.0 takes some that the call does not
            except TypeError as e:
                assert str(e) in str(refused.value)
            continue
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        assert seen.setdefault(repr(bound.arguments), memoized.cache_key(*args, **kwargs)) == memoized.cache_key(*args, **kwargs)
        assert memoized(*args, **kwargs) == 1
    assert len(set(seen.values())) == len(seen)


def test_arguments_that_are_equal_and_of_other_types_are_others(cache):
    calls = []
    f = cache.memoize()(lambda x: calls.append(x))
    for _ in range(2):
        for x in (1, 1.0, True, "1", b"1", 0.0, -0.0, [1], (1,), {1}, {1: 1}, {True: 1}, [[1.0]], [[1]], math.nan, float("-nan"), int, bool):
            f(x)
    assert len(calls) == 17


def test_a_default_that_no_key_can_be_made_of(cache):
    unset = object()
    calls = []

    @cache.memoize(name="with a default")
    def f(a, b=unset, *, c=unset):
        calls.append((a, b, c))

    for call in (lambda: f(1), lambda: f(a=1), lambda: f(1, 2), lambda: f(1, unset), lambda: f(1, c=3), lambda: f(1, b=2)):
        call()
    assert calls == [(1, unset, unset), (1, 2, unset), (1, unset, 3)]
    with pytest.raises(errors.UnsupportedValue, match=r"of 'b' no key can be made"):
        f(1, object())


class Users:
    def __init__(self, table):
        self.table = table

    def name(self, user_id):
        return f"{self.table} {user_id}"


@pytest.mark.parametrize("named", [None, "with a table"])
def test_a_default_that_is_changed_counts_as_it_is_at_the_call(cache, named):
    users = Users("users")

    @cache.memoize(name=named)
    def f(x, of=users):
        return of.name(x)

    assert f(1) == "users 1"
    users.table = "admins"
    assert f(1) == "admins 1"
    f.__wrapped__.__defaults__ = (Users("nobody"),)
    assert f(1) == "nobody 1"
    users.table = "users"
    f.__wrapped__.__defaults__ = (users,)
    assert f(1) == "users 1"


def test_a_method(cache):
    class Shop(Users):
        name = cache.memoize()(Users.name)
        by_class = classmethod(cache.memoize()(lambda cls, x: f"{cls.__name__} {x}"))
        static = staticmethod(cache.memoize()(lambda x: x + 1))

    with pytest.raises(errors.UnsupportedValue, match=r"Users\.name: of 'self' no key can be made.*an id, say"):
        Shop("a").name(1)
    assert Shop.static(1) == Shop("a").static(1) == 2
    with pytest.raises(errors.UnsupportedValue, match="not found by that name"):
        Shop.by_class(1)
    with shmcache.attach(cache.name, codec="pickle") as pickling:
        Users.memoized = pickling.memoize()(Users.name)
        Users.of_class = classmethod(pickling.memoize()(lambda cls, x: f"{cls.__name__} {x}"))
        try:
            assert [Users(table).memoized(1) for table in "abab"] == ["a 1", "b 1", "a 1", "b 1"]
            assert Users.of_class(1) == Users("a").of_class(1) == "Users 1"
        finally:
            del Users.memoized, Users.of_class
    assert [cache.memoize()(Users(table).name)(1) for table in "abab"] == ["a 1", "b 1", "a 1", "b 1"]
    assert not any("object at 0x" in str(key) for key in cache.scan())


class Request:
    def __init__(self, path):
        self.path = path


def test_what_a_view_is_called_with(cache):
    """A request is no plain data: the error names the argument, and nothing is computed."""
    calls = []

    @cache.memoize()
    def view(request, page=1):
        calls.append(request)

    for call in (lambda: view(Request("/")), lambda: view(request=Request("/"), page=2), lambda: view.forget(Request("/"))):
        with pytest.raises(errors.UnsupportedValue, match=r"view: of 'request' no key can be made: .*Request: convert it to plain data"):
            call()
    with pytest.raises(errors.UnsupportedValue, match="of 'page' no key"):
        view("/", page=type("Number", (int,), {})(1))
    assert calls == []
    assert len(cache) == 0


def test_arguments_that_are_changed_meanwhile(cache):
    @cache.memoize()
    def first(items):
        return items.pop()

    items = [1, 2]
    assert first(items) == 2
    assert first([1, 2]) == 2
    assert first(items) == 1
    assert items == []


# ---- what can be memoized ----------------------------------------------------------------------------------------------------------


class Callable:
    def __init__(self, n):
        self.n = n

    def __call__(self, x):
        return x + self.n


def test_what_is_called_and_is_no_function(cache):
    def add(a, b):
        return a + b

    made = [functools.partial(add, 1), functools.partial(add, 2), functools.partial(max, 3), Callable(7), Callable(8), [1, 2].count, math.sqrt,
            (3).__add__, "a".join, str.upper]  # fmt: skip
    memoized = [cache.memoize()(f) for f in made]
    assert [f("4" if f in memoized[-2:] else 4) for f in memoized * 2] == [5, 6, 4, 11, 12, 0, 2.0, 7, "4", "4"] * 2
    assert apart(memoized, 1)
    assert apart([cache.memoize()(Callable(n)) for n in range(3)], 1)


def test_above_another_cache(cache):
    def made(n):
        @cache.memoize()
        @functools.lru_cache
        def f(x):
            return x + n

        return f

    assert [made(n)(1) for n in (1, 2, 1)] == [2, 3, 2]
    assert made(1).cache_key(1) == made(1).cache_key(1)


def test_a_module_that_is_loaded_again(cache, tmp_path, monkeypatch):
    path = tmp_path / "loaded_again.py"
    path.write_text("def f(x):\n    return 'old'\n\nclass Kind:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module("loaded_again")
    try:
        before, kind = cache.memoize()(module.f), module.Kind
        assert before(kind) == "old"
        importlib.reload(module)
        again = cache.memoize()(module.f)
        assert again.cache_key(module.Kind) == before.cache_key(module.Kind)
        with pytest.raises(errors.UnsupportedValue, match="not found by that name"):
            again(kind)  # the class that was there before
        path.write_text(path.read_text().replace("old", "newer"))
        importlib.reload(module)
        assert cache.memoize()(module.f)(module.Kind) == "newer"
    finally:
        del sys.modules["loaded_again"]


def test_first_called_by_many_threads_at_once(cache):
    def made(n):
        @cache.memoize()
        def f(x):
            return later + x

        later = n
        return f

    f, g = made(1), made(2)
    barrier = threading.Barrier(16)
    got = []

    def run(function, x):
        barrier.wait(60)
        got.append((function is f, x, function(x), function.cache_key(x)))

    threads = [threading.Thread(target=run, args=(function, x)) for function in (f, g) for x in range(4) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted({(of_f, x, value) for of_f, x, value, _ in got}) == sorted((of_f, x, x + (1 if of_f else 2)) for of_f in (True, False) for x in range(4))
    assert len({key for *_, key in got}) == 8


def test_an_object_whose_class_was_changed_is_another_function(cache, monkeypatch):
    before = cache.memoize()(Callable(1))
    assert before(1) == 2
    monkeypatch.setattr(Callable, "__call__", lambda self, x: x - self.n)
    after = cache.memoize()(Callable(1))
    assert after(1) == 0
    assert apart([before, after], 1)


def by(how, n):
    """What adds n, of one code where it is no function."""
    return {
        "function": lambda: eval(f"lambda self, x: x + {n}"),
        "lru_cache": lambda: functools.lru_cache(eval(f"lambda self, x: x + {n}")),
        "partial": lambda: functools.partial(lambda n, x: x + n, n),
        "partialmethod": lambda: functools.partialmethod(lambda self, n, x: x + n, n),
        "staticmethod": lambda: staticmethod(eval(f"lambda x: x + {n}")),
        "classmethod": lambda: classmethod(eval(f"lambda cls, x: x + {n}")),
        "singledispatchmethod": lambda: functools.singledispatchmethod(eval(f"lambda self, x: x + {n}")),
        "object": lambda: Callable(n),
        "method": lambda: Callable(n).__call__,
        "builtin": lambda: n.__add__,
    }[how]()


class Base:
    def __call__(self, x):
        return x


class Inheriting(Base):
    pass


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("how", ["function", "lru_cache", "partial", "partialmethod", "staticmethod", "classmethod", "singledispatchmethod", "object", "method", "builtin"])
def test_whatever_a_class_is_called_by_counts(cache, monkeypatch, how, inherited):
    made = []
    for n in (1, 2, 1):
        monkeypatch.setattr(Base if inherited else Inheriting, "__call__", by(how, n), raising=False)
        memoized = cache.memoize()(Inheriting())
        assert memoized(10) == 10 + n
        made.append(memoized.cache_key(10))
    assert made[0] != made[1] != made[2] == made[0]


def test_a_class_that_is_called_by_what_no_key_can_be_made_of(cache, monkeypatch):
    monkeypatch.setattr(Inheriting, "__call__", threading.Lock().acquire, raising=False)
    with pytest.raises(errors.UnsupportedValue, match=r"the __call__ of Inheriting: .*name="):
        cache.memoize()(Inheriting())
    monkeypatch.setattr(Inheriting, "__call__", None)
    uncalled = Inheriting()
    assert cache.memoize()(lambda x: (uncalled, x)[1])(1) == 1


async def coroutine_function():
    pass


def generator():
    yield 1


async def asynchronous_generator():
    yield 1


class Asynchronous:
    async def __call__(self):
        pass


@pytest.mark.parametrize("function", [coroutine_function, generator, asynchronous_generator, functools.partial(coroutine_function), Asynchronous(), Asynchronous().__call__])
def test_what_has_no_result_to_keep(cache, function):
    for options in ({}, {"name": "f"}):
        with pytest.raises(errors.UsageError, match=r"get_or_set\(\) of a shmcache\.aio\.Cache"):
            cache.memoize(**options)(function)
    assert asyncio.iscoroutinefunction(coroutine_function)


def test_what_is_no_function(cache):
    for bad in (Users, int, 5, "f", None, property(len)):
        with pytest.raises(errors.UsageError, match="takes a function"):
            cache.memoize()(bad)
    for kind in (staticmethod, classmethod):
        with pytest.raises(errors.UsageError, match=f"write @{kind.__name__} above"):
            cache.memoize()(kind(len))
    with pytest.raises(errors.UsageError, match="memoize is called"):
        cache.memoize(classmethod(len))


def test_a_closure_over_what_cannot_be_encoded_asks_for_a_name(cache):
    connection = open(os.devnull)  # noqa: SIM115

    def query(x):
        return (connection.closed, x)

    with connection:
        with pytest.raises(errors.UsageError, match=r"variable 'connection' of the function around .*query.*name="):
            cache.memoize()(query)
        assert cache.memoize(name="query")(query)(1) == (False, 1)


def test_a_closure_over_a_cache_and_a_module(cache, make, name):
    def made(cache, module):
        return cache.memoize()(lambda x: (cache.name, module.__name__))

    store = Hooked()
    with shmcache.create(f"{name}-2", "8M", policy="through", store=store) as other:
        try:
            assert apart([made(c, m) for c in (cache, other) for m in (os, math)], 1)
            assert made(other, math)(1) == (other.name, "math")
            assert made(other, math)(1) == made(other, math)(1)
        finally:
            shmcache.unlink(other.name)


def test_a_proxy_of_a_cache_is_not_the_cache(cache):
    proxy = weakref.proxy(cache)
    with pytest.raises(errors.UnsupportedValue, match="a proxy: use the object"):
        cache.memoize()(lambda x: proxy.name)


def test_two_functions_under_one_name_are_warned_of(cache):
    def sharing(n):
        return cache.memoize(name="shared")(lambda x: x + n)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [sharing(1)(1), sharing(2)(1)] == [2, 2]  # its owner has said so
        cache.memoize(name="another")(lambda x: -x)
    with pytest.warns(errors.SharedName, match="'shared'") as caught:
        cache.memoize(name="shared")(lambda x: -x)
    assert [w.filename for w in caught] == [__file__]


def test_a_name_is_the_same_key_for_changed_code(cache):
    one = cache.memoize(name="stable")(lambda x: "old")
    assert one(1) == "old"
    with pytest.warns(errors.SharedName):
        two = cache.memoize(name=b"stable")(lambda x: "new")
    assert two(1) == "old"
    assert two.forget(1)
    assert one(1) == "old"
    assert one.cache_key(1).startswith(b"\0memo\0stable\0")


def test_a_long_or_strange_qualified_name(cache):
    def f(x):
        return x

    made = []
    for qualname in ("x" * 5000, "x" * 4999 + "y", "\ud800", "é" * 3000, ""):
        f.__qualname__ = qualname
        made.append(cache.memoize()(f))
        assert made[-1](1) == 1
    assert apart(made, 1)


def test_in_front_of_a_store_results_are_the_caches_own(make):
    store = Hooked()
    cache = make(policy="through", store=store)
    f = cache.memoize()(lambda x: x + 1)
    assert [f(1), f(1)] == [2, 2]
    assert store.calls == []
