"""Sequences of commands by a weighted grammar: most are valid, many nearly, some not at all. A seed and a number give the same sequence.

Time: a time to live is minutes at least, and no two of a sequence are near each other, so that GT and LT do not depend on the
milliseconds between two commands; or the key is gone already; or it lives for milliseconds and the next command waits. Points in
time are in a far future or in 1970. Sizes: values and offsets stay below some kilobytes, as LCS needs the product of two sizes, or are
so large that they are an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.redis.resp import encode

Command = tuple[bytes, ...]
GROUPS = ("strings", "integers", "bits", "keys", "expiry", "scan", "multi", "connection", "protocol", "object", "lcs", "bitfield", "dump")
DUMPED = b"<what DUMP last gave>"  # an argument that is each server's own
SHORT = 0.03  # seconds to wait after a command that lets a key live for some milliseconds
FUTURE = 4_102_444_800  # 2100


@dataclass(frozen=True)
class Step:
    """What is sent at once on one of the connections."""

    connection: int
    commands: tuple[Command, ...]  # each has one reply
    raw: bytes | None = None  # sent instead of them
    replies: int | None = None  # to raw
    closes: bool = False  # the server closes after it
    pause: float = 0.0
    loop: bool = False  # SCAN from 0 till 0
    pieces: int = 1

    @property
    def label(self) -> str:
        if self.raw is not None:
            return "raw"
        if len(self.commands) > 1:
            return "pipeline"
        return name(self.commands[0])

    def data(self) -> bytes:
        return b"".join(map(encode, self.commands)) if self.raw is None else self.raw

    def __str__(self) -> str:
        if self.raw is not None:
            return f"{self.connection}> raw {self.raw[:300]!r}"
        said = "; ".join(" ".join(a.decode() if a.isalnum() else repr(a) for a in c) for c in self.commands)
        return f"{self.connection}> {said}{' (waits)' if self.pause else ''}{' (till cursor 0)' if self.loop else ''}"


@dataclass
class Sequence:
    number: int
    protocol: int
    steps: list[Step] = field(default_factory=list)
    expiring: int = 0  # commands that leave a key whose time is over, and which may still be counted


def name(command: Command) -> str:
    """Of a command, for people: OBJECT and CLIENT with what follows."""
    first = command[0].upper().decode("latin1") if command else ""
    if first in ("OBJECT", "CLIENT") and len(command) > 1 and command[1].isalpha():
        first += " " + command[1].upper().decode()
    return first if first.replace(" ", "").replace("_", "").isalpha() and len(first) < 30 else "(odd name)"


def c(*args: str | bytes | int | Iterable[bytes]) -> Command:
    """A command: numbers and text become bytes, a list becomes so many arguments."""
    flat: list[bytes] = []
    for a in args:
        if isinstance(a, bytes):
            flat.append(a)
        elif isinstance(a, str | int):
            flat.append(str(a).encode())
        else:
            flat.extend(a)
    return tuple(flat)


INTEGERS = [b"0", b"1", b"-1", b"7", b"42", b"9999", b"10000", b"-10000", b"2147483647", b"2147483648", b"-2147483649", b"4294967296",
            b"9223372036854775806", b"9223372036854775807", b"-9223372036854775807", b"-9223372036854775808"]  # fmt: skip
NO_INTEGERS = [b"", b" 1", b"1 ", b"+1", b"01", b"-0", b"00", b"1.0", b"1e3", b"0x10", b"abc", b"9223372036854775808",
               b"-9223372036854775809", b"18446744073709551615", b"18446744073709551616",
               b"99999999999999999999999", b"1\x00", b"--1", b"-", b"1_0"]  # fmt: skip
FLOATS = [b"0.1", b"1.5", b"-1.5", b"3", b"1e3", b"5.0e3", b"3.0e-5", b"-0", b"-0.0", b".5", b"5.", b"+5", b"0x10", b"0x1p4",
          b"10.50000", b"1e17", b"1e18", b"123456789.123456789", b"0.000001", b"1e-17", b"1e-30",
          b"1e300", b"-1e300", b"2.2250738585072014e-308"]  # fmt: skip
NO_FLOATS = [b"", b" 1.5", b"1.5 ", b"inf", b"-inf", b"+inf", b"infinity", b"nan", b"-nan", b"1e5000", b"-1e5000", b"abc", b"1,5",
             b"1.5.5", b"1e", b"1_0", b"1.5\x00", b"0x", b"1e-5000"]  # fmt: skip
SIZES = (0, 1, 2, 7, 8, 11, 20, 21, 43, 44, 45, 46, 63, 64, 65, 100, 255, 256, 1000)
KEYS = [b"k1", b"k2", b"k3", b"k:4", b"hello", b"hallo", b"", b"bin\x00\r\n\xff", b"a" * 44, b"long" * 40, b"[x]", b"k*", b"\xd0\xba"]
PATTERNS = [b"*", b"k*", b"k?", b"k[1-2]", b"k[^1]", b"h[ae]llo", b"h*llo", b"\\*", b"k\\*", b"[", b"k[", b"[[]x]", b"", b"**", b"*\x00*",
            b"k[2-1]", b"nothing", b"?", b"k[1", b"\\", b"*[^0-9]", b"c*", b"c?"]  # fmt: skip
JUNK = [b"", b"foo", b"-1", b"0", b"1000000", b"99999999999999999999", b"1.5", b"\x00\xff", b"*", b"NX", b"GET", b"\r\n"]


def production(group: str, weight: float) -> Callable[[Callable[..., object]], Callable[..., object]]:
    def mark(f: Callable[..., object]) -> Callable[..., object]:
        f.production = (group, weight)  # type: ignore[attr-defined]
        return f

    return mark


class Grammar:
    """One per sequence. A production gives a command, or a list of steps; it knows by self.multi what its connection is in."""

    def __init__(self, seed: int, number: int, groups: Iterable[str] = GROUPS, protocol: int = 2) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.groups = set(groups)
        self.keys = self.rng.sample(KEYS, self.rng.randint(3, 5))
        self.sequence = Sequence(number, protocol)
        self.multi = [False, False]
        self.at = 0  # the connection that is written for
        self.pause = 0.0
        self.times = iter(self.rng.sample(range(100, 200_000), 400))
        found = [getattr(self, n) for n in sorted(dir(type(self))) if hasattr(getattr(type(self), n), "production")]
        self.productions = [p for p in found if p.production[0] in self.groups]
        chosen = {g for g in GROUPS if self.rng.random() < 0.25}  # topics of this sequence
        self.weights = [p.production[1] * (4 if p.production[0] in chosen else 1) for p in self.productions]

    # ---- arguments --------------------------------------------------------------------------------------------------------------

    def some(self, make: Callable[[], bytes], least: int = 1, most: int = 4) -> list[bytes]:
        return [make() for _ in range(self.rng.randint(least, most))]

    def maybe(self, share: float, *args: bytes) -> list[bytes]:
        return list(args) if self.rng.random() < share else []

    def key(self) -> bytes:
        return self.rng.choice(self.keys)

    def integer(self, good: float = 0.85) -> bytes:
        if self.rng.random() < good:
            return self.rng.choice(INTEGERS) if self.rng.random() < 0.4 else b"%d" % self.rng.randint(-200, 20_000)
        return self.rng.choice(NO_INTEGERS)

    def float(self) -> bytes:
        return self.rng.choice(FLOATS if self.rng.random() < 0.8 else NO_FLOATS)

    def value(self) -> bytes:
        r = self.rng.random()
        if r < 0.25:
            return self.integer()
        if r < 0.35:
            return self.float()
        if r < 0.6:
            return bytes(self.rng.choices(b"abcx", k=self.rng.choice(SIZES[:9])))
        if r < 0.8:
            return self.rng.randbytes(self.rng.choice(SIZES))
        return self.rng.choice([b"", b"hello world", b"\r\n", b"+OK\r\n", b"\x00", b"\xff" * 8, b"foobar", b"x" * 44, b"x" * 45])

    def offset(self, bits: bool = False) -> bytes:
        r = self.rng.random()
        if r < 0.75:
            return b"%d" % self.rng.choice([0, 1, 7, 8, 9, 15, 31, 32, 63, 64, 100, 1000, self.rng.randint(0, 16_000 if bits else 2000)])
        # 2**29 bytes and 2**32 bits are the limits
        return self.rng.choice(
            [
                b"-1",
                b"-100",
                b"4294967296",
                b"536870913" if not bits else b"4294967297",
                b"9223372036854775807",
                self.rng.choice(NO_INTEGERS),
            ]
        )

    def index(self) -> bytes:
        if self.rng.random() < 0.9:
            return b"%d" % self.rng.choice([0, 1, 2, 3, 5, 10, 43, 100, 5000, -1, -2, -3, -10, -5000, 4294967296, -4294967296])
        return self.integer(0.5)

    def ttl(self, scale: int = 1) -> bytes:
        """Seconds, or with scale=1000 milliseconds, from now."""
        r = self.rng.random()
        if r < 0.8:
            return b"%d" % (next(self.times) * 10 * scale)
        if r < 0.86 and scale == 1000 and not any(self.multi):
            self.pause = SHORT
            self.sequence.expiring += 1
            return b"%d" % self.rng.randint(1, 5)
        return self.no_time()

    def moment(self, scale: int = 1) -> bytes:
        """Seconds or milliseconds since 1970."""
        r = self.rng.random()
        if r < 0.8:
            return b"%d" % ((FUTURE + self.rng.randint(0, 30) * 10) * scale)
        if r < 0.87:
            self.sequence.expiring += 1
            return b"%d" % self.rng.choice([1, 1000, 1_000_000])
        return self.no_time()

    def no_time(self) -> bytes:
        self.sequence.expiring += 1
        return self.rng.choice([b"0", b"-1", b"-1000", b"9223372036854775807", b"-9223372036854775808", b"9223372036854775",
                                *NO_INTEGERS[:1],
                                b"abc", b"1.5", b"99999999999999999999", b"-9223372036854775", b"9223372036854776"])  # fmt: skip

    def expiry(self, *more: bytes) -> list[bytes]:
        """EX and the like with its argument; twice, or without it, now and then."""
        if "expiry" not in self.groups:
            return []
        option = self.rng.choice([b"EX", b"PX", b"EXAT", b"PXAT", b"ex", b"Px", *more])
        if option in more:
            return [option]
        times = {b"EX": self.ttl, b"EXAT": self.moment}.get(option.upper())
        value = times() if times else self.ttl(1000) if option.upper() == b"PX" else self.moment(1000)
        return [option, *([] if self.rng.random() < 0.03 else [value])]

    def cased(self, word: str) -> bytes:
        """Some spelling of an option."""
        return (word if self.rng.random() < 0.7 else self.rng.choice([word.lower(), word.capitalize()])).encode()

    # ---- strings ----------------------------------------------------------------------------------------------------------------

    @production("strings", 6)
    def get(self) -> Command:
        return c("GET", self.key())

    @production("strings", 8)
    def set(self) -> Command:
        if self.rng.random() < 0.4:
            return c("SET", self.key(), self.value())
        options = [*self.maybe(0.4, self.cased(self.rng.choice(["NX", "XX"]))), *self.maybe(0.3, self.cased("GET"))]
        options += self.expiry(b"KEEPTTL") if self.rng.random() < 0.6 else self.maybe(0.2, b"KEEPTTL")
        if self.rng.random() < 0.08:
            options += self.rng.choice([[b"NX"], [b"XX"], [b"KEEPTTL"], [b"PERSIST"], [b"foo"], self.expiry()])
        if self.rng.random() < 0.3 and not self.pause and not any(o.upper() in (b"EX", b"PX", b"EXAT", b"PXAT") for o in options):
            self.rng.shuffle(options)
        return c("SET", self.key(), self.value(), options)

    @production("strings", 2)
    def setnx(self) -> Command:
        return c(self.rng.choice(["SETNX", "GETSET"]), self.key(), self.value())

    @production("strings", 2)
    def setex(self) -> Command:
        if "expiry" not in self.groups:
            return c("GETDEL", self.key())
        if self.rng.random() < 0.5:
            return c("SETEX", self.key(), self.ttl(), self.value())
        return c("PSETEX", self.key(), self.ttl(1000), self.value())

    @production("strings", 1.5)
    def getdel(self) -> Command:
        return c("GETDEL", self.key())

    @production("strings", 2)
    def getex(self) -> Command:
        options = self.expiry(b"PERSIST", b"persist") if self.rng.random() < 0.8 else []
        if self.rng.random() < 0.08:
            options += self.rng.choice([[b"KEEPTTL"], [b"PERSIST"], [b"NX"], [b"foo"], self.expiry()])
        return c("GETEX", self.key(), options)

    @production("strings", 2)
    def mget(self) -> Command:
        return c("MGET", self.some(self.key))

    @production("strings", 2.5)
    def mset(self) -> Command:
        pairs = [x for _ in range(self.rng.randint(1, 3)) for x in (self.key(), self.value())]
        return c(self.rng.choice(["MSET", "MSETNX"]), pairs, self.maybe(0.05, self.key()))

    @production("strings", 3)
    def append(self) -> Command:
        return c("APPEND", self.key(), self.value())

    @production("strings", 1.5)
    def strlen(self) -> Command:
        return c("STRLEN", self.key())

    @production("strings", 3)
    def getrange(self) -> Command:
        return c(self.rng.choice(["GETRANGE", "SUBSTR"]), self.key(), self.index(), self.index())

    @production("strings", 2.5)
    def setrange(self) -> Command:
        return c("SETRANGE", self.key(), self.offset(), self.value())

    # ---- integers, bits ---------------------------------------------------------------------------------------------------------

    @production("integers", 3)
    def incr(self) -> Command:
        return c(self.rng.choice(["INCR", "DECR"]), self.key())

    @production("integers", 4)
    def incrby(self) -> Command:
        return c(self.rng.choice(["INCRBY", "DECRBY"]), self.key(), self.integer())

    @production("integers", 3)
    def incrbyfloat(self) -> Command:
        return c("INCRBYFLOAT", self.key(), self.float() if self.rng.random() < 0.8 else self.integer())

    @production("integers", 2)
    def set_number(self) -> Command:
        return c("SET", self.key(), self.integer() if self.rng.random() < 0.6 else self.float())

    @production("bits", 3)
    def setbit(self) -> Command:
        return c("SETBIT", self.key(), self.offset(bits=True), self.rng.choice([b"0", b"1", b"1", b"1", b"2", b"-1", b"x"]))

    @production("bits", 2)
    def getbit(self) -> Command:
        return c("GETBIT", self.key(), self.offset(bits=True))

    def unit(self, share: float = 0.4) -> list[bytes]:
        return self.maybe(share, self.rng.choice([b"BIT", b"BYTE", b"bit", b"Byte", b"foo"]))

    @production("bits", 2.5)
    def bitcount(self) -> Command:
        return c(
            "BITCOUNT",
            self.key(),
            self.rng.choice([[], [self.index()], [self.index(), self.index(), *self.unit()], [self.index(), self.index(), *self.unit()]]),
        )

    @production("bits", 3)
    def bitpos(self) -> Command:
        bit = self.rng.choice([b"0", b"1", b"0", b"1", b"2", b"x"])
        rest = self.rng.choice([[], [self.index()], [self.index(), self.index(), *self.unit()], [self.index(), *self.unit(0.1)]])
        return c("BITPOS", self.key(), bit, rest)

    @production("bits", 2.5)
    def bitop(self) -> Command:
        op = self.rng.choice(["AND", "OR", "XOR", "NOT", "and", "Not", "NAND"])
        return c("BITOP", op, self.key(), self.some(self.key, 1, 1 if op.upper() == "NOT" and self.rng.random() < 0.8 else 3))

    @production("bitfield", 5)
    def bitfield(self) -> Command:
        args: list[bytes] = []
        for _ in range(self.rng.randint(0, 4)):
            kind = self.rng.choice(
                [b"u1", b"u8", b"i8", b"u5", b"i16", b"u32", b"i64", b"u63", b"i5", b"I8", b"u64", b"i65", b"u0", b"x8", b"i", b"8"][
                    : 10 if self.rng.random() < 0.9 else 16
                ]
            )
            at = self.rng.choice(
                [b"%d" % self.rng.randint(0, 200), b"#%d" % self.rng.randint(0, 20), b"0", b"#0", self.offset(bits=True), b"#-1", b"#x"]
            )
            operation = self.rng.choice(
                ["GET", "GET", "SET", "SET", "INCRBY", "INCRBY", "OVERFLOW", "get", "foo" if self.rng.random() < 0.1 else "GET"]
            )
            if operation == "OVERFLOW":
                args += c("OVERFLOW", self.rng.choice([b"WRAP", b"SAT", b"FAIL", b"sat", b"WRAP", b"FAIL", b"foo"]))
            elif operation in ("GET", "get", "foo"):
                args += c(operation, kind, at)
            else:
                args += c(operation, kind, at, self.integer(0.95))
        return c("BITFIELD", self.key(), args)

    @production("bitfield", 2)
    def bitfield_ro(self) -> Command:
        gets = [
            x
            for _ in range(self.rng.randint(0, 3))
            for x in c("GET", self.rng.choice(["u8", "i8", "u4", "i64", "u63", "u64"]), self.offset(bits=True))
        ]
        return c("BITFIELD_RO", self.key(), gets, self.maybe(0.1, *c("SET", "u8", 0, 1)))

    @production("lcs", 4)
    def lcs(self) -> Command:
        options = [*self.maybe(0.3, self.cased("LEN")), *self.maybe(0.5, self.cased("IDX"))]
        options += [
            *self.maybe(0.3, self.cased("MINMATCHLEN"), self.integer(0.9)),
            *self.maybe(0.4, self.cased("WITHMATCHLEN")),
            *self.maybe(0.03, b"foo"),
        ]
        return c("LCS", self.key(), self.key(), options)

    @production("lcs", 2)
    def set_letters(self) -> Command:
        return c("MSET", self.key(), bytes(self.rng.choices(b"abc", k=20)), self.key(), bytes(self.rng.choices(b"abcd", k=30)))

    # ---- keys -------------------------------------------------------------------------------------------------------------------

    @production("keys", 4)
    def delete(self) -> Command:
        return c(self.rng.choice(["DEL", "UNLINK", "EXISTS", "TOUCH"]), self.some(self.key, 1, 3))

    @production("keys", 1.5)
    def type(self) -> Command:
        return c("TYPE", self.key())

    @production("keys", 3)
    def rename(self) -> Command:
        return c(self.rng.choice(["RENAME", "RENAMENX"]), self.key(), self.key())

    @production("keys", 3)
    def copy(self) -> Command:
        db = self.maybe(0.15, self.cased("DB"), self.rng.choice([b"0", b"1", b"15", b"16", b"-1", b"abc"]))
        return c("COPY", self.key(), self.key(), self.maybe(0.4, self.cased("REPLACE")), db, self.maybe(0.03, b"foo"))

    @production("keys", 1.5)
    def listing(self) -> Command:
        return c("KEYS", self.rng.choice(PATTERNS))

    @production("keys", 1)
    def randomkey(self) -> Command:
        return c("RANDOMKEY")

    @production("keys", 1.5)
    def dbsize(self) -> Command:
        return c("DBSIZE")

    @production("keys", 0.4)
    def flush(self) -> Command:
        return c(
            self.rng.choice(["FLUSHDB", "FLUSHALL"]),
            self.rng.choice([[], [], [b"ASYNC"], [b"SYNC"], [b"sync"], [b"foo"], [b"SYNC", b"ASYNC"]]),
        )

    @production("expiry", 5)
    def expire(self) -> Command:
        options = self.maybe(0.5, self.rng.choice([b"NX", b"XX", b"GT", b"LT", b"gt", b"Lt"]))
        options += self.maybe(0.06, self.rng.choice([b"NX", b"XX", b"GT", b"LT", b"foo"]))
        which = self.rng.choice(["EXPIRE", "PEXPIRE", "EXPIREAT", "PEXPIREAT"])
        time = self.moment if which.endswith("AT") else self.ttl
        return c(which, self.key(), time(1000 if which.startswith("P") else 1), options)

    @production("expiry", 4)
    def left(self) -> Command:
        return c(self.rng.choice(["TTL", "PTTL", "EXPIRETIME", "PEXPIRETIME"]), self.key())

    @production("expiry", 1.5)
    def persist(self) -> Command:
        return c("PERSIST", self.key())

    @production("object", 3)
    def object(self) -> Command:
        return c("OBJECT", self.rng.choice(["ENCODING", "ENCODING", "ENCODING", "REFCOUNT", "encoding", "FREQ", "IDLETIME"]), self.key())

    @production("object", 0.5)
    def object_odd(self) -> Command:
        return self.rng.choice(
            [
                c("OBJECT", "HELP"),
                c("OBJECT", "FOO"),
                c("OBJECT"),
                c("OBJECT", "ENCODING"),
                c("OBJECT", "FOO", self.key()),
                c("OBJECT", "HELP", "x"),
            ]
        )

    @production("dump", 2)
    def dump(self) -> Command | list[Step]:
        if self.multi[self.at] or self.rng.random() < 0.2:
            return c("DUMP", self.key())
        key, to = self.key(), self.key()
        return [
            self.step(c("DUMP", key)),
            self.step(self.restore_of(to, DUMPED)),
            self.step(c("GET", to)),
            *([self.step(c("PTTL", to))] if "expiry" in self.groups else []),
        ]

    def restore_of(self, key: bytes, payload: bytes) -> Command:
        time = (
            b"0"
            if self.rng.random() < 0.6 or "expiry" not in self.groups
            else b"-1"
            if self.rng.random() < 0.1
            else b"%d" % (next(self.times) * 10_000)
        )
        options = [*self.maybe(0.6, self.cased("REPLACE"))]
        if self.rng.random() < 0.2 and "expiry" in self.groups:
            time = self.moment(1000)
            options += [b"ABSTTL"]
        options += [
            *self.maybe(0.1, b"IDLETIME", self.rng.choice([b"10", b"-1", b"x"])),
            *self.maybe(0.1, b"FREQ", self.rng.choice([b"10", b"256", b"x"])),
            *self.maybe(0.03, b"foo"),
        ]
        return c("RESTORE", key, time, payload, options)

    @production("dump", 0.6)
    def restore(self) -> Command:
        return self.restore_of(
            self.key(), self.rng.choice([b"", b"foo", b"\x00\x03abc\x0a\x00" + bytes(8), self.rng.randbytes(20), b"\x00" * 11])
        )

    # ---- scan -------------------------------------------------------------------------------------------------------------------

    @production("scan", 3)
    def scan(self) -> Command | list[Step]:
        count = self.rng.choice([b"1", b"2", b"10", b"1000", b"0", b"-1", b"abc"][: 4 if self.rng.random() < 0.8 else 7])
        kind = self.rng.choice([b"string", b"STRING", b"list", b"hash", b"foo"])
        options = [
            *self.maybe(0.4, self.cased("MATCH"), self.rng.choice(PATTERNS)),
            *self.maybe(0.5, self.cased("COUNT"), count),
            *self.maybe(0.2, self.cased("TYPE"), kind),
        ]
        options += self.maybe(0.04, self.rng.choice([b"foo", b"MATCH", b"COUNT"]))
        if self.multi[self.at]:
            return c("SCAN", 0, "COUNT", 1000)
        if self.rng.random() < 0.1:
            return c("SCAN", self.rng.choice([b"", b"-1", b"abc", b"1.5", b"18446744073709551616", b" 0"]), options)
        return [self.step(c("SCAN", 0, options), loop=True)]

    @production("scan", 0.7)
    def fill(self) -> Command:
        return c("MSET", [x for i in range(self.rng.randint(5, 40)) for x in (b"c%d" % i, b"v")])

    # ---- transactions -----------------------------------------------------------------------------------------------------------

    @production("multi", 0.7)
    def begin(self) -> Command:
        self.multi[self.at] = True
        return c("MULTI")

    @production("multi", 1)
    def end(self) -> Command:
        self.multi[self.at] = False
        return c(self.rng.choice(["EXEC", "EXEC", "DISCARD"]))

    @production("multi", 1)
    def watch(self) -> Command:
        return self.rng.choice(
            [
                c("WATCH", self.some(self.key, 1, 2)),
                c("WATCH", self.some(self.key, 1, 2)),
                c("UNWATCH"),
                c("WATCH"),
                c("MULTI", "x"),
                c("EXEC", "x"),
            ]
        )

    @production("multi", 2)
    def transaction(self) -> list[Step]:
        """WATCH, perhaps; a write of the other one, perhaps; MULTI, some commands, perhaps one that is refused; the end."""
        if any(self.multi):
            return []
        here, steps = self.at, []
        if self.rng.random() < 0.6:
            steps.append(self.step(c("WATCH", self.some(self.key, 1, 2))))
        steps += self.meanwhile(here)
        steps.append(self.step(c("MULTI")))
        self.multi[here] = True
        for _ in range(self.rng.randint(0, 4)):
            steps += self.plain()
        if self.rng.random() < 0.2:
            steps.append(
                self.step(
                    self.rng.choice([c("GET"), c("FOO", "bar"), c("MULTI"), c("WATCH", self.key()), c("SET", "a"), c("INCR", "x", "y")])
                )
            )
        steps += self.meanwhile(here)
        self.multi[here] = False
        return [*steps, self.step(c(self.rng.choice(["EXEC", "EXEC", "EXEC", "DISCARD"])))]

    def meanwhile(self, here: int) -> list[Step]:
        if self.rng.random() < 0.5 or self.multi[1 - here]:
            return []
        self.at = 1 - here
        steps = self.plain()
        self.at = here
        return steps

    # ---- connections ------------------------------------------------------------------------------------------------------------

    @production("connection", 1.5)
    def ping(self) -> Command:
        return self.rng.choice(
            [c("PING"), c("PING", self.value()), c("PING", "a", "b"), c("ECHO", self.value()), c("ECHO"), c("TIME"), c("ping")]
        )

    @production("connection", 0.7)
    def select(self) -> Command:
        return c("SELECT", self.rng.choice(["0", "0", "1", "1", "15", "16", "-1", "abc", "", "99999999999999999999"]))

    @production("connection", 0.8)
    def hello(self) -> Command | list[Step]:
        if self.multi[self.at]:
            return c("PING")
        return c(
            "HELLO",
            self.rng.choice(
                [
                    [],
                    [b"2"],
                    [b"3"],
                    [b"4"],
                    [b"1"],
                    [b"abc"],
                    [b"3", b"SETNAME", b"n"],
                    [b"2", b"SETNAME", b"a b"],
                    [b"3", b"foo"],
                    [b"2", b"SETNAME"],
                ]
            ),
        )

    @production("connection", 0.3)
    def leave(self) -> Command | list[Step]:
        self.multi[self.at] = False
        if self.rng.random() < 0.5:
            return c("RESET")
        return [Step(self.at, (c(self.rng.choice(["QUIT", "quit"])),), closes=True)]

    @production("connection", 1.5)
    def client(self) -> Command | list[Step]:
        r = self.rng.random()
        if r < 0.2 and not self.multi[self.at]:
            mute = self.rng.choice([b"OFF", b"off", b"SKIP"])
            commands = [c("CLIENT", "REPLY", mute), c("SET", self.key(), self.value())]
            commands += [c("GET", self.key()), c("CLIENT", "REPLY", "ON")] if mute != b"SKIP" else []
            return [Step(self.at, (), b"".join(map(encode, [*commands, c("PING", "after")])), 1 if mute == b"SKIP" else 2)]
        return c("CLIENT", self.rng.choice([
            [b"ID"], [b"ID"], [b"GETNAME"], [b"GETNAME"], [b"SETNAME", b"n%d" % self.rng.randint(0, 9)], [b"SETNAME", b""],
            [b"SETNAME", b"a b"],
            [b"SETNAME", b"a\nb"], [b"SETNAME"], [b"REPLY", b"ON"], [b"REPLY", b"foo"],
            [b"REPLY"], [b"FOO"], [], [b"getname"],
        ]))  # fmt: skip

    @production("connection", 0.8)
    def unknown(self) -> Command:
        word = self.rng.choice([b"FOO", b"foo", b"", b"GETX", b"x" * 200, b"bin\x00\r\n\xff", b"GET SET", b"'quoted'", b"%s%n"])
        return c(word, self.some(self.value, 0, 5))

    # ---- the protocol -----------------------------------------------------------------------------------------------------------

    @production("protocol", 1.5)
    def inline(self) -> list[Step]:
        raw, replies = self.rng.choice([
            (b"PING\r\n", 1), (b"PING\n", 1), (b"  PING  \r\n", 1), (b"\r\nPING\r\n", 1), (b"\r\n\r\n\nPING\r\n", 1),
            (b'PING "a b"\r\n', 1),
            (b"PING 'it\\'s'\r\n", 1), (b'PING "\\x41\\n\\t\\"\\\\\\q"\r\n', 1), (b"PING ''\r\n", 1), (b"ping\tx\r\n", 1),
            (b"FOO bar\r\n", 1),
            (b"PING a\r\nPING b\r\n", 2), (b"*0\r\nPING\r\n", 1), (b"*-1\r\nPING\r\n", 1),
            (b"*1\r\n$4\r\nPING\r\nPING x\r\n", 2), (b"PING \xff\x01y\r\n", 1),
            (b"get " + b"k" * 3000 + b"\r\n", 1), (b"*2\r\n$4\r\nPING\r\n$0\r\n\r\n", 1), (b"*1\r\n$0\r\n\r\n", 1),
        ])  # fmt: skip
        return [Step(self.at, (), raw, replies, pieces=self.rng.choice([1, 1, 2, 5]))]

    @production("protocol", 0.8)
    def broken(self) -> list[Step]:
        self.multi[self.at] = False
        bad = self.rng.choice([
            b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\nfooz\r\n", b"*1\r\nPING\r\n", b"*1\r\n+PING\r\n", b"*1\r\n:4\r\n",
            b"*1\r\n$-1\r\n", b"*1\r\n$-10\r\n", b"*1\r\n$abc\r\n",
            b"*1\r\n$\r\n", b"*1\r\n$1.5\r\n", b"*1\r\n$536870913\r\n", b"*1\r\n$9223372036854775808\r\n",
            b"*abc\r\n", b"*1 \r\n", b"*2147483648\r\n",
            b"*99999999999999999999\r\n", b"*\r\n", b'SET k "unbalanced\r\n', b"SET k 'unbalanced\r\n",
            b'GET "a"b\r\n', b"GET 'a'b\r\n", b'"\r\n', b"*1\r\n\r\n",
            b"x" * 65_540, b"*" + b"1" * 65_540, b"*1\r\n$" + b"1" * 65_540,
        ])  # fmt: skip
        before = self.rng.choice([b"", b"", encode(c("PING", "before")), b"PING\r\n"])
        return [Step(self.at, (), before + bad, closes=True)]

    @production("protocol", 1)
    def pipeline(self) -> list[Step]:
        steps = [s for _ in range(self.rng.randint(2, 6)) for s in self.plain()]
        commands = tuple(command for s in steps if not s.pause for command in s.commands)
        return [Step(self.at, commands, pieces=self.rng.choice([1, 1, 2, 7]))] if commands else []

    # ---- sequences --------------------------------------------------------------------------------------------------------------

    def step(self, command: Command, loop: bool = False) -> Step:
        pause, self.pause = self.pause, 0.0
        return Step(self.at, (command,), pause=pause, loop=loop, pieces=2 if self.rng.random() < 0.01 else 1)

    def plain(self) -> list[Step]:
        """A single command of those that neither end a connection nor change what it is in."""
        allowed = [
            (p, w)
            for p, w in zip(self.productions, self.weights, strict=True)
            if p.production[0] not in ("multi", "connection", "protocol", "scan", "dump")
        ]
        if not allowed:
            return []
        made = self.rng.choices([p for p, _ in allowed], [w for _, w in allowed])[0]()
        return [self.step(self.spoiled(made))]

    def spoiled(self, command: Command) -> Command:
        """Most often as it is; else an argument too many, too few, or not the right one, or the name in another case."""
        r = self.rng.random()
        args = list(command)
        if r < 0.02:
            args.append(self.rng.choice(JUNK))
        elif r < 0.04 and len(args) > 1:
            args.pop()
        elif r < 0.06 and len(args) > 1:
            args[self.rng.randrange(1, len(args))] = self.rng.choice(JUNK)
            self.sequence.expiring += 1  # it may be the time of one
        elif r < 0.08:
            args[0] = args[0].lower()
        elif r < 0.085:
            args = args[:1]
        return tuple(args)

    def make(self) -> Sequence:
        length = self.rng.randint(5, 40)
        steps = self.sequence.steps
        while len(steps) < length:
            self.at = int("multi" in self.groups and self.rng.random() < 0.2)
            before = list(self.multi)
            made = self.rng.choices(self.productions, self.weights)[0]()
            if isinstance(made, list):
                steps += made
            else:
                changes = self.multi != before or made[0] in (b"RESET", b"MULTI", b"EXEC", b"DISCARD")
                steps.append(self.step(made if changes else self.spoiled(made)))
            self.pause = 0.0
        return self.sequence
