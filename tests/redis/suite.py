"""Redis' own tests (Tcl), against a server that runs already: its "external mode", one unit at a time.

    python -m tests.redis.suite --port 7777                               all units of UNITS
    python -m tests.redis.suite --port 7777 --unit unit/type/string       one; --unit again for more
    python -m tests.redis.suite                                           `shmcache serve` is started
    python -m tests.redis.suite --redis --all                             redis-server is started, and nothing left out
    python -m tests.redis.suite --lean                                    redis-server without lists and the like is started
    python -m tests.redis.suite --list                                    what is left out, and why; what else tests need

The server is emptied (FLUSHALL) and reconfigured by the tests. The sources are not here: they come from Debian's source package of
redis 7.0, once, into ~/.cache/shmcache-tests; apt's own files are left alone. What is left out says expected.py. Every other test has
to pass, and every unit to come to its end. Exit code 0: so it is; 1: it is not; 77: no sources or no tclsh. It takes minutes, and a network
for the first time: `.ci/run` runs one unit, if the sources are there. Other projects' tests: others.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.redis import servers
from tests.redis.expected import DENIED, NEEDS

UNITS = tuple(f"unit/{u}" for u in (
    "type/string", "type/incr", "expire", "keyspace", "scan", "bitops", "bitfield", "multi", "pubsub", "protocol", "info", "introspection", "scripting",
))  # fmt: skip
SELECTS = "run_script {return redis.pcall('select','9')} 0"
EDITS = {"unit/scripting": (
    ("foreach is_eval {0 1}", "foreach is_eval {1}"),  # not as functions too: there are none
    (SELECTS, f"catch {{{SELECTS}}}"),  # an error, for a script stays in its database; the rest of the test has to be done
)}  # fmt: skip
MIRROR = "http://deb.debian.org"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PR_SET_CHILD_SUBREAPER = 36
RESULT = re.compile(r"^\[(ok|err|skip|ignore|exception|TIMEOUT)\]: (.*)$")


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shmcache-tests"


def sources() -> Path:
    """The folder whose tests/ is the suite; fetched if it is not there. Raises: servers.Missing."""
    for found in sorted(cache().glob("redis-7.0.*/tests/test_helper.tcl")):
        return found.parent.parent
    if not shutil.which("apt-get") or not Path(KEYRING).exists():
        raise servers.Missing(
            f"the tests of redis 7.0 are not in {cache()}, and without apt-get and the keys of Debian they are not to be had"
        )
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="fetch-") as name:
        fetch(Path(name))
        unpacked = next(Path(name).glob("redis-7.0.*/tests"), None)
        if unpacked is None:
            raise servers.Missing("the source package of redis 7.0 is not as expected: it has no tests")
        kept = Path(name, "kept")
        kept.mkdir()
        unpacked.rename(kept / "tests")
        (unpacked.parent / "COPYING").rename(kept / "COPYING")
        target = cache() / unpacked.parent.name
        with contextlib.suppress(OSError):  # another run was faster
            kept.rename(target)
    return target


def fetch(folder: Path) -> None:
    """Fetch and unpack Debian's source package there, by an apt that knows nothing but this folder. Raises: servers.Missing."""
    for sub in ("lists/partial", "archives/partial", "parts"):
        (folder / sub).mkdir(parents=True)
    lines = [f"deb-src [signed-by={KEYRING}] {MIRROR}/{where} main\n" for where in ("debian bookworm", "debian-security bookworm-security")]
    (folder / "sources.list").write_text("".join(lines))
    settings = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "parts",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-q", *(x for k, v in settings.items() for x in ("-o", f"{k}={v}"))]
    unpack = [] if shutil.which("dpkg-source") and shutil.which("patch") else ["--download-only"]
    for command in (["update"], ["source", *unpack, "redis"]):
        done = subprocess.run([*apt, *command], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise servers.Missing(f"the sources of redis 7.0 cannot be fetched: {done.stderr.strip() or done.stdout.strip()}")
    if unpack:  # without Debian's patches: a few tests fewer
        with tarfile.open(next(folder.glob("redis_7.0.*.orig.tar.gz"))) as tar:
            tar.extractall(folder, filter="data")


def become_reaper() -> None:
    """What a tclsh leaves, when it ends or is killed, becomes a child of this process, which waits for it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@dataclass
class Result:
    unit: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # and what was said
    denied: dict[str, str] = field(default_factory=dict)  # by expected.py, and why
    ignored: list[str] = field(default_factory=list)  # by the suite itself, with its reason: by tag, or as the server is external
    stale: list[str] = field(default_factory=list)  # of expected.py: the unit has no such test
    aborted: str | None = None  # it did not come to its end

    @property
    def good(self) -> bool:
        return not self.failed and self.aborted is None


def read(unit: str, output: str, denied: dict[str, str]) -> Result:
    """What the suite printed, as a result."""
    result = Result(unit)
    failing: list[str] | None = None
    unsaid = []
    ended = False
    for line in output.splitlines():
        m = RESULT.match(line)
        ended = ended or bool(re.match(r"^\[\d+/\d+ done\]: ", line))
        if m is None:
            if line.startswith(("[", "Execution time", "!!! WARNING")) or line.strip() == "The End":
                failing = None
            if failing is not None:
                failing.append(line)
            elif line.strip():
                unsaid.append(line)
            continue
        kind, text = m.groups()
        failing = None
        if kind == "ok":
            result.passed.append(re.sub(r" \(\d+ ms\)$", "", text))
        elif kind == "skip":  # by expected.py, or as --only says
            if text in denied:
                result.denied[text] = denied[text]
        elif kind == "ignore":
            result.ignored.append(text)
        elif kind == "err":
            failing = []
            result.failed[text] = failing  # type: ignore[assignment]
        else:
            result.aborted = text
            unsaid = [text]
    result.failed = {re.sub(r" in tests/\S+$", "", name): "\n".join(said).strip() for name, said in result.failed.items()}
    if result.aborted is not None or not ended:
        result.aborted = "\n".join(unsaid[:15]) or "no output"
    if result.aborted is None:
        known = [test for test in denied if test in result.denied or any(text.startswith(test + ": ") for text in result.ignored)]
        result.stale = sorted(set(denied) - set(known))
    return result


def run(source: Path, unit: str, host: str, port: int, denied: dict[str, str], options: argparse.Namespace) -> Result:
    """One unit, in a folder of its own that leads to the sources."""
    with tempfile.TemporaryDirectory(prefix="shmcache-test-") as name:
        folder = Path(name)
        (folder / "tests" / "tmp").mkdir(parents=True)
        for path in (source / "tests").iterdir():
            if path.name != "tmp":
                (folder / "tests" / path.name).symlink_to(path)
        if unit in EDITS:
            edited = folder / "tests" / f"{unit}.tcl"
            edited.parent.unlink()
            edited.parent.mkdir()
            for path in (source / "tests" / unit).parent.iterdir():
                (edited.parent / path.name).symlink_to(path)
            text = edited.read_text()
            edited.unlink()
            for edit in EDITS[unit]:
                text = text.replace(*edit)
            edited.write_text(text)
        (folder / "skip").write_text("".join(f"{test}\n" for test in denied))
        argv = [servers.need("tclsh", "tcl"), "tests/test_helper.tcl", "--host", host, "--port", str(port), "--single", unit, "--durable"]
        argv += ["--skipfile", "skip", "--timeout", str(options.idle), "--tags", " ".join(f"-{tag}" for tag in options.without)]
        argv += ["--singledb"] if options.singledb else []
        argv += [x for test in options.only for x in ("--only", test)]
        before = {p.pid for p in psutil.Process().children()}
        output = folder / "output"
        with output.open("wb") as out:
            env = {**os.environ, "TERM": "dumb"}  # no colours
            process = subprocess.Popen(
                argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(options.longest)
                late = None
            except subprocess.TimeoutExpired:
                late = f"[TIMEOUT]: longer than {options.longest} s\n"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for orphan in psutil.Process().children():  # the process of the suite that ran the tests
                    if orphan.pid not in before:
                        orphan.wait(10)
        return read(unit, output.read_text("utf-8", "replace") + (late or ""), denied)


def show(results: list[Result]) -> None:
    for r in results:
        for test, said in r.failed.items():
            need = NEEDS.get(r.unit, {}).get(test)
            print(f"FAILED {r.unit}: {test}{f' (needs {need})' if need else ''}\n    " + said.replace("\n", "\n    "))
        if r.aborted is not None:
            print(f"ABORTED {r.unit}\n    " + r.aborted.replace("\n", "\n    "))
        for test in r.stale:
            print(f"NO SUCH TEST {r.unit}: {test}")
    print(f"{'unit':24}{'passed':>8}{'failed':>8}{'denied':>8}{'ignored':>9}")
    for r in results:
        aborted = "" if r.aborted is None else "  ABORTED"
        print(f"{r.unit:24}{len(r.passed):8}{len(r.failed):8}{len(r.denied):8}{len(r.ignored):9}{aborted}")
    whys = [(r.unit, test, why) for r in results for test, why in r.denied.items()]
    for unit, test, why in whys:
        print(f"denied {unit}: {test}: {why}")


def listing(units: list[str]) -> None:
    for unit in units:
        print(unit)
        for test, why in DENIED.get(unit, {}).items():
            print(f"    denied  {test}: {why}")
        for test, what in NEEDS.get(unit, {}).items():
            print(f"    run     {test}: needs {what}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, help="of the server; else `shmcache serve` is started")
    parser.add_argument("--redis", action="store_true", help="start redis-server")
    parser.add_argument(
        "--lean", action="store_true", help="start redis-server without its other types: all that is not left out has to pass"
    )
    parser.add_argument("--unit", action="append", help="such as unit/type/string; may be repeated; else all")
    parser.add_argument("--only", action="append", default=[], help="a test, or /pattern; may be repeated")
    parser.add_argument("--all", action="store_true", help="leave nothing out that expected.py has")
    parser.add_argument("--singledb", action="store_true", help="the server has one database: no test uses SELECT")
    parser.add_argument("--without", action="append", default=["needs:repl"], help="a tag of tests to leave out, as slow or needs:debug")
    parser.add_argument("--idle", type=int, default=60, help="seconds without progress till a unit is given up (60)")
    parser.add_argument("--longest", type=int, default=300, help="seconds that a unit may take (300)")
    parser.add_argument("--list", action="store_true", help="what is left out, and what tests need; nothing is run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    units = args.unit or list(UNITS)
    if args.list:
        listing(units)
        return 0
    become_reaper()
    results: list[Result] = []
    try:
        servers.need("tclsh", "tcl")
        source = sources()
        with contextlib.ExitStack() as stack:
            host, port = args.host, args.port
            if args.redis or args.lean:
                host, port, _ = stack.enter_context(servers.redis_server(*(servers.lean() if args.lean else ())))
            elif port is None:
                host, port, _ = stack.enter_context(servers.shmcache_server())
            for unit in units:
                denied = {} if args.all else DENIED.get(unit, {})
                results.append(run(source, unit, host, port, denied, args))
                if not args.json:
                    print(f"{unit}: {'done' if results[-1].good else 'NOT GOOD'}", file=sys.stderr, flush=True)
    except servers.Missing as e:
        print(e, file=sys.stderr)
        return 77
    except servers.Failed as e:
        print(f"the server {e}", file=sys.stderr)
        return 1
    good = all(r.good for r in results)
    if args.json:
        report: dict[str, Any] = {"suite": source.name, "good": good, "units": [vars(r) for r in results]}
        print(json.dumps(report, indent=1))
    else:
        show(results)
    return 0 if good else 1


if __name__ == "__main__":
    servers.end_on_sigterm()
    sys.exit(main())
