"""Canonical bytes: the same for what is equal and of the same types, in every process; different for all else."""

from __future__ import annotations

import array
import collections.abc
import copyreg
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import ipaddress
import itertools
import math
import os
import pathlib
import pickle
import random
import subprocess
import sys
import threading
import types
import uuid
import weakref
import zoneinfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmcache import errors
from shmcache.canonical import canonical, code_digest
from tests.unit.test_codec import other_zone


def plain(value):
    return canonical(value, False)


def pickled(value):
    return canonical(value, True)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.integers(), st.sampled_from([0.0, -0.0, 1.0, math.inf, math.nan]), st.floats(),
    st.sampled_from(["", "a", "\ud800", "é"]), st.text(max_size=3), st.sampled_from([b"", b"a"]), st.binary(max_size=3),
    st.complex_numbers(), st.dates(), st.datetimes(), st.timedeltas(), st.decimals(allow_nan=False), st.uuids(),
)  # fmt: skip
hashable = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)), max_leaves=4)
values = st.recursive(
    st.one_of(hashable, st.sets(hashable, max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(hashable, inner, max_size=3),
                            st.dictionaries(hashable, inner, max_size=3).map(collections.OrderedDict)),
    max_leaves=6,
)  # fmt: skip


def rebuilt(value):
    """An equal value of new objects, with what has no order the other way round."""
    kind = type(value)
    if kind in (list, tuple):
        return kind([rebuilt(x) for x in value])
    if kind in (set, frozenset):
        return kind([rebuilt(x) for x in reversed(list(value))])
    if kind is dict:
        return {rebuilt(k): rebuilt(v) for k, v in reversed(list(value.items()))}
    if kind is collections.OrderedDict:
        return kind((rebuilt(k), rebuilt(v)) for k, v in value.items())
    return pickle.loads(pickle.dumps(value))


def form(value):
    """A value as something whose equality says whether two values are equal and of the same types, all through."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, tuple(form(x) for x in value)
    if kind in (set, frozenset):
        return kind, frozenset(collections.Counter(form(x) for x in value).items())
    if kind is dict:
        return kind, frozenset(collections.Counter((form(k), form(v)) for k, v in value.items()).items())
    if kind is collections.OrderedDict:
        return kind, tuple((form(k), form(v)) for k, v in value.items())
    if kind is complex:
        return kind, form(value.real), form(value.imag)
    if kind is float:
        return kind, "nan" if math.isnan(value) else value.hex()
    return kind, repr(value)


@settings(deadline=None, max_examples=200)
@given(values)
def test_equal_values_have_the_same_bytes(value):
    other = rebuilt(value)
    assert form(other) == form(value)
    assert plain(other) == plain(value)
    assert pickled(other) == pickled(value)


@settings(deadline=None, max_examples=300)
@given(values, values)
def test_values_that_differ_have_different_bytes(a, b):
    assert (plain(a) == plain(b)) == (form(a) == form(b))
    assert not (plain([a]).startswith(plain([b])) and form(a) != form(b))


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


Point = collections.namedtuple("Point", "x y")


class Name(str):
    pass


class Bag(set):
    pass


@dataclasses.dataclass
class Row:
    key: str
    value: object = None


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a, b):
        self.a, self.b = a, b


class Node:
    def __init__(self, label):
        self.label, self.others = label, []


def ring(*labels):
    nodes = [Node(label) for label in labels]
    for node in nodes:
        node.others = nodes
    return nodes[0]


ZONE = zoneinfo.ZoneInfo("Europe/Berlin")
DIFFERENT = [
    1, 1.0, True, "1", b"1", decimal.Decimal(1), decimal.Decimal("1.0"), 1 + 0j, np.int64(1), np.int32(1), np.float64(1), np.bool_(True),
    0, 0.0, -0.0, False, None, "", b"", (), [], {}, set(), frozenset(), collections.OrderedDict(), math.nan, decimal.Decimal("nan"), "nan", ...,
    [1, [2]], [[1], 2], [1, 2], (1, 2), {1, 2}, frozenset((1, 2)), {1: 2}, [(1, 2)], {"1": 2}, {1: "2"}, "1,2", ["a", "b"], ["ab"], ["a", "b", ""],
    {"a": 1, "b": 2}, collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1), [("a", 1), ("b", 2)], {("a", 1), ("b", 2)},
    dt.date(2026, 1, 2), dt.datetime(2026, 1, 2), dt.datetime(2026, 1, 2, tzinfo=dt.UTC), dt.datetime(2026, 1, 2, tzinfo=ZONE),
    dt.datetime(2026, 10, 25, 2, 30, tzinfo=ZONE), dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZONE), dt.time(1), dt.timedelta(1), "2026-01-02",
    uuid.UUID(int=1), 1 << 80, -(1 << 80), 1 << 20000,
    np.array([1, 2]), np.array([[1, 2]]), np.array([1, 2], "<i4"), np.array([1, 2], ">i4"), np.array([1.0, 2.0]), np.array([1, 2])[:0], np.array(1),
    np.array(["a", "b"]), np.array([(1, 2.0)], [("a", "<i4"), ("b", "<f8")]), np.array([(1, 2.0)], [("a", "<i4"), ("c", "<f8")]),
    np.array(["2026-01-02"], "M8[D]"), np.array(["2026-01-02"], "M8[s]"), type(None), int, bool, str, Colour, Point,
]  # fmt: skip
OBJECTS = [
    Colour.RED, Colour.BLUE, Point(1, 2), Point(2, 1), Name("a"), Name("b"), Bag("ab"), Bag("a"), Row("a"), Row("a", "x"), Slotted(1, 2), Slotted(2, 1),
    ring("a"), ring("a", "b"), ring("b", "a"), range(3), range(4), slice(1, 2), bytearray(b"a"), collections.Counter("aab"), collections.defaultdict(list, a=[1]),
    collections.defaultdict(set, a=[1]), functools.partial(int, base=2), functools.partial(int, base=3), len, math.sqrt, "a".join, "b".join, np.array([None]), os,
]  # fmt: skip


class Ordered(collections.OrderedDict):
    pass


class Map(collections.abc.MutableMapping):
    """Of an order, by pairs that pickle gets one by one."""

    def __init__(self):
        self.pairs = []

    def __reduce__(self):
        return Map, (), None, None, iter(self.pairs)

    def __setitem__(self, key, value):
        self.pairs.append((key, value))

    def __getitem__(self, key):
        return dict(self.pairs)[key]

    def __delitem__(self, key):
        raise NotImplementedError

    def __iter__(self):
        return iter(dict(self.pairs))

    def __len__(self):
        return len(self.pairs)


class Metres(np.ndarray):
    pass


class Feet(np.ndarray):
    pass


class Wide(np.float64):
    pass


class Wider(np.float64):
    pass


class Noted(collections.Counter):
    pass


class Price(decimal.Decimal):
    pass


class Day(dt.datetime):
    pass


def with_attributes(value, **attributes):
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def filled(kind, *pairs):
    made = kind()
    for key, value in pairs:
        made[key] = value
    return made


def lambdas(*numbers):
    """Functions that differ by an attribute alone."""
    return [with_attributes(lambda x: x, n=n) for n in numbers]


def dispatching(*kinds):
    @functools.singledispatch
    def dispatched(x):
        return 0

    for kind in kinds:
        dispatched.register(kind, lambda x: 1)
    return dispatched


PAIRS = [("a", 1), ("b", 2)]
MORE = [
    filled(Ordered, *PAIRS), filled(Ordered, *PAIRS[::-1]), filled(Map, *PAIRS), filled(Map, *PAIRS[::-1]),
    np.arange(3).view(Metres), np.arange(3).view(Feet), with_attributes(np.arange(3).view(Feet), n=1), with_attributes(np.arange(3).view(Feet), n=2),
    np.array([Ordered()]).view(Feet), np.arange(3), Wide(1), Wider(1),
    np.zeros(2, np.dtype("<i4", metadata={"n": 1})), np.zeros(2, np.dtype("<i4", metadata={"n": 2})), np.zeros(2, "<i4"),
    np.zeros(2, np.dtype([("a", np.dtype("<i4", metadata={"n": 1}))])), np.zeros(2, [("a", "<i4")]), np.zeros(2, (np.record, [("a", "<i4")])),
    Noted("a"), with_attributes(Noted("a"), n=1), Price(1), with_attributes(Price(1), n=1), Day(2026, 1, 1), with_attributes(Day(2026, 1, 1), n=1),
    *lambdas(1, 2), dispatching(), dispatching(int), dispatching(str), dispatching(int, str),
    *[functools.lru_cache(f) for f in lambdas(3, 4)], with_attributes(functools.lru_cache(lambdas(3)[0]), m=1),
]  # fmt: skip


def test_what_tells_two_values_apart_beside_what_they_hold():
    made = [pickled(value) for value in MORE]
    assert [i for i, one in enumerate(made) if made.count(one) > 1] == []
    assert pickled(dispatching(str, int)) == pickled(dispatching(int, str))
    assert pickled(filled(Ordered, *PAIRS)) == pickled(filled(Ordered, *PAIRS))
    assert pickled(with_attributes(lambdas(1)[0], m=2)) == pickled(with_attributes(with_attributes(lambdas(0)[0], m=2), n=1))


class WithSlots:
    """Of each class a subclass that pickle reduces as its base: what it has beyond that is in a slot."""

    class Decimal(decimal.Decimal):
        __slots__ = ("n",)

    class Fraction(fractions.Fraction):
        __slots__ = ("n",)

    class Time(dt.datetime):
        __slots__ = ("n",)

    class Counter(collections.Counter):
        __slots__ = ("n",)

    class Path(pathlib.PurePosixPath):
        __slots__ = ("n",)

    class Partial(functools.partial):
        __slots__ = ("n",)

    class Error(ValueError):
        __slots__ = ("n",)

    class Array(np.ndarray):
        __slots__ = ("n",)

    class Address(ipaddress.IPv4Address):
        __slots__ = ("n",)

    class Id(uuid.UUID):
        __slots__ = ("n",)

    class Items(array.array):
        __slots__ = ("n",)

    class Queue(collections.deque):
        __slots__ = ("n",)

    class Names(types.SimpleNamespace):
        __slots__ = ("n",)

    class Mixin:
        __slots__ = ("n",)

    @dataclasses.dataclass(frozen=True, slots=True)
    class Frozen(Mixin):
        x: int


class FrozenToo(WithSlots.Frozen):
    pass


class Id(uuid.UUID):
    pass


class Zone(zoneinfo.ZoneInfo):
    pass


class Network(ipaddress.IPv4Network):
    pass


class Plain(pathlib.PurePosixPath):
    pass


class Seeded(random.Random):
    pass


@pytest.mark.parametrize("make", [
    lambda: WithSlots.Decimal(1), lambda: WithSlots.Fraction(1, 3), lambda: WithSlots.Time(2026, 1, 1), lambda: WithSlots.Counter("a"), lambda: WithSlots.Path("/a"),
    lambda: WithSlots.Partial(len), lambda: WithSlots.Error("a"), lambda: np.arange(3).view(WithSlots.Array), lambda: WithSlots.Address("1.2.3.4"),
    lambda: Network("1.2.3.0/24"), lambda: Plain("/a"), lambda: Seeded(1), lambda: WithSlots.Id(int=1), lambda: WithSlots.Items("i"), lambda: WithSlots.Queue("a"),
    lambda: WithSlots.Names(), lambda: WithSlots.Frozen(1), lambda: FrozenToo(1), lambda: Id(int=1),
    lambda: Zone.no_cache("Europe/Berlin"),
])  # fmt: skip
def test_what_a_subclass_has_beyond_what_is_reduced(make):
    def all_of_it():
        made = [make(), make(), make()]
        for n in (1, 2):
            object.__setattr__(made[n], "n", n)
        return [pickled(value) for value in made]

    assert all_of_it() == all_of_it()
    assert len(set(all_of_it())) == 3


class Tagged(set):
    """Of a `__reduce__` of its own."""

    def __init__(self, items, tag):
        super().__init__(items)
        self.tag = tag

    def __reduce__(self):
        return type(self), (sorted(self), self.tag)


class Reducing:
    """Reduced to what it is given."""

    def __init__(self, reduced):
        self.reduced = reduced

    @classmethod
    def of(cls, reduced):
        return cls(reduced)

    @classmethod
    def other(cls, reduced):
        return cls(reduced)

    def __reduce__(self):
        return self.reduced


def one_setter(value, state):
    pass


def another_setter(value, state):
    value.state = state


def test_all_that_reduce_says_counts():
    assert pickled(Tagged("ab", 1)) == pickled(Tagged("ba", 1)) != pickled(Tagged("ab", 2))
    tagged = [Tagged((1, 2), tag) for tag in (*itertools.permutations((1, 2)), [1, 2], [2, 1], {1, 2})]
    assert len({pickled(value) for value in (*tagged, Tagged((1,), 1), Tagged((), []), Bag("ab"), Bag("a"))}) == 9
    reduced = [(make, (n,), *more) for make in (Reducing.of, Reducing.other, Reducing) for n in (1, 2)
               for more in ((), ({"a": 1},), ({"a": 1}, None, None, one_setter), ({"a": 1}, None, None, another_setter), (None, iter([1])))]  # fmt: skip
    assert len({pickled(Reducing(x)) for x in reduced}) == len(reduced)
    assert pickled(zoneinfo.ZoneInfo("Europe/Berlin")) != pickled(zoneinfo.ZoneInfo("UTC"))


def test_what_copyreg_says_counts(monkeypatch):
    for kind, one, two in ((WithSlots.Partial, functools.partial(int), functools.partial(str)), (Bag, "ab", "ac"), (Row, "a", "b"), (Id, "1" * 32, "2" * 32)):
        monkeypatch.setitem(copyreg.dispatch_table, kind, lambda value, kind=kind: (kind, (str(value),)))
        assert len({pickled(kind(one)), pickled(kind(two)), pickled(kind(one))}) == 2


@pytest.mark.parametrize("reduced", [None, 5, (), (int,), (int, (), None, 5), (int, (), None, None, [1]), (int, (), 1, (), (), None, 1), "nowhere"])
def test_what_reduce_may_not_say(reduced):
    with pytest.raises(errors.UnsupportedValue, match="no key can be made"):
        pickled(Reducing(reduced))


def test_a_member_of_an_enum_is_its_name():
    before = pickled(Access.READ)
    assert ~Access.READ is Access.WRITE  # which is noted in the member
    assert pickled(Access.READ) == before != pickled(Access.READ | Access.WRITE)


def test_what_was_computed_of_it_meanwhile_does_not_count():
    one, two = Network("1.2.3.0/24"), Network("1.2.3.0/24")
    assert one.broadcast_address and str(one) and hash(Plain("/a"))
    assert pickled(one) == pickled(two)
    for value in (functools.partial(len), WithSlots.Partial(len), ValueError(1), OSError(1), ImportError(1), Bag("a"), bytearray(b"a"), Ordered(), Name("a")):
        before = pickled(value)
        assert not getattr(value, "__dict__", None)  # which makes some keep an empty one from now on
        assert pickled(value) == before
    path = Plain("/a")
    assert path.parts and str(path) and pickled(path) == pickled(Plain("/a"))


def test_the_titles_of_fields_count():
    made = [np.zeros(1, np.dtype({"names": ["a"], "formats": ["<i4"], "titles": [title]})) for title in ("t", "u")]
    assert len({pickled(value) for value in (*made, np.zeros(1, [("a", "<i4")]))}) == 3


class Label(np.str_):
    pass


class Raw(np.bytes_):
    pass


def test_a_time_zone_that_has_its_data_from_a_file_is_not_the_one_of_its_name():
    for zone in (other_zone("UTC"), other_zone(None)):
        for value in (zone, dt.datetime(2026, 1, 1, tzinfo=zone), dt.time(1, tzinfo=zone)):
            for made in (plain, pickled):
                with pytest.raises(errors.UnsupportedValue):
                    made(value)
    for name in ("UTC", "Europe/Berlin"):
        assert other_zone(name).utcoffset(dt.datetime(2026, 1, 1)) != zoneinfo.ZoneInfo(name).utcoffset(dt.datetime(2026, 1, 1))
        now = dt.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo(name))
        assert plain(now) == pickled(now) == plain(now.replace(tzinfo=zoneinfo.ZoneInfo.no_cache(name)))


def test_a_nul_at_the_end_of_numpys_strings_counts():
    """An array of them has none, for it pads with it."""
    texts = ["", "\0", "\0\0", "a", "a\0", "\ud800", "\ud800\0"]
    raws = [text.encode("utf-8", "surrogatepass") for text in texts]
    values = [*map(np.str_, texts), *map(np.bytes_, raws), np.array("a"), "a", b"a"]
    subclasses = [*map(Label, texts), *map(Raw, raws)]
    for made in ([plain(value) for value in values], [pickled(value) for value in values + subclasses]):
        assert len(set(made)) == len(made)
    assert plain(values[1]) == plain(np.str_("\0")) == pickled(values[1])


def structured(**layout):
    return np.zeros(2, np.dtype({"names": ["a", "b"], "formats": ["<i4", "<i4"], **layout}))


def test_how_the_items_of_a_structured_array_are_laid_out_counts():
    """A function can tell by nbytes, or by a view as bytes."""
    layouts = [{}, {"itemsize": 12}, {"offsets": [0, 8]}, {"offsets": [0, 8], "itemsize": 16}, {"offsets": [4, 8]}, {"offsets": [4, 0]}, {"aligned": True}]
    made = [pickled(structured(**layout)) for layout in layouts]
    nested = [pickled(np.zeros(2, [("n", structured(**layout).dtype)])) for layout in layouts]
    none = [pickled(np.zeros(2, dtype)) for dtype in ([], "V0", {"names": [], "formats": [], "itemsize": 4}, "V4")]
    scalars = [pickled(structured(**layout)[0]) for layout in layouts]
    every = made + nested + none + scalars
    assert [i for i, one in enumerate(every) if every.count(one) > 1] == []
    assert made == [plain(structured(**layout)) for layout in layouts]


class Masked(np.ma.MaskedArray):
    def __array_finalize__(self, obj):
        super().__array_finalize__(obj)
        self.unit = getattr(obj, "unit", None)


class Samples(np.ndarray):
    pass


def masked(values=(1, 2, 3), mask=(0, 1, 0), **more):
    return np.ma.array(values, mask=mask, **more)


def with_info(array, info):
    array._optinfo["info"] = info
    return array


def of_fields(*fields):
    return np.array([(None, 1)], list(fields))


@pytest.mark.parametrize("make", [
    lambda: [with_attributes(np.ma.array([1, 2]).view(Masked), unit=unit) for unit in ("m", "ft")],
    lambda: [with_attributes(np.ma.array([1, 2]).view(Masked), n=n) for n in (1, 2)],
    lambda: [with_info(masked(), info) for info in (1, 2)],
    lambda: [masked(), masked(mask=(1, 0, 0)), masked(mask=False), np.ma.array([1, 2, 3]), masked((1, 2, 4)), masked(hard_mask=True), masked(fill_value=7), np.arange(1, 4)],
    lambda: [masked((None, "a", "b"), dtype=object), masked((None, "a", "c"), dtype=object), masked((None, "a", "b"), dtype=object, fill_value="x")],
    lambda: [np.ma.array(np.array([1, 2]).view(Samples)), np.ma.array([1, 2]), np.ma.masked],
    lambda: [masked(dtype=np.dtype("i8", metadata={"unit": unit})) for unit in ("m", "ft")],
    lambda: [with_attributes(np.arange(3).view(Samples), **{name: n}) for name in ("offset", "mode", "filename") for n in (1, 2)],
    lambda: [with_attributes(np.rec.array([(1, 2)], names="a,b").view(np.recarray), n=n) for n in (1, 2)],
    lambda: [of_fields(("a", "O"), ("b", "i4")), of_fields(("a", "O"), ("b", "i8")), of_fields(("a", "O"), ("c", "i4")), np.array([(None, 1), 2], object)[:1]],
])  # fmt: skip
def test_what_tells_two_arrays_apart_beside_their_items(make):
    made = [pickled(value) for value in make()]
    assert len(set(made)) == len(made)
    assert made == [pickled(value) for value in make()]


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="numpy 2 has it")
def test_arrays_of_numpys_strings():
    def made():
        strings = [np.dtypes.StringDType(), np.dtypes.StringDType(coerce=False), np.dtypes.StringDType(na_object=None), object]
        return [pickled(np.array([text], dtype)) for dtype in strings for text in ("a" * 50, "b" * 50)]

    assert made() == made()
    assert len(set(made())) == 8


def test_a_masked_array_is_not_where_its_objects_are():
    one, two = [np.ma.array([["a", text], ("b", 1)], dtype=object) for text in ("".join("xyz"), "".join(["xy", "z"]))]
    assert pickled(one) == pickled(two)
    assert pickled(masked()) == pickled(masked().copy())


def test_how_an_array_of_a_subclass_lies_does_not_count(tmp_path):
    array = np.arange(6).reshape(2, 3)
    assert pickled(array.view(Feet)) == pickled(np.asfortranarray(array).view(Feet))
    maps = [np.memmap(tmp_path / name, "q", "w+", shape=(2, 3)) for name in "ab"]
    for mapped in maps:
        mapped[:] = array
    assert pickled(maps[0]) == pickled(maps[1]) != pickled(maps[0][::-1])


def test_an_attribute_of_which_no_key_can_be_made():
    function = with_attributes(lambdas(1)[0], held=threading.Lock())
    with pytest.raises(errors.UnsupportedValue, match="the attribute 'held' of lambdas"):
        pickled(function)
    for value in (MORE[0], MORE[4], MORE[10]):
        with pytest.raises(errors.UnsupportedValue):
            plain(value)


def test_attributes_of_a_function_that_are_called_as_a_memoized_ones():
    made = [with_attributes(lambdas(1)[0], **{name: n}) for name in ("forget", "cache_key", "cache_parameters") for n in (1, 2)]
    vars(made[0])[1] = 2  # a name that is no str
    assert len({pickled(function) for function in (*made, lambdas(1)[0])}) == 7


def test_whether_a_memoized_function_or_its_wrapper_has_an_attribute():
    def memoized(function):
        def wrapper():
            pass

        return with_attributes(wrapper, _memoized=(wrapper, function))

    outer, inner = memoized(lambda: 1), memoized(with_attributes(lambda: 1, n=1))
    assert pickled(with_attributes(outer, n=1)) != pickled(inner)


def test_a_module_that_is_not_the_one_of_its_name():
    for module in (types.ModuleType("os"), types.ModuleType("nowhere")):
        with pytest.raises(errors.UnsupportedValue, match="of the module"):
            pickled(module)


class Calling:
    def __init__(self, n):
        self.n = n

    def __call__(self):
        return self.n


class Proxy:
    """Says that it is of another class, as proxies do."""

    def __init__(self, of):
        self._of = of

    __class__ = property(lambda self: type(self._of))


def test_a_proxy_is_what_it_is_itself():
    made = []
    for of in (int, os, {1}, {1: 2}, np.arange(3), np.float64(1)):
        assert isinstance(Proxy(of), type(of))
        made.append(pickled(Proxy(of)))
    assert len(set(made)) == len(made)


class Forwarding:
    """Has all attributes of another object."""

    def __init__(self, of):
        object.__setattr__(self, "of", of)

    def __getattribute__(self, name):
        return getattr(object.__getattribute__(self, "of"), name)


def test_a_proxy_is_not_what_it_stands_for():
    for of in (Node("a"), Row("a"), Bag("a"), np.arange(3), lambdas(1)[0], Calling(1)):
        for proxy in (weakref.proxy(of), Forwarding(of)):
            with pytest.raises(errors.UnsupportedValue, match="a proxy: use the object"):
                pickled([proxy])
    gone = weakref.proxy(Node("a"))
    with pytest.raises(errors.UnsupportedValue, match="no key can be made"):
        pickled(gone)


def test_a_function_whose_attribute_is_itself():
    one, two = [with_attributes(f, this=f) for f in lambdas(1, 2)]
    assert pickled(one) != pickled(two)


def test_no_two_of_many_have_the_same_bytes():
    every = [plain(value) for value in DIFFERENT] + [pickled(value) for value in OBJECTS]
    assert [value for value, made in zip(DIFFERENT + OBJECTS, every, strict=True) if every.count(made) > 1] == []
    assert [pickled(value) for value in DIFFERENT] == every[: len(DIFFERENT)]


def test_what_is_there_twice_counts_as_two_that_are_equal():
    for shared, apart in (("".join(["a", "b", "c"]), "".join(["ab", "c"])), (len("abc") * 1000, int("3000")), ([1], [1])):
        assert pickle.dumps((shared, shared)) != pickle.dumps((shared, apart)) or type(shared) is int
        assert plain((shared, shared)) == plain((shared, apart)) == plain((apart, shared))
        assert pickled({"a": shared, "b": shared}) == pickled({"b": apart, "a": shared})


def of_fields_ab(array):
    return np.array(list(zip(array, array, strict=True)), [("a", array.dtype), ("b", array.dtype)])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant != 63, reason="a long double of x86 is padded")
@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble])
@pytest.mark.parametrize("order", "<>")
def test_what_pads_a_long_double_does_not_count(dtype, order):
    values = np.array([0, -0.0, 1, 2, 1, -1e300, np.inf], np.dtype(dtype).newbyteorder(order))
    values[4] += np.finfo(np.longdouble).eps  # less than a float can tell
    padded = values.copy()
    raw = padded.view("u1").reshape(-1, np.dtype("g").itemsize)
    (raw[:, 10:] if order == "<" else raw[:, :-10])[...] = 0xAA
    assert (padded == values).all()
    for made in (lambda a: a, lambda a: a[::2], lambda a: a.reshape(1, 7), np.asfortranarray, of_fields_ab, lambda a: a[4], lambda a: a.view(Samples), list, np.ma.array):
        assert pickled(made(padded)) == pickled(made(values))
    every = [values, values.astype(values.dtype.newbyteorder()), values.astype("c16"), *values, *[values[i : i + 1] for i in range(7)]]
    assert len({plain(value) for value in every}) == len(every)


def test_how_an_array_lies_in_memory_does_not_count():
    array = np.arange(24).reshape(4, 6)
    for other in (np.asfortranarray(array), np.arange(48).reshape(4, 12)[:, ::2] // 2, array[::-1][::-1], array.astype("q"), array.copy().view()):
        assert (other == array).all()
        assert plain(other) == plain(array)
    padded = np.dtype([("a", "i1"), ("b", "<i8")], align=True)
    one, two = np.frombuffer(b"\1" * 16, padded), np.frombuffer(b"\1" + b"\2" * 7 + b"\1" * 8, padded)
    assert one == two
    assert pickled(one) == pickled(two)
    assert plain(math.nan) == plain(-math.nan) == plain(float("-nan"))


def test_objects_are_their_state_whatever_its_order():
    one, two = Row("a", {1, 2}), Row("a")
    two.__dict__.clear()
    two.value, two.key = {2, 1}, "a"
    assert pickled(one) == pickled(two)
    assert pickled(Bag(["a", "b", "c"])) == pickled(Bag(["c", "b", "a"]))
    assert pickled(collections.Counter("ab")) == pickled(collections.Counter("ba"))
    assert pickled({Point(1, 2): 1, Point(2, 3): 2}) == pickled({Point(2, 3): 2, Point(1, 2): 1})


def test_objects_that_refer_to_each_other_end():
    assert pickled(ring(*range(60))) == pickled(ring(*range(60)))
    assert pickled(ring(*range(60))) != pickled(ring(*range(59), -1))
    endless = []
    endless.append(endless)
    for value in (endless, functools.reduce(lambda inner, _: [inner], range(100_000), [])):
        with pytest.raises(errors.UnsupportedValue, match="deep"):
            pickled(value)
        with pytest.raises(errors.UnsupportedValue, match="deep"):
            plain(value)


@pytest.mark.parametrize("value", [object(), Colour.RED, Point(1, 2), Name("a"), bytearray(b"a"), Row("a"), np.array([None]), len, lambda: 1, range(3), sys])
def test_without_pickle_plain_data_alone(value):
    for nested in (value, [value], {"k": value}):
        with pytest.raises(errors.UnsupportedValue, match="pickle"):
            plain(nested)


def test_what_nobody_finds():
    class Local:
        pass

    for value in (Local, Local(), (x for x in ()), sys._getframe(), open(os.devnull)):  # noqa: SIM115
        with pytest.raises(errors.UnsupportedValue, match="no key can be made"):
            pickled(value)
        if hasattr(value, "close"):
            value.close()


CODE = """
import collections, sys
from shmcache.canonical import canonical, code_digest
from tests.unit.test_canonical import Bag, Row, Tagged, ring

def f(x):
    def inner(y):
        return y in {"a", "b", "c", "d", "e", "f"} and [z for z in ({"u", "v"},)]
    return inner(x) if x not in ("a", "b") else lambda: x

words = [f"word {i}" for i in range(20)]
values = [set(words), frozenset(words), {w: {w, "a", "b"} for w in set(words)}, {frozenset(words), frozenset("abc")}, [set("abcdef")] * 3]
objects = [Bag(words), Tagged(words, 1), Row("k", set(words)), ring(*words), dict.fromkeys(set(words)), f, {f: set(words)}]
print([canonical(v, False) for v in values], [canonical(v, True) for v in objects], code_digest(f.__code__))
"""


def test_each_process_makes_the_same_bytes():
    made = set()
    for seed in "123":
        run = [sys.executable, "-c", CODE]
        made.add(subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout)
    assert len(made) == 1
    assert len(made.pop()) > 1000


def compiled(source):
    found = {}
    exec(compile(source, "anywhere", "exec"), found)
    return code_digest(found["f"].__code__)


def test_code_counts_and_its_place_does_not():
    source = "def f(a, b=2):\n    return [a + x for x in (1, 2.0)] if b else None\n"
    assert compiled(source) == compiled("# more\n\n\n" + source) == compiled("import os\n" + source.replace("    return", "\n    return"))
    others = [("(1, 2.0)", "(1, 2)"), ("(1, 2.0)", "(True, 2.0)"), ("a + x", "a - x"), ("a + x", "x + a"), ("b=2", "*, b=2"), ("if b", "if c"), ("a, b=2", "a, b=2, /")]
    digests = {compiled(source)} | {compiled(source.replace(*change)) for change in others}
    assert len(digests) == 1 + len(others)
