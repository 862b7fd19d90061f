"""The main job: gunicorn workers serve a site from one shared cache, with a supervisor, while a worker is killed and all are reloaded.

The site shows the source of every module of this Python's standard library (tools/site_app.py). A load on loopback asks for pages by
Zipf's law (0.99): first without the cache, then with it. In the middle one worker is killed (SIGKILL), later gunicorn is told to reload
(SIGHUP): the cache is as warm after it as before.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import site_app
from replay import BadInput, progress

import shmcache
from shmcache.errors import ShmcacheError

BASELINE = 0.2  # of the time, without the cache
KILL_AT, RELOAD_AT = 0.5, 0.75
TIMEOUT = 30.0  # seconds for whatever must happen


class Load:
    """Threads that ask for pages, each over its own connection, and note what came back."""

    def __init__(self, port: int, names: list[str], threads: int) -> None:
        self.port, self.names = port, names
        total = list(accumulate(1 / (i + 1) ** 0.99 for i in range(len(names))))
        self.weights = [w / total[-1] for w in total]
        self.phase = "without"
        self.stopped = False
        self.failed = 0
        self.notes: list[list[tuple[str, int, str, float, int]]] = [[] for _ in range(threads)]  # phase, pid, state, seconds, micros
        self.threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(threads)]
        for t in self.threads:
            t.start()

    def _ask(self, me: int) -> None:
        rng = random.Random(me)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        while not self.stopped:
            name = self.names[bisect_left(self.weights, rng.random())]
            phase = self.phase
            began = time.perf_counter()
            try:
                connection.request("GET", f"/module/{name}" + ("?nocache" if phase == "without" else ""))
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):  # a worker was killed, or closed its connection when it was reloaded
                connection.close()
                self.failed += 1
                continue
            if response.status != 200 or f"<h1>{name}</h1>".encode() not in body:
                raise RuntimeError(f"{name}: status {response.status}, not its page")
            seconds = time.perf_counter() - began
            headers = response.headers
            self.notes[me].append((phase, int(headers["X-Pid"]), headers["X-Cache"], seconds, int(headers["X-Micros"])))

    def stop(self) -> list[tuple[str, int, str, float, int]]:
        self.stopped = True
        for t in self.threads:
            t.join(TIMEOUT)
        return self.so_far()

    def so_far(self) -> list[tuple[str, int, str, float, int]]:
        return [n for notes in self.notes for n in notes]


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} within {TIMEOUT:.0f} s")
        time.sleep(0.02)  # between two looks


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        connection.request("GET", "/none")
        connection.getresponse().read()
        connection.close()
    except OSError:
        return False
    return True


def percentile(values: list[float], p: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(p * len(values)))] if values else None


def summary(notes: list[tuple[str, int, str, float, int]]) -> dict[str, Any]:
    http_s, handler = [n[3] for n in notes], [n[4] / 1e6 for n in notes]
    hits = [n for n in notes if n[2] == "hit"]
    return {
        "requests": len(notes),
        "hit_ratio": len(hits) / len(notes) if notes else None,
        "http_p50_s": percentile(http_s, 0.5), "http_p99_s": percentile(http_s, 0.99),
        "handler_p50_s": percentile(handler, 0.5), "handler_p99_s": percentile(handler, 0.99),
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.workers <= 64 or not 2 <= args.seconds <= 86400:
        raise BadInput("--workers is 1 to 64, --seconds 2 to 86400")
    bar = progress if sys.stderr.isatty() else lambda _: None
    name = args.name or f"demo-{os.getpid()}"
    port = free_port()
    gunicorn: subprocess.Popen[bytes] | None = None
    supervisor: subprocess.Popen[bytes] | None = None
    load: Load | None = None
    with tempfile.TemporaryDirectory(prefix="shmcache-demo-") as folder, shmcache.create(name, args.size) as cache:
        try:
            print("reading the standard library into SQLite ...", file=sys.stderr)
            names = site_app.build(f"{folder}/modules.db", bar)
            random.Random(1).shuffle(names)
            supervisor = shmcache.supervise(name)
            environment = os.environ | {"DEMO_DB": f"{folder}/modules.db", "DEMO_SEGMENT": name}
            command = [sys.executable, "-m", "gunicorn", "--chdir", str(Path(__file__).parent), "--bind", f"127.0.0.1:{port}",
                       "--workers", str(args.workers), "--worker-class", "gthread", "--threads", "2", "--keep-alive", "30",
                       "--log-level", "error", "--no-control-socket", "site_app:application"]  # fmt: skip
            if b"--no-control-socket" not in subprocess.run([*command[:3], "--help"], capture_output=True, check=True).stdout:
                command.remove("--no-control-socket")  # gunicorn before 25
            gunicorn = subprocess.Popen(command, env=environment, start_new_session=True)
            wait_for(lambda: answers(port), "gunicorn did not answer")
            load = Load(port, names, 2 * args.workers)
            print(f"asking http://127.0.0.1:{port}/ for {args.seconds:.0f} s ...", file=sys.stderr)
            began = time.monotonic()
            killed = 0
            while (fraction := (time.monotonic() - began) / args.seconds) < 1:
                bar(fraction)
                if load.phase == "without" and fraction > BASELINE:
                    load.phase = "with"
                if not killed and fraction > KILL_AT:
                    served = {n[1] for n in load.so_far()}
                    killed = max((p.pid for p in psutil.Process(gunicorn.pid).children()), key=lambda pid: pid in served)
                    os.kill(killed, signal.SIGKILL)
                if load.phase == "with" and fraction > RELOAD_AT:
                    gunicorn.send_signal(signal.SIGHUP)
                    load.phase = "reloaded"
                if gunicorn.poll() is not None or not any(t.is_alive() for t in load.threads):
                    raise RuntimeError("gunicorn or the load ended before its time")
                time.sleep(0.05)  # the demo's own pace
            workers = psutil.Process(gunicorn.pid).children()
            memory = [w.memory_full_info().uss for w in workers]
            notes = load.stop()
            report = make_report(cache, notes, args, load.failed, killed, memory)
            print(json.dumps(report)) if args.json else show(report)
            if args.keep:
                print(f"http://127.0.0.1:{port}/ and shmcache-admin stats {name}; Ctrl-C ends it", file=sys.stderr)
                signal.pause()
            return 0 if not report["verify"] and report["with"]["requests"] else 1
        finally:
            if load is not None:
                load.stopped = True
            for process in (gunicorn, supervisor):
                if process is not None:
                    process.terminate()
                    try:
                        process.wait(TIMEOUT)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
            shmcache.unlink(name)


def make_report(cache: Any, notes: list[Any], args: Any, failed: int, killed: int, memory: list[int]) -> dict[str, Any]:
    stats = cache.stats()
    phases = {p: [n for n in notes if n[0] == p] for p in ("without", "with", "reloaded")}
    cached = phases["with"] + phases["reloaded"]
    return {
        "seconds": args.seconds,
        "workers": args.workers,
        **{p: summary(n) for p, n in phases.items()},
        "requests_per_s": {
            "without": round(len(phases["without"]) / (args.seconds * BASELINE)),
            "with": round(len(cached) / (args.seconds * (1 - BASELINE))),
        },
        "hit_ratio_by_worker": {pid: summary([n for n in cached if n[1] == pid])["hit_ratio"] for pid in sorted({n[1] for n in cached})},
        "killed_pid": killed,
        "failed_requests": failed,
        **{k: stats[k] for k in ("items", "evictions", "inline_evictions", "used_bytes", "size_bytes", "takeovers", "settled")},
        "worker_private_bytes": memory,
        "verify": cache.verify(),
    }  # fmt: skip


def show(r: dict[str, Any]) -> None:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds:.2f}"

    print(f"{r['workers']} gunicorn workers, {r['seconds']:.0f} s; worker {r['killed_pid']} was killed, later all were reloaded\n")
    print(f"{'':24}{'no cache':>12}{'cache':>12}{'after reload':>14}")
    print(f"{'requests/s':24}{r['requests_per_s']['without']:>12,}{r['requests_per_s']['with']:>12,}")
    for what in ("handler", "http"):
        for p in ("p50", "p99"):
            cells = [ms(r[phase][f"{what}_{p}_s"]) for phase in ("without", "with", "reloaded")]
            print(f"{f'{what} {p}, ms':24}{cells[0]:>12}{cells[1]:>12}{cells[2]:>14}")
    ratios = ["-" if r[p]["hit_ratio"] is None else f"{100 * r[p]['hit_ratio']:.1f} %" for p in ("with", "reloaded")]
    print(f"{'hit ratio':24}{'':>12}{ratios[0]:>12}{ratios[1]:>14}")
    print("  by worker             " + "  ".join(f"{pid}: {100 * x:.1f} %" for pid, x in r["hit_ratio_by_worker"].items()))
    print(f"evictions               {r['evictions']:,} (inline {r['inline_evictions']:,}), {r['items']:,} items")
    print(f"memory                  {r['used_bytes'] / 2**20:.1f} of {r['size_bytes'] / 2**20:.0f} MB shared; "
          f"private to a worker at most {max(r['worker_private_bytes']) / 2**20:.1f} MB")  # fmt: skip
    print(f"failed requests         {r['failed_requests']:,} (their worker was killed or closed the connection at the reload)")
    print(f"{len(r['verify'])} inconsistencies" + "".join(f"\n  {line}" for line in r["verify"][:5]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "With --trace FILE a trace is replayed straight against a segment: ./tools/demo --trace FILE --help"
    parser.add_argument("--seconds", type=float, default=20.0, help="of load (20)")
    parser.add_argument("--workers", type=int, default=4, help="of gunicorn (4)")
    parser.add_argument("--size", default="64M", help="of the segment (64M)")
    parser.add_argument("--name", help="of the segment")
    parser.add_argument("--keep", action="store_true", help="go on serving afterwards, to look around")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except (BadInput, ShmcacheError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; the segment, the supervisor and the workers are gone", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
