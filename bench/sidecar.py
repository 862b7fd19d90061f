"""What does the sidecar cost beside redis-server 7, both one process that serves, RESP2?

    python bench/sidecar.py [--parts rates,openloop,search] [--idle 10000] [--workers 2] [--transport unix|tcp] [--json FILE]

- rates: redis-benchmark, 50 clients, 22-byte keys drawn from --keys; GET and SET of 64 and 1,024 bytes at pipeline 1 and 16, MGET of 100
  keys, through a unix socket and through TCP. Medians of --rounds by turns: commands per second, p50 and p99, and the CPU that the
  serving process used per command (/proc/PID/stat). What the other processes of that command line used, the supervisor's, is a figure of
  its own.
- openloop: --rate requests a second by a fixed schedule for --seconds, 9 GETs to 1 SET, latency from the scheduled instant (openloop.c).
- search: the highest rate whose p99 is at most 1 ms, to 5 %, by trials of --trial seconds, in turns; a rate fails by three of them.
- --idle N: so many connections over TCP, each of which has sent one PING: the rise of the server's RSS by each, at once and after
  --settle seconds.
- --workers N: the rates of ours with N workers over those with one, with 100-byte values, through --transport.

--ours-command is the command line to compare with redis-server: {python} {name} {size} {port} {path} {folder} {workers} stand for what
they say. Servers listen on a free port of loopback and a socket in a directory of their own.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import resource
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from harness import VALUE, keep, key, options
from peers import program, serve

import shmcache

HERE = Path(__file__).parent
REDIS = "redis-server --bind 127.0.0.1 --port {port} --unixsocket {path} --dir {folder} --save '' --appendonly no --maxclients 30000"
OURS = "{python} -m shmcache.cli serve {name} --size {size} --port {port} --unix {path} --bind 127.0.0.1 --workers {workers}"
MANY = 100  # keys of an MGET
SIZES = (64, 1024)  # bytes of a value
TRANSPORTS = ("unix", "tcp")
TICK = os.sysconf("SC_CLK_TCK")
BENCH_SECONDS = 300.0  # no run of redis-benchmark takes so long
PROBES = 64  # connections by which to see who serves
GOAL_US = 1000.0  # the p99 of `search`
TRIALS_MOST = 40

Times = dict[int, float]  # CPU seconds of each process


@dataclass
class Server:
    who: str
    pid: int
    port: int
    path: str
    serving: list[int] = field(default_factory=list)

    def processes(self) -> list[int]:
        try:
            return [self.pid, *(p.pid for p in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            raise RuntimeError(f"{self.who} has ended") from None

    def times(self) -> Times:
        return {pid: cpu_seconds(pid) for pid in self.processes()}

    def used(self, before: Times) -> tuple[float, float]:
        """CPU seconds since: of the processes that serve, of the others."""
        spent = {pid: now - before.get(pid, 0.0) for pid, now in self.times().items()}
        own = sum(s for pid, s in spent.items() if pid in self.serving)
        return own, sum(spent.values()) - own

    def connect(self, transport: str) -> socket.socket:
        if transport == "unix":
            s = socket.socket(socket.AF_UNIX)
            s.connect(self.path)
        else:
            s = socket.create_connection(("127.0.0.1", self.port))
        s.settimeout(30)
        return s

    def where(self, transport: str) -> list[str]:
        return ["-s", self.path] if transport == "unix" else ["-h", "127.0.0.1", "-p", str(self.port)]


def cpu_seconds(pid: int) -> float:
    """utime + stime, by the clock's ticks (10 ms); 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def resident(pid: int) -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssShmem")}


@contextlib.contextmanager
def neighbours(part: str, servers: list[Server], notes: list[str]) -> Iterator[None]:
    """Notes how much of the machine was used meanwhile by what is not of this bench."""

    def busy() -> tuple[float, float]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        machine = (sum(ticks) - ticks[3] - ticks[4]) / TICK  # neither idle nor waiting for the disk
        return machine, sum(os.times()[:4]) + sum(sum(s.times().values()) for s in servers)

    began, before = time.monotonic(), busy()
    yield
    now = busy()
    cores = (now[0] - before[0] - (now[1] - before[1])) / (time.monotonic() - began)
    notes.append(f"{part}: other processes used {max(0.0, cores):.2f} cores meanwhile")


def ping(s: socket.socket) -> None:
    s.sendall(b"*1\r\n$4\r\nPING\r\n")
    if s.recv(64) != b"+PONG\r\n":
        raise RuntimeError("no PONG")


def holders(server: Server) -> list[int]:
    """The processes of a server that have a connection accepted, while there are some."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[-1] == server.path and fields[5] == "03":  # connected
            inodes.add(f"socket:[{fields[6]}]")
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{server.port:04X}") and fields[3] == "01":  # established
            inodes.add(f"socket:[{fields[9]}]")

    def links(pid: int) -> set[str]:
        found = set()
        with contextlib.suppress(OSError):
            for fd in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.add(os.readlink(fd.path))
        return found

    return [pid for pid in server.processes() if links(pid) & inodes]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(who: str, template: str, args: Any, workers: int = 1, tcp: bool = False) -> Iterator[Server]:
    """The server of this command line, empty, with who of its processes serves."""
    folder = tempfile.mkdtemp(prefix="bench-sidecar-")
    path, port, name = folder + "/s", free_port(), f"bench-sidecar-{os.getpid()}-{os.path.basename(folder)}"
    values = {"python": sys.executable, "name": name, "size": args.size, "port": port, "path": path, "folder": folder, "workers": workers}
    argv = [part.format(**values) for part in shlex.split(template)]
    argv[0] = program(argv[0])
    known = {p.pid for p in psutil.Process().children()}

    def ready() -> None:
        for transport in ("unix", "tcp"):
            with Server(who, 0, port, path).connect(transport) as s:
                ping(s)

    try:
        stop = serve(argv, path, ready)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        (pid,) = {p.pid for p in psutil.Process().children()} - known
        server = Server(who, pid, port, path)
        with contextlib.ExitStack() as stack:
            for _ in range(PROBES):
                ping(stack.enter_context(server.connect("tcp" if tcp else args.transport)))
            server.serving = holders(server)
        if not server.serving:
            raise RuntimeError(f"no process of {who} has accepted a connection")
        yield server
    finally:
        try:
            stop()
        finally:
            with contextlib.suppress(shmcache.SegmentNotFound):
                shmcache.unlink(name)


def fill(server: Server, args: Any, size: int = len(VALUE)) -> None:
    """Every key has a value of so many bytes."""
    value = b"v" * size
    with server.connect(args.transport) as s:
        for first in range(0, args.keys, 500):
            n = min(500, args.keys - first)
            s.sendall(b"".join(b"*3\r\n$3\r\nSET\r\n$22\r\n%s\r\n$%d\r\n%s\r\n" % (key(i), size, value) for i in range(first, first + n)))
            got = b""
            while len(got) < 5 * n:
                more = s.recv(1 << 16)
                if not more:
                    raise RuntimeError(f"{server.who} has closed the connection")
                got += more
            if got != b"+OK\r\n" * n:
                raise RuntimeError(f"{server.who} said {got[:100]!r}")


# ---- redis-benchmark ------------------------------------------------------------------------------------------------------------


def commands(args: Any, size: int) -> dict[str, tuple[list[str], int, int]]:
    """Case -> command, pipeline, how many of a round. The key is that of harness.key()."""
    one = "key:000000__rand_int__"
    get, put = ["GET", one], ["SET", one, "v" * size]
    return {
        "GET, pipeline 1": (get, 1, args.ops),
        "SET, pipeline 1": (put, 1, args.ops),
        "GET, pipeline 16": (get, 16, 5 * args.ops),
        "SET, pipeline 16": (put, 16, 5 * args.ops),
        f"MGET of {MANY}": (["MGET", *[one] * MANY], 1, args.ops // 10),
    }


def benchmark(server: Server, args: Any, transport: str, command: list[str], pipeline: int, n: int, at_once: int) -> dict[str, float]:
    """One redis-benchmark, or so many at once that share the clients and commands: rates are added, of latencies the worst counts.

    Its own --threads would round the time it took up to its timer's next quarter of a second.
    """
    argv = [program("redis-benchmark"), *server.where(transport), "-c", str(args.clients // at_once), "-n", str(n // at_once),
            "-P", str(pipeline), "-r", str(args.keys), "--csv", *command]  # fmt: skip
    before = server.times()
    children = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(at_once)]
    try:
        said = [p.communicate(timeout=BENCH_SECONDS)[0] for p in children]
    finally:
        for p in children:
            if p.poll() is None:
                p.kill()
                p.wait()
    serving, others = server.used(before)
    rows = [row for out in said for row in csv.DictReader(line for line in out.splitlines() if line.startswith('"'))]
    if any(p.returncode for p in children) or len(rows) != at_once:
        raise RuntimeError(f"redis-benchmark on {server.who}: {said[0][-500:]}")
    rate = sum(float(row["rps"]) for row in rows)
    return {
        "per_s": rate,
        "p50_ms": max(float(row["p50_latency_ms"]) for row in rows),
        "p99_ms": max(float(row["p99_latency_ms"]) for row in rows),
        "cpu_us": 1e6 * serving / n,
        "others_cpu_us": 1e6 * others / n,
        "cpu_share": serving * rate / n,
    }


def by_turns(servers: list[Server], args: Any, transport: str, size: int, at_once: int = 1) -> dict[str, dict[str, Any]]:
    """Case -> server -> figure -> median; with every round's rate and CPU per command. A first round more is dropped."""
    result: dict[str, dict[str, Any]] = {}
    for s in servers:
        fill(s, args, size)
    for what, (command, pipeline, n) in commands(args, size).items():
        case = f"{transport}, {size} bytes, {what}"
        rounds: dict[str, list[dict[str, float]]] = {s.who: [] for s in servers}
        for r in range(args.rounds + 1):
            for s in servers:
                figures = benchmark(s, args, transport, command, pipeline, n if r else max(at_once, n // 4), at_once)
                if r:
                    rounds[s.who].append(figures)
        result[case] = {who: medians(of) for who, of in rounds.items()}
        for who, of in result[case].items():
            print(f"{case:34} {who:14} {of['per_s']:10,.0f}/s   p50 {of['p50_ms']:7.3f}  p99 {of['p99_ms']:7.3f} ms   "
                  f"CPU {of['cpu_us']:7.2f} us a command ({100 * of['cpu_share']:.0f} % of a core; others {of['others_cpu_us']:.2f})",
                  flush=True)  # fmt: skip
    return result


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    digits = {"per_s": 0, "cpu_us": 3, "others_cpu_us": 3, "cpu_share": 3, "p50_ms": 3, "p99_ms": 3}
    out: dict[str, Any] = {name: round(statistics.median(r[name] for r in rounds), digits[name]) for name in digits}
    return {**out, "rounds": {name: [round(r[name], digits[name]) for r in rounds] for name in ("per_s", "cpu_us")}}


def rates(servers: list[Server], args: Any) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for transport, size in itertools.product(TRANSPORTS, SIZES):
        cases |= by_turns(servers, args, transport, size)
    theirs, ours = (s.who for s in servers)
    for of in cases.values():
        of["ours_over_redis"] = {
            name: round(of[ours][name] / of[theirs][name], 3) for name in ("per_s", "p99_ms", "cpu_us") if of[theirs][name]
        }
    return cases


def workers(args: Any) -> dict[str, Any]:
    """Ours with more workers over ours with one; two redis-benchmarks at once, since one of them limits two workers."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(started(f"ours, {n}", args.ours_command, args, workers=n)) for n in (1, args.workers)]
        cases: dict[str, Any] = by_turns(servers, args, args.transport, len(VALUE), at_once=2)
        for of in cases.values():
            of["rise"] = round(of[servers[1].who]["per_s"] / of[servers[0].who]["per_s"], 3)
            of["processes that serve"] = {s.who: len(s.serving) for s in servers}
        return cases


# ---- by a schedule --------------------------------------------------------------------------------------------------------------


def compiled(folder: str) -> str:
    out = folder + "/openloop"
    subprocess.run([program("gcc"), "-O2", "-o", out, str(HERE / "openloop.c")], check=True)
    return out


def openloop(tool: str, server: Server, args: Any, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    where = server.path if args.transport == "unix" else str(server.port)
    argv = [tool, where, str(rate), str(seconds), str(args.warmup), str(args.connections), str(args.keys), str(len(VALUE)), "90", str(seed)]
    before, began = server.times(), time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + args.warmup + 60, check=False)
    took = time.monotonic() - began
    serving, others = server.used(before)
    if done.returncode:
        raise RuntimeError(f"openloop on {server.who}: {done.stderr}")
    of: dict[str, Any] = json.loads(done.stdout)
    if of["errors"]:
        raise RuntimeError(f"{server.who} refused {of['errors']}: {of['first_error']}")
    del of["errors"], of["first_error"]
    n = max(1, of["requests"] - of["unanswered"])
    return {**of, "cpu_us": round(1e6 * serving / n, 3), "others_cpu_us": round(1e6 * others / n, 3), "cpu_share": round(serving / took, 3)}


def scheduled(tool: str, servers: list[Server], args: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for s in servers:
        result[s.who] = of = openloop(tool, s, args, args.rate, args.seconds, 1)
        print(f"{of['asked']:,.0f}/s asked, {s.who:14} {of['answered_per_s']:10,.0f}/s   p50 {of['p50_us']:.0f}  p99 {of['p99_us']:.0f}  "
              f"p99.9 {of['p999_us']:.0f}  max {of['max_us']:.0f} us   CPU {of['cpu_us']:.2f} us   generator late: p99 "
              f"{of['late_p99_us']:.0f} us, {of['generator_cpu_s'] / (args.seconds + args.warmup):.2f} of a core", flush=True)  # fmt: skip
    return result


@dataclass
class Search:
    """The highest rate that is good enough: doubled till one fails, then halved between."""

    rate: float
    low: float = 0.0
    high: float = 0.0
    failed: int = 0  # times at this rate

    def done(self) -> bool:
        return self.high > 0 and (self.high / max(self.low, 1.0) < 1.05 or self.high < 1000)

    def tell(self, good: bool) -> None:
        self.failed += not good
        if not good and self.failed < 3:
            return
        self.failed = 0
        if good:
            self.low = self.rate
        else:
            self.high = self.rate
        self.rate = (self.low + self.high) / 2 if self.high else 2 * self.rate


def search(tool: str, servers: list[Server], args: Any) -> dict[str, Any]:
    states = {s.who: Search(args.rate / 2) for s in servers}
    best: dict[str, Any] = {s.who: {"highest_per_s": 0, "trials": []} for s in servers}
    for trial in range(TRIALS_MOST):
        for s in servers:
            state = states[s.who]
            if state.done():
                continue
            of = openloop(tool, s, args, round(state.rate), args.trial, trial)
            good = of["p99_us"] <= GOAL_US and not of["overloaded"] and not of["unanswered"] and of["answered_per_s"] > 0.97 * of["asked"]
            shown = {k: of[k] for k in ("asked", "answered_per_s", "p50_us", "p99_us", "late_p99_us", "cpu_us", "cpu_share")}
            best[s.who]["trials"].append({**shown, "good": good})
            state.tell(good)
            best[s.who]["highest_per_s"] = round(state.low)
    for s in servers:
        of = best[s.who]
        failed = [t for t in of["trials"] if not t["good"]]
        of["exact"] = states[s.who].done()
        of["generator_late_in_failures"] = sum(t["late_p99_us"] > GOAL_US / 2 for t in failed)
        print(f"p99 <= {GOAL_US / 1000:g} ms: {s.who:14} up to {of['highest_per_s']:,}/s; in {of['generator_late_in_failures']} of "
              f"{len(failed)} failures the generator itself was late", flush=True)  # fmt: skip
    return best


# ---- idle connections -----------------------------------------------------------------------------------------------------------


def tcp_pages() -> int:
    """Memory of TCP's buffers, bytes, of the whole machine."""
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        words = line.split()
        if words[0] == "TCP:":
            return int(words[words.index("mem") + 1]) * resource.getpagesize()
    return 0


def idle(args: Any, notes: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for who, template, n in (("redis-server", REDIS, 1), ("ours", args.ours_command, 1)):
        with started(who, template, args, workers=n, tcp=True) as server, contextlib.ExitStack() as stack:

            def memory(server: Server = server) -> dict[str, int]:
                each = [resident(pid) for pid in server.serving]
                return {name: sum(e[name] for e in each) for name in each[0]}

            before, buffers, opened = memory(), tcp_pages(), 0
            try:
                for opened in range(1, args.idle + 1):  # noqa: B007  # how many there are when it stops
                    ping(stack.enter_context(server.connect("tcp")))
            except (OSError, RuntimeError) as e:
                opened -= 1
                notes.append(f"{who} has only {opened} idle connections of {args.idle}: {e} (a process may open {hard} files)")
            after = memory()
            time.sleep(args.settle)  # buffers that a server gives back
            settled = memory()
            if opened:
                result[who] = {
                    "connections": opened,
                    "rss_bytes_each": round((after["VmRSS"] - before["VmRSS"]) / opened),
                    "rss_bytes_each_settled": round((settled["VmRSS"] - before["VmRSS"]) / opened),
                    "anonymous_bytes_each_settled": round((settled["RssAnon"] - before["RssAnon"]) / opened),
                    "rss_bytes_before": before["VmRSS"],
                    "kernel_tcp_buffers_bytes": tcp_pages() - buffers,
                }
                print(f"idle, {who:14} {result[who]}", flush=True)
    return result


def more_files(wanted: int, notes: list[str]) -> None:
    """This process, and what it starts, may open so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return
        except (ValueError, OSError):
            notes.append(f"RLIMIT_NOFILE is {hard} at most, {wanted} are wanted")
            wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--parts", default="rates,openloop,search", help="of these, with commas (all)")
    parser.add_argument("--ours-command", default=OURS, metavar="COMMAND")
    parser.add_argument("--transport", choices=TRANSPORTS, default="unix", help="of openloop, search and --workers")
    parser.add_argument("--size", default="256M", help="of our segment")
    parser.add_argument("--clients", type=int, default=50, help="of redis-benchmark")
    parser.add_argument("--rate", type=float, default=50_000, help="of openloop, requests/s; search begins at its half")
    parser.add_argument("--seconds", type=float, default=60.0, help="of openloop, each server")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before each schedule's figures")
    parser.add_argument("--connections", type=int, default=50, help="of openloop")
    parser.add_argument("--trial", type=float, default=3.0, help="seconds of each trial of search")
    parser.add_argument("--idle", type=int, default=0, metavar="N", help="idle connections, 0: that part is left out")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds till idle memory is looked at again")
    parser.add_argument("--workers", type=int, default=1, help="more than one: ours with them over ours with one")
    args = parser.parse_args()
    parts = set(filter(None, args.parts.split(",")))
    if unknown := parts - {"rates", "openloop", "search"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if args.quick:
        args.keys, args.ops, args.rounds = args.keys // 10, args.ops // 10, 2
        args.seconds, args.trial, args.rate, args.settle, args.idle = 2.0, 0.5, 20_000, 1.0, min(args.idle, 500)
    notes: list[str] = []
    cases: dict[str, Any] = {}
    more_files(args.idle + 1000, notes)
    folder = tempfile.mkdtemp(prefix="bench-openloop-")
    try:
        with contextlib.ExitStack() as stack:
            lines = {"redis-server": REDIS, "ours": args.ours_command}
            servers = [stack.enter_context(started(who, line, args)) for who, line in lines.items()]
            if "rates" in parts:
                with neighbours("rates", servers, notes):
                    cases["rates"] = rates(servers, args)
            if parts & {"openloop", "search"}:
                for s in servers:
                    fill(s, args)
                tool = compiled(folder)
                if "openloop" in parts:
                    with neighbours("openloop", servers, notes):
                        cases["openloop"] = scheduled(tool, servers, args)
                if "search" in parts:
                    with neighbours("search", servers, notes):
                        cases["search"] = search(tool, servers, args)
        if args.idle:
            cases["idle"] = idle(args, notes)
        if args.workers > 1:
            with neighbours("workers", [], notes):  # their servers start and end within
                cases[f"workers/{args.workers} over 1"] = workers(args)
    except ImportError as e:  # redis-server, redis-benchmark or gcc
        notes.append(f"the rest is left out: {e}")
    finally:
        shutil.rmtree(folder)
    cases["setting"] = {k: getattr(args, k) for k in ("transport", "clients", "connections", "keys", "rate", "seconds", "ours_command")}
    for note in notes:
        print("note:", note)
    keep(cases, notes, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
