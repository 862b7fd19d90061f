"""Does anything that a client may send hurt the sidecar? Fuzzing of its parser and executor, in this process, on a real segment.

    python -m tests.redis.fuzz --inputs 10000000 --seed 1      on a build with AddressSanitizer and UndefinedBehaviourSanitizer
    python -m tests.redis.fuzz --inputs 200000 --plain         on the build at hand
    python -m tests.redis.fuzz --seed 1 --at 123456            that input again, with those of its batch before it; it is printed

An input is what one new connection sends, most often a pipeline, in one read or in several; some connections are open at a time, and their
reads come in turns. Inputs are made of the grammar of grammar.py and of commands that it leaves out, then most of them are damaged: bits
flipped, lengths lied about, parts cut, doubled, put in; some are inline commands, some are random bytes, some are scripts: calls of every
function that a script can reach, with false lengths and numbers at limits. Each batch has a segment of its own,
so that an input is made by its seed and number alone, and found again with its batch. With PYTHONMALLOC=malloc the sanitizers see the bounds
of small Python objects, too, for half as much time again.

Never may there be a crash, a report of the sanitizers, an exception out of feed(), a read beyond what was fed (it lies before a page that
cannot be read), a call that does not end, a reply that is no whole RESP (looked at in every 16th input), a connection that keeps more
than what it has sent warrants, memory that grows, damage in the segment, or a new connection that is not answered. Exit code 0: none of it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import mmap
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import shmcache
from shmcache.core import _resp
from shmcache.sidecar import commands
from shmcache.sidecar.commands import connection
from tests import special
from tests.redis import grammar
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode, parse

BATCH = 5000  # inputs on one segment
OPEN = 6  # connections at a time, at most
STUCK = 60.0  # seconds for a batch: with sanitizers, on a busy machine
GROWTH = 64 << 20  # bytes that the process may have grown by: what sanitizers keep of what was freed is in it
LOOKED_AT = 16  # of so many inputs the replies of one are taken apart
FAILURES = 10  # then it ends
MAX_VALUE = 160_000  # bytes; over half a page: the largest are big values
MOST_PENDING = 1 << 20
REGION = 1 << 20  # bytes of one read
PASSWORD = b"secret"
PAGE = mmap.PAGESIZE

KEYS = [*grammar.KEYS, b"c1", b"\0ns\0db:1", b"\0the empty key\0", b"x" * 4096, b"x" * 4097, b"x" * 5000]
LIES = [b"-1", b"0", b"1", b"-2", b"10", b"11", b"16384", b"16385", b"65536", b"65537", b"%d" % MAX_VALUE, b"%d" % (MAX_VALUE + 1), b"1048576",
        b"1048577", b"2147483647", b"2147483648", b"4294967295", b"4294967296", b"9223372036854775807", b"9223372036854775808",
        b"-9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"", b" 1", b"+1", b"01", b"-0", b"1e3", b"1" * 30]  # fmt: skip
ALPHABET = [b"*", b"$", b"\r\n", b"\r", b"\n", b"0", b"1", b"2", b"3", b"-", b"GET", b"SET", b" ", b'"', b"'", b"\\x4", b"\\", b"\0", b"k1", b"*1\r\n", b"*2\r\n",
            b"$3\r\n", b"$-1\r\n", b"*-1\r\n", b":1\r\n", b"PING\r\n", b"\xff"]  # fmt: skip
NUMBERS = [*grammar.INTEGERS, *grammar.NO_INTEGERS, b"%d" % (MAX_VALUE - 1), b"%d" % MAX_VALUE, b"%d" % (8 * MAX_VALUE - 1), b"%d" % (8 * MAX_VALUE)]
WORDS = [*KEYS, *NUMBERS, *grammar.FLOATS, *grammar.NO_FLOATS, *grammar.JUNK, *grammar.PATTERNS, b"EX", b"PX", b"EXAT", b"PXAT", b"XX", b"KEEPTTL",
         b"PERSIST", b"WITHMATCHLEN", b"IDX", b"LEN", b"COUNT", b"MATCH", b"REPLACE", b"u8", b"i64", b"#1", b"OVERFLOW", b"FAIL", b"AND", b"NOT"]  # fmt: skip
DUMPS = [b"\0\xc3\t@d\1aa\xe0W\0\1aa\n\0\xe8\xa3\xb5\7\xb0m\xf2q", b"\0\xc0{\n\0H\xe2S\xe1\0zg\xb9", b"\0\xc3\xc1\xff\xff\xff\xff" + bytes(12)]
NAMES = [name.encode() for name in commands.TABLE]
RARE = {"keys", "info", "command", "hello", "flushall", "flushdb", "shutdown", "quit", "monitor", "client", "config", "lcs"}  # costly, or end others' work
FUNCTIONS = (
    b"assert collectgarbage error getfenv getmetatable ipairs load loadstring next pairs pcall rawequal rawget rawset select setfenv setmetatable tonumber tostring type unpack xpcall "
    b"string.byte string.char string.dump string.find string.format string.gmatch string.gsub string.len string.lower string.match string.rep string.reverse string.sub string.upper "
    b"table.concat table.foreach table.foreachi table.getn table.insert table.maxn table.remove table.setn table.sort "
    b"math.abs math.ceil math.exp math.floor math.fmod math.frexp math.ldexp math.log math.max math.min math.modf math.pow math.random math.randomseed math.sqrt "
    b"bit.arshift bit.band bit.bnot bit.bor bit.bswap bit.bxor bit.lshift bit.rol bit.ror bit.rshift bit.tobit bit.tohex cjson.encode cjson.decode "
    b"coroutine.create coroutine.resume coroutine.running coroutine.status coroutine.wrap coroutine.yield "
    b"redis.call redis.pcall redis.error_reply redis.status_reply redis.sha1hex redis.log redis.setresp redis.acl_check_cmd redis.set_repl"
).split()  # fmt: skip
VALUES = (
    b"nil true false 0 1 -1 2 255 256 0/0 1/0 -1/0 2^31 2^31-1 -2^31 2^32 2^53 2^63 1e300 0.5 '' 'a' '-1' '\\0' '%' '%1' '%b()' '(.-)%1' '[^' '.-b' '%s%d%q' '[1,{' '{\"a\":1}' {} {1,2,3} {err='x'} "
    b"{ok='x\\r\\n'} {n=1e9} {[2^30]=1} {double=1} KEYS ARGV KEYS[1] ARGV[1] t s big _G string print tostring f co t.t"
).split()  # fmt: skip
BEFORE = (b"local t = {} for i = 29, 0, -1 do t[2 ^ i] = 1 end t.t = t local s, big = ('x'):rep(300), ('ab'):rep(40000) "
          b"local function f(...) return ... end local co = coroutine.create(f) ")  # fmt: skip
LENGTH = re.compile(rb"(?<=[*$])-?\d{1,20}(?=\r\n)")

OTHERS = [grammar.c(*words.split()) for words in (
    "SUBSCRIBE a b", "PSUBSCRIBE a* h[ae]*", "UNSUBSCRIBE", "UNSUBSCRIBE a", "PUNSUBSCRIBE", "PUBLISH a hello", "PUBLISH hallo x", "PUBSUB CHANNELS",
    "PUBSUB NUMSUB a b", "PUBSUB NUMPAT", "PUBSUB SHARDCHANNELS", "MONITOR", "CLIENT LIST", "CLIENT INFO", "CLIENT LIST ID 1 2", "CLIENT KILL ID 3",
    "CLIENT KILL TYPE normal", "CLIENT KILL TYPE pubsub SKIPME no", "CLIENT PAUSE 1000", "CLIENT PAUSE 1000 WRITE", "CLIENT UNPAUSE", "CLIENT NO-EVICT on",
    "SELECT 0", "SELECT 1", "SELECT 3", "SELECT 4", "COPY k1 k2 DB 2", "COPY k1 k1 DB 1 REPLACE", "CLIENT REPLY OFF", "CLIENT REPLY SKIP", "CLIENT REPLY ON", "CONFIG GET *", "CONFIG GET max* save", "CONFIG SET timeout 5", "CONFIG SET requirepass other",
    "CONFIG SET maxclients 3", "CONFIG SET slowlog-log-slower-than 0", "CONFIG SET slowlog-max-len 3", "CONFIG RESETSTAT", "SLOWLOG GET", "SLOWLOG GET -1",
    "SLOWLOG LEN", "SLOWLOG RESET", "LATENCY LATEST", "LATENCY DOCTOR", "MEMORY USAGE k1", "MEMORY DOCTOR", "INFO", "INFO all", "COMMAND COUNT",
    "COMMAND DOCS get", "COMMAND INFO get foo", "COMMAND GETKEYS mset a b c d", "COMMAND LIST FILTERBY PATTERN *get*", "DEBUG SLEEP 0", "WAIT 0 0",
    "ROLE", "LASTSAVE", "SAVE", "BGSAVE", "BGREWRITEAOF", "SHUTDOWN NOSAVE", "SHUTDOWN ABORT", "FUNCTION FLUSH", "AUTH secret", "AUTH wrong",
    "AUTH default secret", "AUTH other secret", "HELLO 3 AUTH default secret SETNAME n", "HELLO 2 AUTH default wrong", "RESET", "QUIT", "MULTI", "EXEC",
    "ACL SETUSER bob on nopass ~k* %R~h* &a* +@all -@dangerous +select|0", "ACL SETUSER bob resetkeys -get", "AUTH bob x", "AUTH bob x", "ACL DELUSER bob",
    "ACL SETUSER default off", "ACL LIST", "ACL GETUSER bob", "ACL CAT read", "ACL LOG", "ACL LOG RESET", "ACL DRYRUN bob GET k1", "ACL WHOAMI", "ACL SAVE",
    "SCRIPT FLUSH", "SCRIPT FLUSH ASYNC", "SCRIPT EXISTS 0 da39a3ee5e6b4b0d3255bfef95601890afd80709", "SCRIPT KILL", "EVALSHA da39a3ee5e6b4b0d3255bfef95601890afd80709 0",
)]  # fmt: skip


class Maker:
    """The inputs of one batch, each a list of reads."""

    def __init__(self, seed: int, batch: int, locked: bool) -> None:
        self.rng = rng = random.Random(f"{seed}:{batch}")
        self.locked = locked
        self.corpus = [raw or encode(self.word_of_a_dump(command)) for command, raw in self.grammars(seed, batch)]
        self.corpus += [encode(rng.choice(OTHERS)) for _ in range(12)]
        names = [rng.choice(NAMES) for _ in range(60)]
        self.corpus += [encode((name, *rng.choices(WORDS, k=rng.choice((0, 1, 1, 2, 2, 3, 4, 6))))) for name in names if self.often_enough(name)]
        self.corpus += [encode(self.script()) for _ in range(12)]
        self.large = [self.of_a_limit() for _ in range(10)]

    def grammars(self, seed: int, batch: int) -> Iterator[tuple[grammar.Command, bytes | None]]:
        for number in range(20):
            for step in grammar.Grammar(seed, batch * 20 + number).make().steps:
                if step.raw is not None:
                    if len(step.raw) < 60_000 or self.rng.random() < 0.1:
                        yield (), step.raw
                else:
                    yield from ((command, None) for command in step.commands if self.often_enough(command[0]))

    def often_enough(self, name: bytes) -> bool:
        return name.decode("latin-1").lower() not in RARE or self.rng.random() < 0.1

    def word_of_a_dump(self, command: grammar.Command) -> grammar.Command:
        return tuple(self.rng.choice(DUMPS) if word == grammar.DUMPED else word for word in command)

    def script(self) -> grammar.Command:
        """Of some calls. A script that is run again has learnt nothing."""
        rng, lines = self.rng, [BEFORE]
        for _ in range(rng.choice((1, 2, 4, 8))):
            called = rng.choice(FUNCTIONS)
            if called in (b"redis.call", b"redis.pcall") or rng.random() < 0.3:
                words = rng.choice([rng.choice(OTHERS), (rng.choice(NAMES), *rng.choices(WORDS, k=rng.choice((0, 1, 2, 3))))])
                given = [b"'" + b"".join(b"\\%03d" % c for c in word[:300]) + b"'" for word in words]
                called = rng.choice((b"redis.call", b"redis.pcall"))
            else:
                given = rng.choices(VALUES, k=rng.choice((0, 1, 1, 2, 2, 3, 4)))
            call = b", ".join((called, *given))
            lines.append(rng.choice((
                b"local ok, r = pcall(%b) ", b"t[#t + 1] = {pcall(%b)} ", b"for i = 1, 30 do pcall(%b) end ", b"coroutine.wrap(function() return pcall(%b) end)() ",
                b"local r = select(2, pcall(%b)) t.r = r ", b"xpcall(function() return pcall(%b) end, f) ",
            )) % call)  # fmt: skip
        lines.append(rng.choice((b"", b"return 1", b"return t", b"return s", b"return {t, s}", b"return pcall(f, t)", b"error(t)", b"error(s)", b"return t.r", b"while true do end")))
        if rng.random() < 0.1:
            return grammar.c("SCRIPT", "LOAD", b"".join(lines))
        keys = rng.choices(KEYS, k=rng.choice((0, 1, 1, 2)))
        return grammar.c(rng.choice(("EVAL", "EVAL", "EVAL_RO")), b"".join(lines), len(keys), keys, rng.choices(WORDS, k=rng.choice((0, 1, 2))))

    def of_a_limit(self) -> bytes:
        """Near what a value, a key, a reply, or the number of arguments may have."""
        rng = self.rng
        size = rng.choice((MAX_VALUE - 1, MAX_VALUE, MAX_VALUE, MAX_VALUE + 1, 65_536, 65_537, 32_000, 16_384, 4096, 4097))
        key = rng.choice(KEYS)
        return rng.choice((
            lambda: encode((b"SET", key, b"v" * size)), lambda: encode((b"SET", key, b"v" * size)) + encode((b"GET", key)), lambda: encode((b"APPEND", key, b"a" * (size // 3))),
            lambda: encode((b"SETRANGE", key, b"%d" % (size - 1), b"x")), lambda: encode((b"SETBIT", key, b"%d" % (8 * size - 1), b"1")), lambda: encode((b"ECHO", b"e" * size)),
            lambda: encode((b"MGET", *[key] * rng.choice((10, 300)))), lambda: encode((b"DEL", *(b"d%d" % i for i in range(3000)))), lambda: encode((b"x" * size,)),
            lambda: encode((b"BITOP", b"NOT", b"k2", key)), lambda: b"PING " + b"i" * size + b"\r\n", lambda: encode((b"MSET", *(b"m%d" % (i // 2) for i in range(2000)))),
            lambda: encode((b"MULTI",)) + encode((b"SET", key, b"q" * size)) * 3 + encode((b"EXEC",)), lambda: b"*1048576\r\n" + b"$1\r\nx\r\n" * (size // 7),
        ))()  # fmt: skip

    def below(self, n: int) -> int:
        """A third of what randrange costs."""
        return int(self.rng.random() * n)

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.random() * len(choices))]

    def inline(self) -> bytes:
        quoted = []
        for word in [self.one_of(NAMES[:40]), *(self.one_of(WORDS[:80]) for _ in range(self.below(5)))]:
            r = self.rng.random()
            if r < 0.3:
                word = b'"' + word.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
            elif r < 0.5:
                word = b"'" + word.replace(b"'", b"\\'") + b"'"
            elif r < 0.6:
                word = b'"' + b"".join(b"\\x%02x" % c for c in word[:20]) + b'"'
            quoted.append(word)
        return self.one_of((b" ", b" ", b"\t", b"  ", b"\0")).join(quoted) + self.one_of((b"\r\n", b"\r\n", b"\n", b"\r", b""))

    def whole(self) -> bytes:
        """What a client of good will sends; or nearly."""
        rng = self.rng
        r = rng.random()
        if r < 0.86:
            data = b"".join(rng.choices(self.corpus, k=self.one_of((1, 1, 2, 2, 3, 4, 6))))
        elif r < 0.865:
            data = b"".join(rng.choices(self.corpus, k=self.one_of((50, 100, 300))))
        elif r < 0.93:
            data = b"".join(self.inline() for _ in range(self.one_of((1, 1, 2, 3))))
        elif r < 0.96:
            data = b"".join(rng.choices(ALPHABET, k=1 + self.below(20)))
        elif r < 0.99:
            data = rng.randbytes(1 + self.below(60))
        else:
            data = self.one_of(self.large)
        r = rng.random()
        if r < 0.1:
            data = b"*1\r\n$5\r\nMULTI\r\n" + data + b"*1\r\n$4\r\nEXEC\r\n"
        elif r < 0.15:
            data = b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n" + data
        elif r < 0.25:
            data = b"*2\r\n$6\r\nSELECT\r\n$1\r\n2\r\n" + data
        if self.locked and rng.random() < 0.6:
            data = b"*2\r\n$4\r\nAUTH\r\n$6\r\nsecret\r\n" + data
        return data

    def damaged(self, data: bytes) -> bytes:
        n = len(data)
        at = self.below(n)
        how = self.below(9)
        if how < 2:
            changed = bytearray(data)
            for _ in range(self.one_of((1, 1, 2, 8))):
                changed[self.below(n)] ^= 1 << self.below(8)
            return bytes(changed)
        if how < 5 and (found := LENGTH.search(data, at) or LENGTH.search(data)):
            first, end = found.span()
            lie = self.one_of(LIES) if self.below(2) else b"%d" % (int(data[first:end]) + self.one_of((-1, 1, 2, 100)))
            return data[:first] + lie + data[end:]
        if how == 5:
            return data[:at]
        length = self.one_of((1, 1, 2, 3, 8, 30))
        if how == 6:
            return data[:at] + data[at + length :]
        if how == 7:
            return data[:at] + data[at : at + length] * self.one_of((2, 2, 3, 50)) + data[at + length :]
        return data[:at] + (self.one_of(ALPHABET) if self.below(2) else self.rng.randbytes(length)) + data[at:]

    def input(self) -> list[bytes]:
        data = self.whole()
        r = self.rng.random()
        while r < 0.5 and data:
            data = self.damaged(data)
            r += 0.2
        data = data or b"\0"
        r = self.rng.random()
        n = len(data)
        if n > REGION or r < 0.6:
            return [data[i : i + REGION] for i in range(0, n, REGION)]
        if r < 0.62 and n < 80:
            return [data[i : i + 1] for i in range(n)]
        cuts = sorted(self.below(n + 1) for _ in range(1 if r < 0.9 else 4))
        return [piece for a, b in zip([0, *cuts], [*cuts, n], strict=True) if (piece := data[a:b])]


class Region:
    """Memory that ends with a page which cannot be read: what lies at its end is read by nobody beyond its length."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, REGION + PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + REGION), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.view = memoryview(self.memory)

    def place(self, data: bytes) -> memoryview:
        at = REGION - len(data)
        self.view[at:REGION] = data
        return self.view[at:REGION]


class Batch:
    """Inputs `first` to `first` + n of a seed; number is a counter that others can read: of the input that is being fed."""

    def __init__(self, seed: int, first: int, region: Region, number: Any) -> None:
        self.seed, self.first, self.region, self.number = seed, first, region, number
        self.said: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.failed: list[str] = []

    def run(self, n: int, show: int | None = None) -> dict[str, Any]:
        batch = self.first // BATCH
        name = f"q-fuzz-{os.getpid()}"
        locked = batch % 8 == 7
        self.maker = Maker(self.seed, batch, locked)
        cache = shmcache.create(name, "4M", max_value=MAX_VALUE, stripes=64, max_processes=4)
        try:
            self.server = server = InProcess(name, {"databases": "4", "lua-time-limit": "20", **({"requirepass": PASSWORD.decode()} if locked else {})})
            server.executor.most_pending = MOST_PENDING
            self.settings, self.users = dict(server.settings), dict(server.users)
            self.serve(n, show)
            self.settled()
            if not self.answers():
                self.failed.append(f"batch of {self.first}: a new connection is not answered")
            self.failed += [f"batch of {self.first}: {text}" for text in cache.verify()[:3]]
            calls = {name: calls for name, (calls, *_) in server.executor.command_stats().items()}
            commands_n = server.executor.commands
            server.close()
        finally:
            cache.close()
            shmcache.unlink(name)
            self.server = None
        return {"inputs": n, "outcomes": self.said, "replies": self.kinds, "commands": commands_n, "calls": calls, "failed": self.failed}

    def serve(self, n: int, show: int | None) -> None:
        rng, given = self.maker.rng, 0
        waiting: list[tuple[int, Any, list[bytes], bool]] = []  # (number, client, reads that are left, the next one last, are replies looked at)
        while given < n or waiting:
            if given < n and len(waiting) < OPEN and (not waiting or rng.random() < 0.5):
                number = self.first + given
                reads = self.maker.input()
                if number == show:
                    print(f"input {number}: {reads}", flush=True)
                self.settled()
                # CLIENT REPLY within MULTI leaves replies out of EXEC's array, in Redis too
                looked_at = number % LOOKED_AT == 0 and b"reply" not in b"".join(reads).lower()
                waiting.append((number, self.server.connect(), reads[::-1], looked_at))
                given += 1
            at = self.maker.below(len(waiting))
            number, client, left, looked_at = waiting[at]
            self.number[0] = number
            try:
                client.feed(self.region.place(left.pop()))
                self.server.turn()
                client.flush()
                self.keeps_little(number, client)
                if left and not client.closing:
                    continue
                self.end(client)
                if looked_at:
                    self.take_apart(number, b"".join(client.transport.written))
                client.transport.written.clear()
            except Exception:
                self.failed.append(f"input {number}: {traceback.format_exc(limit=-4)}")
                self.said["exception"] += 1
            del waiting[at]

    def settled(self) -> None:
        """What other inputs have left behind for all: time has gone, somebody has set the settings right."""
        server = self.server
        if server.executor.paused_until:
            connection.unpause(server)
            server.turn()
        if server.settings != self.settings:
            server.configure(self.settings)
        if server.users != self.users:
            server.take_users({**dict.fromkeys(server.users), **self.users})
            server.turn()

    def keeps_little(self, number: int, client: Any) -> None:
        pending, unsent = client.buffered
        if client.blocked or client.closing:
            return
        # a buffer that was doubled or has not been trimmed, 16 bytes for each argument, a reply's buffer
        most = 4 * (pending + MAX_VALUE) + 6 * pending + 17_000 if pending else 8 * 16
        if pending > MOST_PENDING or unsent or client.memory > most:
            self.failed.append(f"input {number}: the connection keeps {client.memory} bytes for {pending} that are pending and {unsent} unsent")

    def end(self, client: Any) -> None:
        """The client has sent all."""
        pipe = client.transport
        if client.closing:
            last = pipe.written[-1] if pipe.written else b""
            said = "protocol error" if b"-ERR Protocol error" in last else "closed"
        elif client.blocked:
            said = "put off"
        elif client.buffered[0]:
            said = "half a command"
        elif client.in_multi:
            said = "in a transaction"
        else:
            said = "subscribed" if client.in_pubsub else "answered" if pipe.written else "nothing to answer"
        self.said[said] += 1
        pipe.abort()
        self.server.turn()

    def take_apart(self, number: int, data: bytes) -> None:
        at = 0
        try:
            while at < len(data):
                found = parse(data, at)
                if found is None:
                    raise ValueError("half a reply")
                self.kinds[found[0].kind.decode()] += 1
                at = found[1]
        except ValueError as e:
            self.failed.append(f"input {number}: {e} at {at} of {data[:400]!r}")

    def answers(self) -> bool:
        said = b"".join((encode((b"AUTH", PASSWORD)) if self.settings["requirepass"] else b"", b"PING\r\n"))
        return self.server.say(self.server.connect(), said).endswith(b"+PONG\r\n")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def work(seed: int, first: int, inputs: int, number: Any, out: int) -> None:
    """Batch after batch from input `first`, a line of JSON for each."""
    region = Region()
    gc.freeze()
    gc.disable()  # a batch is collected at its end
    with open(out, "w") as lines:
        while first < inputs:
            batch = Batch(seed, first, region, number)
            said = batch.run(min(BATCH, inputs - first))
            del batch
            gc.collect()
            lines.write(json.dumps({**said, "resident": resident()}) + "\n")
            lines.flush()
            first += BATCH


def watch(seed: int, inputs: int) -> dict[str, Any]:
    """A child works; when it dies or hangs, that is noted, and another one goes on with the batch behind."""
    report: dict[str, Any] = {"seed": seed, "inputs": 0, "commands": 0, "outcomes": collections.Counter(), "replies": collections.Counter(), "failed": [],
                              "grown": 0, "calls": collections.Counter()}  # fmt: skip
    memory = mmap.mmap(-1, 8)
    number = memoryview(memory).cast("q")
    first = 0
    while first < inputs and len(report["failed"]) < FAILURES:
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(r)
            status = 1
            try:
                work(seed, first, inputs, number, w)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(w)
        sizes = []
        ended = "ended"
        with open(r, "rb", buffering=0) as lines:
            rest = b""
            while True:
                if not select.select([lines], [], [], STUCK)[0]:
                    os.kill(pid, signal.SIGABRT)
                    ended = f"a batch did not end in {STUCK:.0f} s"
                    break
                data = lines.read(1 << 16)
                if not data:
                    break
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    said = json.loads(line)
                    first += said["inputs"]
                    sizes.append(said["resident"])
                    for key in ("inputs", "commands"):
                        report[key] += said[key]
                    for key in ("outcomes", "replies", "calls"):
                        report[key].update(said[key])
                    report["failed"] += said["failed"]
                    print(*said["failed"], sep="\n", end="\n" * bool(said["failed"]), file=sys.stderr, flush=True)
                    if report["inputs"] % (40 * BATCH) == 0:
                        print(f"{report['inputs']:,} inputs, {sizes[-1] >> 20} MB", file=sys.stderr, flush=True)
                if len(report["failed"]) >= FAILURES:
                    os.kill(pid, signal.SIGTERM)
                    break
        status = os.waitpid(pid, 0)[1]
        if status and len(report["failed"]) < FAILURES:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
            report["failed"].append(f"input {number[0]}: {ended}, {how}: python -m tests.redis.fuzz --seed {seed} --at {number[0]}")
            print(report["failed"][-1], file=sys.stderr, flush=True)
            first += BATCH
        with contextlib.suppress(shmcache.SegmentNotFound):
            shmcache.unlink(f"q-fuzz-{pid}")
        if len(sizes) >= 8:  # the first and the last of it are the smallest of some batches: what is used for a moment is not growth
            part = max(3, len(sizes) // 10)
            report["grown"] = max(report["grown"], min(sizes[-part:]) - min(sizes[2 : 2 + part]))
    if report["grown"] > GROWTH:
        report["failed"].append(f"the process has grown by {report['grown'] >> 20} MB")
    report["never run"] = sorted(set(commands.TABLE) - set(report.pop("calls")))
    return report


def sanitized() -> bool:
    return b"__asan_init" in Path(_resp.__file__).read_bytes()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="only this input, behind those of its batch before it")
    parser.add_argument("--plain", action="store_true", help="on this build, without sanitizers")
    args = parser.parse_args(argv)
    if not args.plain and not sanitized():
        folder, argv_, env = special.sanitized("tests.redis.fuzz", *(sys.argv[1:] if argv is None else argv), handle_segv=1, quarantine_size_mb=16)
        return subprocess.run(argv_, env=env, cwd=folder).returncode
    if args.at is not None:
        first = args.at // BATCH * BATCH
        said = Batch(args.seed, first, Region(), [0]).run(args.at - first + 1, show=args.at)
        print(*said["failed"], sep="\n")
        return 1 if said["failed"] else 0
    began = time.monotonic()
    report = watch(args.seed, args.inputs)
    report["seconds"] = round(time.monotonic() - began, 1)
    report["sanitizers"] = sanitized()
    print(json.dumps(report, indent=1))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
