"""Does write-back with a log lose anything when all is killed and the segment is gone, again and again, also in the middle of a restore?

    python -m tests.stress.reboot --rounds 40 --seed 1
    python -m tests.stress.reboot --store postgresql

Workers write numbers that grow, every seventh write is a delete, and read each key before they write it: what they find may not be older than
what was acknowledged. After each reboot no row may have gone back, and at the end each is what was acknowledged last, or what was in hand when
the last reboot came. Prints JSON; exit code 1: something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shmcache
from shmcache import cache as cache_module
from shmcache import errors
from tests.stress.numbers import Numbers, attached, work

TABLE = "reboot"
WORKERS = 2
NAMES = [b"%d" % key for key in range(4000)]
fork = mp.get_context("fork")


def looked_at(name: str) -> bool:
    """Once there is such a segment: is it being restored? Whoever attaches may have to wait for that."""
    while True:
        try:
            with cache_module.attach_unsettled(name) as cache:
                return bool(cache.durability()["restoring"])
        except errors.SegmentNotFound:
            time.sleep(0.001)


def rows(store: Any) -> list[int | None]:
    found = store.load_many(NAMES, timeout=60.0)
    return [found[name].value if name in found else None for name in NAMES]


def run(url: str, rounds: int, seed: int) -> dict[str, Any]:
    name, rng, numbers = f"reboot-{os.getpid()}", random.Random(seed), Numbers(NAMES)
    began, restores_killed, supervisors_killed = time.monotonic(), 0, 0
    processes: list[Any] = []
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder, contextlib.closing(shmcache.SQLStore(url, TABLE)) as store:
        wrong = manager.list()
        command = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--quiet", "--size", "16M", "--policy", "back", "--store", url, "--store-table", TABLE,
                   "--data-dir", folder, "--log", "always", "--snapshot-every", "0.4"]  # fmt: skip

        def opened() -> Any:
            return shmcache.SQLStore(url, TABLE)

        def supervise() -> Any:
            with open(Path(folder).with_suffix(".err"), "ab") as err:
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=err))
            return processes[-1]

        def end(process: Any) -> None:
            process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()
            processes.remove(process)

        before = rows(store)
        try:
            for _ in range(rounds):
                supervisor = supervise()
                for i in range(WORKERS):
                    processes.append(fork.Process(target=work, args=(name, opened, i, WORKERS, numbers, wrong, rng.random()), daemon=True))
                    processes[-1].start()
                for _ in range(rng.choice((0, 0, 1, 2))):
                    looked_at(name)
                    time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.2))))  # the moment of a death, not a wait for anything
                    restores_killed += looked_at(name)
                    end(supervisor)
                    supervisors_killed += 1
                    supervisor = supervise()
                time.sleep(rng.uniform(0.3, 1.2))
                for process in processes[:]:
                    end(process)
                try:
                    shmcache.unlink(name)
                except errors.SegmentNotFound:
                    pass
                now = rows(store)
                for key, (was, is_) in enumerate(zip(before, now, strict=True)):
                    if is_ is not None and not (was or 0) <= is_ <= numbers.asked[key]:
                        wrong.append(f"row {key} was {was}, is {is_}, and {numbers.asked[key]} was asked last")
                    if is_ is None and was is not None and numbers.asked[key] // 7 * 7 < was:
                        wrong.append(f"row {key} was {was}, is gone, and nobody deleted it")
                before = now
            supervise()
            with attached(name, store) as cache:
                cache.flush(60)
                wrong.extend(cache.verify())
            for key, value in enumerate(rows(store)):
                if fault := numbers.fault(key, value):
                    wrong.append(f"the row in the end: {fault}")
        finally:
            for process in processes[:]:
                end(process)
            try:
                shmcache.unlink(name)
            except errors.SegmentNotFound:
                pass
        said = Path(folder).with_suffix(".err").read_text()
        Path(folder).with_suffix(".err").unlink()
        return {
            "store": url.partition(":")[0], "rounds": rounds, "writes": int(numbers.acked.sum()), "supervisors_killed": supervisors_killed,
            "while_restoring": restores_killed, "wrong": len(wrong), "first": list(wrong)[:5], "said": said[-500:], "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.store == "postgresql":
        from tests.postgres import postgres_server

        with postgres_server() as url:
            result = run(url, args.rounds, args.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(f"sqlite:///{folder}/reboot.db", args.rounds, args.seed)
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
