"""Does write-back lose anything, or store it out of order? Workers write while the supervisor, which stores, is killed again and again.

    python -m tests.stress.writeback --updates 1000000 --keys 10000 --kill-every 0.2 --seed 1
    python -m tests.stress.writeback --store postgresql

At the end a supervisor is left alone till everything is stored: each row has then to be the last value of its key, which is the last that one
of the workers wrote there, and what was deleted last has to be gone. A trigger in the database writes down each row that is stored, with its
version: no key's versions may ever go back. Prints JSON; exit code 1: something is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shmcache
from shmcache.supervisor.loop import Supervisor
from tests.stress.rows import History

TABLE = "writeback"
fork = mp.get_context("fork")


def write(name: str, worker: int, updates: int, keys: int, pace: float, seed: int, folder: str) -> None:
    rng = random.Random(seed * 1000 + worker)
    last: dict[int, str | None] = {}
    longest = 0.0
    with shmcache.attach(name) as cache:
        began = time.monotonic()
        for n in range(updates):
            number = int(rng.random() * keys)
            at = time.monotonic()
            if rng.random() < 0.01:
                cache.delete(b"%d" % number)
                last[number] = None
            else:
                last[number] = f"{worker} {n} " + "v" * (n % 7 * 60)  # of several slab classes
                cache.set(b"%d" % number, last[number])
            longest = max(longest, time.monotonic() - at)
            if pace and n % 100 == 0:
                time.sleep(max(0.0, began + n / pace - time.monotonic()))
    Path(folder, str(worker)).write_bytes(pickle.dumps((last, longest)))


def supervise(name: str, url: str) -> None:
    with shmcache.attach(name) as cache:
        supervisor = Supervisor(cache, store=shmcache.SQLStore(url, TABLE))
        signal.signal(signal.SIGTERM, supervisor.stop)
        supervisor.run()


def run(url: str, updates: int, keys: int, kill_every: float, pace: float, seed: int) -> dict[str, Any]:
    name = f"writeback-{os.getpid()}"
    rng = random.Random(seed)
    store = shmcache.SQLStore(url, TABLE)
    rows = History(url, TABLE)
    kills = 0
    wrong: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cache = shmcache.create(name, "64M", store=store, policy=shmcache.Policy("back", flush_every=0.1, timeout=30.0))
        workers = [fork.Process(target=write, args=(name, i, updates // 4, keys, pace / 4, seed, folder)) for i in range(4)]
        supervisor = fork.Process(target=supervise, args=(name, url))
        try:
            for process in (*workers, supervisor):
                process.start()
            while any(w.is_alive() for w in workers):
                supervisor.join(rng.uniform(0, 2 * kill_every))
                if supervisor.exitcode is not None:
                    wrong.append(f"a supervisor ended with {supervisor.exitcode}")
                os.kill(supervisor.pid, signal.SIGKILL)
                supervisor.join()
                kills += 1
                supervisor = fork.Process(target=supervise, args=(name, url))
                supervisor.start()
            wrote = time.monotonic() - began
            wrong += [f"a worker ended with {w.exitcode}" for w in workers if w.exitcode]
            cache.flush(120)
            flushed = time.monotonic() - began
            lasts = [pickle.loads(path.read_bytes()) for path in Path(folder).iterdir()]
            names = [b"%d" % i for i in range(keys)]
            stored: dict[bytes, Any] = {}
            for i in range(0, keys, 500):
                stored |= store.load_many(names[i : i + 500], timeout=60.0)
            history = rows.taken()
            for i, key in enumerate(names):
                row = stored.get(key)
                value = None if row is None else row.value
                cached = cache.peek(key)
                possible = [last[i] for last, _ in lasts if i in last] or [None]
                if value not in possible or (cached is not None and cached != value):
                    wrong.append(f"key {i}: stored {value}, cached {cached}, written last by a worker {possible}")
            newest: dict[bytes, int] = {}
            for key, _, version in history:
                if version <= newest.get(key, 0):
                    wrong.append(f"key {key!r}: version {version} stored after {newest[key]}")
                newest[key] = version
            wrong += cache.verify()
            left = int(cache.segment.header["dirty"])
        finally:
            for process in (*workers, supervisor):
                if process.is_alive():
                    process.terminate() if process is supervisor else process.kill()
                process.join()
            cache.close()
            shmcache.unlink(name)
            store.close()
            rows.close()
    return {
        "store": url.partition(":")[0], "updates": updates, "keys": keys, "kills": kills, "rows_written": len(history), "updates_per_row": round(updates / max(1, len(history)), 1),
        "longest_write_s": round(max(longest for _, longest in lasts), 3), "write_s": round(wrote, 1), "flush_s": round(flushed - wrote, 1), "dirty_bytes_left": left, "wrong": len(wrong), "first": wrong[:5],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--kill-every", type=float, default=0.2, metavar="S", help="on average (0.2)")
    parser.add_argument("--pace", type=float, default=0, metavar="N", help="updates a second of all workers; 0: as fast as they can (0)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.store == "postgresql":
        from tests.postgres import postgres_server

        with postgres_server() as url:
            result = run(url, args.updates, args.keys, args.kill_every, args.pace, args.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(f"sqlite:///{folder}/writeback.db", args.updates, args.keys, args.kill_every, args.pace, args.seed)
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
