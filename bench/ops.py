"""What does each operation cost beside everything a user would pick instead?

    python bench/ops.py [--json bench/results/ops.json] [--only get]

One process; 22-byte keys drawn uniformly, fresh key objects; peers alternated, medians of 7 rounds. Runs itself inside uWSGI if that is
installed, since uWSGI's cache exists nowhere else. Cases are named get/klen=22/vlen=100; many=100 counts per key.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import peers as of
from harness import VALUE, fresh, key, loop_ns, options, report, summary
from peers import Peer, inside_uwsgi, opened

BUDGET = 48 << 20  # bytes of values that a peer is filled with at most
RECORD = {f"field{i}": [i, i * 1.5, f"value {i}", None, True][i % 5] for i in range(10)}


def with_value(put: Callable[[Any, Any], Any], value: Any) -> Callable[[Any], Any]:
    """The same frame for every peer, so that ratios are of the stores."""

    def one(k: Any) -> None:
        put(k, value)

    return one


Arguments = Callable[[Peer, int], list[Any]]  # of a peer and a round's seed


def alternate(peers: Sequence[Peer], operation: Callable[[Peer], Any], arguments: Arguments, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for r in range(rounds + 1):
        for p in peers:
            f = operation(p)
            if f is not None:
                ns = loop_ns(f, arguments(p, r))
                if r:
                    times.setdefault(p.name, []).append(ns)
    return times


class Cases:
    def __init__(self, peers: Sequence[Peer], args: Any, keys: list[bytes], vlen: int) -> None:
        self.peers, self.args, self.keys, self.vlen = peers, args, keys, vlen
        self.value = random.Random(vlen).randbytes(vlen)
        self.out: dict[str, Any] = {}
        for p in peers:
            for k in keys:
                p.set(p.key(k), bytes(bytearray(self.value)))
            p.filled()

    def drawn(self, p: Peer, seed: int, keys: Sequence[bytes] | None = None, scale: float = 1.0) -> list[Any]:
        n = max(20, int(self.args.ops * p.calls * scale * min(1.0, 3000 / (self.vlen + 1))))
        return [p.key(k) for k in fresh(keys or self.keys, n, seed)]

    def case(self, name: str, operation: Callable[[Peer], Any], arguments: Arguments, per: int = 1) -> None:
        if self.args.only and self.args.only not in name:
            return
        times = alternate(self.peers, operation, arguments, self.args.rounds)
        self.out[name] = summary({peer: [ns / per for ns in ts] for peer, ts in times.items()})

    def every(self) -> dict[str, Any]:
        of = f"klen=22/vlen={self.vlen}"
        self.case(f"get/{of}", lambda p: p.get, self.drawn)
        self.case(f"set/{of}", lambda p: p.set and with_value(p.set, self.value), self.drawn)
        return self.out

    def all_of_100_bytes(self) -> dict[str, Any]:
        self.every()
        of = "klen=22/vlen=100"
        absent = [key(i) for i in range(10**9, 10**9 + len(self.keys))]
        self.case("get/one hot key/vlen=100", lambda p: p.get, lambda p, seed: self.drawn(p, seed, self.keys[:1]))
        self.case("miss/klen=22", lambda p: p.get, lambda p, seed: self.drawn(p, seed, absent))

        def hundreds(p: Peer, seed: int) -> list[list[Any]]:
            ks = self.drawn(p, seed)
            return [ks[i : i + 100] for i in range(0, len(ks), 100)]

        self.case(f"get_many/many=100/{of}", lambda p: p.get_many, hundreds, 100)

        def hundred_items(p: Peer, seed: int) -> list[dict[Any, Any]]:
            return [dict.fromkeys(ks, self.value) for ks in hundreds(p, seed)]

        self.case(f"set_many/many=100/{of}", lambda p: p.set_many, hundred_items, 100)

        new = itertools.count(2 * 10**9)

        def to_insert(p: Peer, seed: int) -> list[Any]:
            return [p.key(key(next(new))) for _ in range(max(20, int(self.args.ops * p.calls / 4)))]

        self.case(f"insert/{of}", lambda p: p.set and with_value(p.set, self.value), to_insert)

        def to_delete(p: Peer, seed: int) -> list[Any]:
            ks = [p.key(k) for k in random.Random(seed).sample(self.keys, max(20, int(len(self.keys) * p.calls * 0.5)))]
            for k in ks:  # what the last round deleted
                p.set(k, self.value)
            return ks

        self.case(f"delete/{of}", lambda p: p.set and p.delete, to_delete)
        counters = [b"n" + k for k in self.keys[:1000]]
        for p in self.peers:
            if p.incr and p.name != "uWSGI cache":  # its counters make themselves
                for k in counters:
                    p.set(p.key(k), 1)
        self.case("incr/klen=23", lambda p: p.incr, lambda p, seed: self.drawn(p, seed, counters))
        return self.out


def peers_for(vlen: int, notes: list[str]) -> list[Callable[[int], Peer]]:
    """Those that take values of this size in reasonable time."""
    left_out = {of.uwsgi: 1000, of.ultradict: 1000, of.numpy_table: 100}
    for make, most in left_out.items():
        if vlen > most:
            notes.append(f"{make.__name__} is left out over {most} bytes: its block or buffer would be set for the largest value")
    left_out[of.plain_copy] = vlen if vlen >= 100_000 else 0  # what a copy costs is the question only where it is all that counts
    return [make for make in of.ALL if vlen <= left_out.get(make, vlen)]


def of_our_own(args: Any, keys: list[bytes], notes: list[str]) -> dict[str, Any]:
    """Kinds of keys and values, each beside our own get of 100 bytes (in place of a peer)."""
    import msgpack

    with opened(10 * BUDGET, notes, (of.ours,)) as (p,):
        packed = msgpack.packb(RECORD)
        for k in keys:
            p.set(k, b"v" * 100)
            p.set(b"int" + k, 123_456_789)
            p.set(b"str" + k, "v" * 100)
            p.set(b"rec" + k, RECORD)
            p.set(b"pak" + k, packed)
            p.set(b"tag" + k, b"v" * 100, None, ("one",))
        unpackb, get = msgpack.unpackb, p.get

        def get_and_unpack(k: bytes) -> Any:
            return unpackb(get(k))

        def get_only(k: bytes) -> Any:
            return get(k)

        kinds: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
            "shmcache": (get, lambda k: k),
            "str key": (get, bytes.decode),
            "int value": (get, lambda k: b"int" + k),
            "str value": (get, lambda k: b"str" + k),
            "value with one tag": (get, lambda k: b"tag" + k),
            "dict value, one frame": (get_only, lambda k: b"rec" + k),
            "bytes value and msgpack.unpackb, one frame": (get_and_unpack, lambda k: b"pak" + k),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for r in range(args.rounds + 1):
            for kind, (f, made) in kinds.items():
                arguments = [made(k) for k in fresh(keys, args.ops // 2, r)]
                ns = loop_ns(f, arguments)
                if r:
                    times[kind].append(ns)
        out = {"get/kinds of keys and values": summary(times)}
        put = p.set

        def with_tag(k: bytes) -> None:
            put(k, VALUE, None, ("one",))

        def with_ttl(k: bytes) -> None:
            put(k, VALUE, 100)

        new = itertools.count(2 * 10**9)
        puts: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
            "shmcache": (with_value(put, VALUE), lambda k: k),
            "value with one tag": (with_tag, lambda k: b"tag" + k),
            "with a ttl": (with_ttl, lambda k: b"ttl" + k),
            "new key": (with_value(put, VALUE), lambda k: key(next(new))),
            "new key with a ttl": (with_ttl, lambda k: key(next(new))),
        }
        times = {kind: [] for kind in puts}
        for r in range(args.rounds + 1):
            for kind, (f, made) in puts.items():
                ns = loop_ns(f, [made(k) for k in fresh(keys, args.ops // 2, r)])
                if r:
                    times[kind].append(ns)
        return out | {"set/kinds of values": summary(times)}


def evicting(args: Any, notes: list[str]) -> dict[str, Any]:
    """New keys into a full segment: each set evicts. In place of a peer: overwrites in the same segment."""
    with opened(16 << 20, notes, (of.ours,)) as (p,):
        new = itertools.count()
        put = with_value(p.set, b"v" * 100)
        for _ in range(200_000):
            put(key(next(new)))
        times: dict[str, list[float]] = {"shmcache": [], "overwrite": []}
        for r in range(args.rounds + 1):
            fresh_ones = [key(next(new)) for _ in range(args.ops)]
            ns = {"shmcache": loop_ns(put, fresh_ones), "overwrite": loop_ns(put, fresh(fresh_ones[-20_000:], args.ops, r))}
            for which in times:
                if r:
                    times[which].append(ns[which])
        return {"insert, full: evicts/klen=22/vlen=100": summary(times)}


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--vlens", default="100,1,1000,10000,1000000", help="sizes of values in bytes")
    args = parser.parse_args()
    inside_uwsgi(700_000, 1 << 10)
    if args.quick:
        args.keys, args.ops, args.rounds = args.keys // 10, args.ops // 10, 3
    notes: list[str] = []
    cases: dict[str, Any] = {}
    keys = [key(i) for i in range(args.keys)]
    for vlen in map(int, args.vlens.split(",")):
        n = min(args.keys, max(16, BUDGET // (vlen + 64)))
        with opened(4 * BUDGET, notes, peers_for(vlen, notes)) as peers:
            of = Cases(peers, args, keys[:n], vlen)
            cases |= of.all_of_100_bytes() if vlen == 100 else of.every()
    if not args.only or "kinds" in args.only:
        cases |= of_our_own(args, keys, notes)
    if not args.only or "insert" in args.only:
        cases |= evicting(args, notes)
    report(cases, list(dict.fromkeys(notes)), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
