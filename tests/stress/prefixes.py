"""Do workers wait for scripts that clear prefixes of keys which they do not declare? Such scripts, and workers that write the same keys.

    python -m tests.stress.prefixes --seconds 60 --workers 2 --clearers 2 --writers 3
    python -m tests.stress.prefixes --clearers 0                                        the same without scripts, to compare with

Each clearer runs one script after another (SCRIPTS) over a prefix of --keys keys, through the event loops of `shmcache serve`; some scripts add
to counters beside it, half of them have the pattern as KEYS[1]. Each writer is a process that has attached the segment: it sets, adds, deletes keys of all prefixes, and adds to
the counters. Prints JSON: writes, StripeBusy, the longest wait for a lock (as the segment notes it) and the longest call of the writers in ms, the
calls over 50 ms, the scripts that ran, and the errors of those that did not. Exit code 1: StripeBusy, a wait over --most, a lost increment, or a
key that a script has left over.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing as mp
import os
import random
import sys
import time
from typing import Any

import redis

import shmcache
from shmcache import errors
from tests.redis import servers

fork = mp.get_context("fork")
SLOW = 0.05  # seconds
EACH = "local n = 0 for _, k in ipairs(redis.call('keys', ARGV[1] .. '*')) do n = n + redis.call('{}', k) end return n"
SCRIPTS = {
    "keys, del each": EACH.format("del"),
    "keys, unlink each": EACH.format("unlink"),
    "keys, del all": "local k = redis.call('keys', ARGV[1] .. '*') return #k > 0 and redis.call('del', unpack(k)) or 0",
    "keys, del by 1,000": "local k = redis.call('keys', ARGV[1] .. '*') for i = 1, #k, 1000 do redis.call('del', unpack(k, i, math.min(i + 999, #k))) end",
    "scan, del": "local c = '0' repeat local r = redis.call('scan', c, 'match', ARGV[1] .. '*', 'count', 500) c = r[1] "
    "for _, k in ipairs(r[2]) do redis.call('del', k) end until c == '0'",
    "keys, get, del": "for _, k in ipairs(redis.call('keys', ARGV[1] .. '*')) do if redis.call('get', k) then redis.call('del', k) end end",
    "mget": "local k = redis.call('keys', ARGV[1] .. '*') return #k > 0 and #redis.call('mget', unpack(k)) or 0",
    "get each": "local n = 0 for _, k in ipairs(redis.call('keys', ARGV[1] .. '*')) do n = n + #(redis.call('get', k) or '') end return n",
}
COUNT = (
    "local n = redis.call('get', ARGV[2]) or 0 {} redis.call('set', ARGV[2], n + 1) return n"  # with what another script does in between
)
COUNTERS = [b"counter:%d" % i for i in range(3)]


def clear(port: int, number: int, n_keys: int, seconds: float, seed: int, out: Any) -> None:
    rng, client = random.Random(seed), redis.Redis(port=port, socket_timeout=60)
    ran, failed, counted = collections.Counter[str](), collections.Counter[str](), collections.Counter[bytes]()
    until, prefix = time.monotonic() + seconds, b"p%d:" % number
    longest = 0.0
    while time.monotonic() < until:
        with client.pipeline(transaction=False) as pipe:
            for i in range(n_keys):
                pipe.set(prefix + b"%d" % i, b"x" * 50)
            pipe.execute()
        name, counter = rng.choice(list(SCRIPTS)), rng.choice(COUNTERS)
        counts = rng.random() < 0.3
        script = COUNT.format(f"local function f() {SCRIPTS[name]} end f()") if counts else SCRIPTS[name]
        declares = rng.random() < 0.5  # the pattern, as KEYS[1]
        keys = [prefix + b"*"] if declares else []
        if declares:
            script, name = script.replace("ARGV[1] .. '*'", "KEYS[1]"), name + ", KEYS[1]"
        began = time.monotonic()
        try:
            client.eval(script, len(keys), *keys, prefix, counter)
            ran[name] += 1
            counted[counter] += counts
        except redis.ResponseError as e:
            failed[f"{name}{', counts' * counts}: {kind_of(str(e))}"] += 1
        longest = max(longest, time.monotonic() - began)
    out.put(("clearer", ran, failed, counted, longest))


def kind_of(error: str) -> str:
    return "busy" if "is busy" in error else "changed" if "was changed" in error else error


def write(name: str, prefixes: int, n_keys: int, seconds: float, seed: int, out: Any) -> None:
    rng, counted = random.Random(seed), collections.Counter[bytes]()
    n, busy, longest, slow = 0, 0, 0.0, 0
    with shmcache.attach(name) as cache:

        def count(key: bytes) -> None:
            while True:
                value, version = cache.gets(key)
                if cache.add(key, b"1") if value is None else cache.cas(key, b"%d" % (int(value) + 1), version):
                    counted[key] += 1
                    return

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(100):
                key = b"p%d:%d" % (rng.randrange(prefixes), rng.randrange(n_keys))
                use = rng.choice((cache.set, cache.set, cache.add, cache.discard))
                more = () if use == cache.discard else (b"y" * 50,)
                began = time.monotonic()
                try:
                    if n % 50:
                        use(key, *more)
                    else:
                        count(rng.choice(COUNTERS))
                except errors.StripeBusy:
                    busy += 1
                took = time.monotonic() - began
                longest, slow, n = max(longest, took), slow + (took > SLOW), n + 1
        (waited,) = (row["max_wait_ns"] / 1e9 for row in cache.processes() if row["pid"] == os.getpid())
    out.put(("writer", n, busy, longest, slow, waited, counted))


def run(seconds: float, workers: int, clearers: int, writers: int, n_keys: int, seed: int) -> dict[str, Any]:
    name = f"prefixes-{os.getpid()}"

    def argv(port: int, folder: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "shmcache.cli",
            "serve",
            name,
            "--size",
            "256M",
            "--port",
            str(port),
            "--workers",
            str(workers),
            "--lua-time-limit",
            "20000",
        ]

    try:
        with servers.running(argv) as (_, port, _pid):
            out = fork.Queue()
            jobs = [(clear, (port, i, n_keys, seconds, seed * 100 + i, out)) for i in range(clearers)]
            jobs += [(write, (name, max(1, clearers), n_keys, seconds, seed * 100 + 50 + i, out)) for i in range(writers)]
            processes = [fork.Process(target=target, args=args, daemon=True) for target, args in jobs]
            for process in processes:
                process.start()
            told = [out.get(timeout=seconds + 120) for _ in processes]
            for process in processes:
                process.join()
            found = judged(told, name, port, clearers)
    finally:
        shmcache.unlink(name)
    return found


def judged(told: list[Any], name: str, port: int, clearers: int) -> dict[str, Any]:
    of_clearers, of_writers = ([each[1:] for each in told if each[0] == kind] for kind in ("clearer", "writer"))
    counted = sum((each[2] for each in of_clearers), collections.Counter()) + sum((each[5] for each in of_writers), collections.Counter())
    client = redis.Redis(port=port, socket_timeout=60)
    left = {}
    for number in range(clearers):  # nobody writes any more: each script has to leave nothing
        for script in (name for name in SCRIPTS if "del" in name or "unlink" in name):
            client.mset({b"p%d:%d" % (number, i): b"x" for i in range(3000)})
            client.eval(SCRIPTS[script], 0, b"p%d:" % number)
            if keys := client.keys(b"p%d:*" % number):
                left[script] = len(keys)
    with shmcache.attach(name) as cache:
        is_now = {key: int(cache.get(key) or 0) for key in COUNTERS}
        damage = cache.verify()
    return {
        "writes": sum(each[0] for each in of_writers), "stripe_busy": sum(each[1] for each in of_writers),
        "longest_wait_ms": round(1000 * max((each[4] for each in of_writers), default=0), 1),
        "longest_call_ms": round(1000 * max((each[2] for each in of_writers), default=0), 1),
        "calls_over_50_ms": sum(each[3] for each in of_writers),
        "scripts": dict(sum((each[0] for each in of_clearers), collections.Counter())),
        "failed": dict(sum((each[1] for each in of_clearers), collections.Counter())),
        "longest_script_ms": round(1000 * max((each[3] for each in of_clearers), default=0), 1),
        "increments": sum(counted.values()), "lost": {key.decode(): counted[key] - is_now[key] for key in COUNTERS if counted[key] > is_now[key]},
        "left": left, "damage": damage,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2, help="event loops (2)")
    parser.add_argument("--clearers", type=int, default=2, metavar="N", help="clients that run scripts (2)")
    parser.add_argument("--writers", type=int, default=3, metavar="N", help="processes that write beside them (3)")
    parser.add_argument("--keys", type=int, default=5000, metavar="N", help="of a prefix (5000)")
    parser.add_argument("--most", type=float, default=50, metavar="MS", help="that a writer may wait for a lock (50)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    result = run(args.seconds, args.workers, args.clearers, args.writers, args.keys, args.seed)
    print(json.dumps({"seed": args.seed, **result}))
    return (
        1 if result["stripe_busy"] or result["longest_wait_ms"] > args.most or result["lost"] or result["left"] or result["damage"] else 0
    )


if __name__ == "__main__":
    sys.exit(main())
