"""A value comes back equal and of the same type, deeply, or is refused."""

from __future__ import annotations

import datetime as dt
import enum
import io
import math
import pickle
import struct
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from zoneinfo import ZoneInfo

import msgpack
import numpy as np
import pytest

from shmcache import errors
from shmcache.codec import _UNPACKERS, MSGPACK, PICKLE, TUPLE, get_codec


def same(a, b):
    """Equal, and of one type, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(k, j) and same(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (set, frozenset)):
        return a == b and sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, (dt.datetime, dt.time)):
        return a == b and a.fold == b.fold and repr(a) == repr(b)
    return a == b


class Color(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


class Text(str):
    pass


class Dict(dict):
    pass


class OwnZone(dt.tzinfo):
    def utcoffset(self, when):
        return dt.timedelta(hours=1)


VALUES = [
    True, False, None, 0.0, -0.0, 1.5, math.nan, math.inf, -math.inf,
    (), (1, 2), [1, (2, [3, (4,)])], [], {}, set(), {1, "a", (2, 3)}, frozenset({1, frozenset({2})}),
    {"a": {"b": [1, (2, {3: b"x"})]}}, {1: "a", "1": "b", b"1": "c", (1, "x"): "d", None: "e"}, {True: 1}, {2.5: 1},
    {"z": 1, "a": 2, "m": 3}, 2**64, -(2**63) - 1, 2**200, -(2**200), [2**70, -(2**70)], [2**64 - 1, -(2**63)],
    "\ud800", ["\ud800", "ok"], {"k\udfff": "\ud800"}, [b"x", "x"],
    dt.datetime(2026, 1, 2, 3, 4, 5, 6), dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
    dt.datetime(2026, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
    dt.datetime(2026, 1, 2, tzinfo=dt.timezone(dt.timedelta(seconds=-3601, microseconds=5), "odd")),
    dt.datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("UTC"), fold=1), dt.datetime(2026, 10, 25, 2, 30, fold=1),
    dt.date(1, 1, 1), dt.time(1, 2, 3), dt.time(1, 2, tzinfo=dt.UTC, fold=1), dt.timedelta(-1, 5, 7),
    Decimal("1.10"), Decimal("-0"), Decimal("sNaN"), Decimal("1E+500"), Decimal("Infinity"),
    uuid.UUID(int=5), 1 + 2j, complex(-0.0, math.nan), OrderedDict([("b", 1), ("a", (2,))]),
    np.arange(6).reshape(2, 3), np.array(5), np.array([], dtype="f4"), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(4, dtype=">i4"), np.array(["2026-01-01"], dtype="M8[D]"), np.array(["ab", "c"]), np.array([b"ab"]),
    np.zeros(2, dtype=[("a", "<i4"), ("b", "f8", (2,))]), np.arange(10)[::2], np.zeros((0, 3)), np.array([True]),
    np.float64(1.5), np.int64(7), np.bool_(True), np.datetime64("2026-01-01"), np.float32(2), {"x": np.int8(1)}, [np.float64(2)],
]  # fmt: skip


def shown(value):
    """Names a test: the same in every process, whatever its hash seed."""
    return f"{type(value).__name__}:{str(sorted(value, key=repr) if isinstance(value, set) else value)[:24]!a}"


@pytest.mark.parametrize("value", VALUES, ids=shown)
def test_value_comes_back_equal_and_of_its_type(value):
    codec = get_codec("msgpack")
    number, payload = codec.encode(value)
    assert number == MSGPACK
    assert same(codec.decode(number, payload), value)


def loop():
    a = []
    a.append(a)
    return a


def tower(kind):
    value = kind()
    for _ in range(2000):
        value = kind([value]) if kind is not tuple else (value,)
    return value


def other_zone(name):
    """A time zone of that name, with the data of another."""
    data = struct.pack(">4sc15x6l", b"TZif", b"\0", 0, 0, 0, 0, 1, 4) + struct.pack(">lbb4s", 9 * 3600, 0, 0, b"ABC\0")
    return ZoneInfo.from_file(io.BytesIO(data), key=name)


REFUSED = [
    Color.RED, [Color.RED], Point(1, 2), {"p": Point(1, 2)}, Text("x"), {Text("k"): 1}, Dict(a=1), memoryview(b"x"), bytearray(b"abc"), [1, bytearray()], {"a": [{1: memoryview(b"x")}]}, (bytearray(),), {memoryview(b"k"): 1}, object(), len, Text,
    defaultdict(list), Counter("a"), deque([1]), dt.datetime(2026, 1, 1, tzinfo=OwnZone()), range(3),
    dt.datetime(2026, 1, 1, tzinfo=other_zone("UTC")), [dt.time(1, tzinfo=other_zone("UTC"))], dt.time(1, tzinfo=other_zone(None)),
    np.array([object()]), np.ma.array([1]), np.zeros(1, dtype=[("a", "O")]), np.str_("a\0"), [np.bytes_(b"\0")], loop(), tower(list), tower(tuple),
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda v: type(v).__name__)
def test_value_that_would_change_is_refused(value):
    with pytest.raises(errors.UnsupportedValue, match="pickle"):
        get_codec("msgpack").encode(value)


def test_array_comes_back_writable_and_its_own():
    codec = get_codec("msgpack")
    array = codec.decode(*codec.encode(np.arange(3)))
    array[0] = 9
    assert array.tolist() == [9, 1, 2]


def test_hostile_payloads_are_damage_and_run_nothing():
    codec = get_codec("msgpack")
    evil = [b"", b"\xc1", b"\x93\x01", msgpack.packb(msgpack.ExtType(99, b"x")), msgpack.packb(msgpack.ExtType(5, b"\x01")),
            msgpack.packb(msgpack.ExtType(12, msgpack.packb(["O", [1], False, b"12345678"]))), b"\xd8" * 40, b"\x81" * 5000]  # fmt: skip
    for payload in evil:
        with pytest.raises(errors.DamageError):
            codec.decode(MSGPACK, payload)


def test_truncations_of_every_value_are_damage_or_values():
    codec = get_codec("msgpack")
    for value in VALUES:
        payload = codec.encode(value)[1]
        for cut in range(len(payload)):
            with pytest.raises(errors.DamageError):
                codec.decode(MSGPACK, payload[:cut])


def test_pickle_is_read_only_by_who_asked_for_it():
    number, payload = get_codec("pickle").encode(Point(1, 2))
    assert number == PICKLE
    assert get_codec("pickle").decode(number, payload) == Point(1, 2)
    assert get_codec("pickle").decode(*get_codec("msgpack").encode((1,))) == (1,)
    with pytest.raises(errors.CodecMismatch, match="pickle"):
        get_codec("msgpack").decode(number, payload)
    with pytest.raises(errors.CodecMismatch):
        get_codec("pickle").decode(77, payload)
    with pytest.raises(errors.UnsupportedValue):
        get_codec("pickle").encode(lambda: 1)


def test_unknown_codec_is_said():
    with pytest.raises(errors.InvalidConfig, match="msgpack"):
        get_codec("json")


def test_import_is_light():
    code = "import sys, shmcache.codec; print([m for m in ('msgpack', 'numpy', 'pickle', 'psutil', 'uuid') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_protocol_is_five():
    assert pickle.loads(get_codec("pickle").encode({1: 2.5})[1]) == {1: 2.5}
    assert get_codec("pickle").encode(None)[1][1] == 5


@pytest.mark.parametrize("error", [TimeoutError("time is over"), RuntimeError("a handler's"), KeyboardInterrupt()])
def test_what_a_signal_handler_raises_while_a_value_is_decoded_reaches_the_caller(cache, monkeypatch, error):
    """Handlers run in any Python frame, and an extension type's constructor is one."""

    def interrupted(unpack, data):
        raise error

    cache.set(b"k", (1, 2))
    with monkeypatch.context() as patch:
        patch.setitem(_UNPACKERS, TUPLE, interrupted)
        with pytest.raises(type(error)):
            cache.get(b"k")
    assert cache.get(b"k") == (1, 2)
