"""Other projects' own tests, each against a server of its own: clients, and the caches of frameworks that use them.

    python -m tests.redis.others redis-py --resp 3 --workers 2     redis-py, RESP3, against `shmcache serve` with two event loops
    python -m tests.redis.others django                            or django-redis, cachelib, flask-caching, dogpile
    python -m tests.redis.others redis-py --redis                  against redis-server: all that fails is printed, nothing is denied
    python -m tests.redis.others redis-py --only tests/test_lock.py --keep /tmp/kept     a part, in a folder that a next run uses again
    python -m tests.redis.others redis-py --list                   what is denied, and why

The network's package index is needed, and minutes: `.ci/run` does not run this. The source distribution, which has the tests, is
fetched by pip and its SHA-256 is checked; what the tests import is installed into a virtual environment that lives as long as the run.
Tests that expected.py denies are run, too: it has to be true that they fail. Exit code 0: all others have passed; 1: they have not, or
one that is denied has, or a denial is of no test; 77: no package index.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.redis import servers
from tests.redis.expected import OTHERS

PYTEST = "{python} -m pytest -v --tb=native --junitxml={report} -o junit_family=xunit1"
REDIS = "redis==8.1.0"
DJANGO_SETTINGS = """\
CACHES = {{"default": {{"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": "redis://127.0.0.1:{port}"}}}}
DATABASES = {{name: {{"ENGINE": "django.db.backends.sqlite3"}} for name in ("default", "other")}}
SECRET_KEY = "none"
USE_TZ = False
TEST_RUNNER = "xmlrunner.extra.djangotestrunner.XMLTestRunner"
TEST_OUTPUT_FILE_NAME = "{report}"
TEST_OUTPUT_DIR = "/"
"""


@dataclass(frozen=True)
class Suite:
    """command: run in the unpacked source, with {python}, {report}, {port}, {unix}, {resp} and {only} or `tests` filled in; once for each
    of `runs`, which is {each}."""

    project: str
    version: str
    sha256: str
    needs: str  # of its tests, besides itself
    command: str
    tests: str  # without --only
    runs: tuple[str, ...] = ("",)
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # to be put there
    edits: tuple[tuple[str, str, str], ...] = ()  # in files of this pattern: this text becomes that, {port} and {unix} filled in


SUITES = {
    "redis-py": Suite(
        "redis", "8.1.0", "6e1a19beef9225c83efd689c7e6b7da2d5215b1f42cd13b7fc3714d0a09c7b25",
        "pytest<10 pytest-asyncio<2 pytest-timeout<3 numpy packaging pybreaker redis-entraid==1.2.1 xxhash aiohttp opentelemetry-sdk",
        PYTEST + " -m 'not onlycluster' --timeout=60 --redis-url=redis://localhost:{port}/0 --redis-mod-url=redis://localhost:{port}/0 "
        "--protocol={resp} {only}",
        # Those that talk to a server. Left out: modules (bloom, json, search, timeseries), what is newer than 7.0 (hash field expiry,
        # himport, vsets), other servers (cluster, sentinel, ssl, multidb, scenario), and what talks to none.
        " ".join(f"tests/{where}test_{what}.py" for where, whats in (
            ("", "cache function multiprocessing keyspace_notifications"), ("test_asyncio/", "cwe_404 usage_counter keyspace_notifications"),
            *((where, "commands command_parser connection connection_pool credentials encoding lock monitor pipeline pubsub retry scripting")
              for where in ("", "test_asyncio/")),
        ) for what in whats.split()),
        edits=(  # these ask the client's default port
            ("tests/test_connection.py", "redis://localhost:6379/0?", "redis://localhost:{port}/0?"),
            ("tests/**/test_connection.py", "Connection(retry_on_timeout=True,", "Connection(port={port}, retry_on_timeout=True,"),
            ("tests/test_asyncio/test_connection_pool.py", '{"host": master_host[0]}', '{{"host": master_host[0], "port": {port}}}'),
        ),
    ),
    "cachelib": Suite(
        "cachelib", "0.17.0", "f3c7dc8d3c1132ab699681ffdf8a52d341d9425ac1401c538cf0b1d87b1677c8",
        f"pytest<10 pytest-xprocess {REDIS}", PYTEST + " {only}", "tests/test_redis_cache.py",
        env={"CI": "true"},  # the server is there
        edits=(("tests/test_redis_cache.py", "6360", "{port}"),),
    ),
    "flask-caching": Suite(
        "Flask-Caching", "2.5.1", "f75b451fde3faac0e278da72263818134deca8c4ba6bb07b9b3b238991368dae",
        f"pytest<10 pytest-asyncio<2 pytest-xprocess flask[async] asgiref {REDIS}", PYTEST + " -o asyncio_default_fixture_loop_scope=function -k redis {only}",
        "tests/test_backend_cache.py tests/test_basic_app.py",
        env={"CI": "true"},
        edits=(("tests/*.py", "6360", "{port}"),),
    ),
    "dogpile": Suite(
        "dogpile.cache", "1.5.0", "849c5573c9a38f155cd4173103c702b637ede0361c12e864876877d0cd125eec",
        f"pytest<10 mako {REDIS}", PYTEST + " {only}", "tests/cache/test_redis_backend.py",
        env={"DOGPILE_REDIS_PORT": "{port}"},
    ),
    "django": Suite(
        "Django", "5.2.19", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
        f"unittest-xml-reporting Jinja2 {REDIS}", "{python} tests/runtests.py --settings=of_this_run --parallel=1 -v 2 {only}",
        "cache sessions_tests",
        files={"tests/of_this_run.py": DJANGO_SETTINGS},
    ),
    "django-redis": Suite(
        "django-redis", "7.0.0", "e48491c862f4350b0747ceb1016700686fb93c4f4e0fb9c490fe6c6658ffd933",
        f"pytest<10 pytest-mock pytest-xdist lz4 msgpack pyzstd Django<6 {REDIS}", PYTEST + " -o addopts= -k '{each}' {only}", "tests",
        # A process for each of its settings, as Django reads them once. Left out: those that need a Sentinel. TestClientClose empties the
        # settings' OPTIONS: without a CLIENT_CLASS the second of two databases is a replica, which tests after it read, in vain
        runs=("not sqlite_", *(f"sqlite_{name}" for name in ("gzip", "herd", "json", "lz4", "msgpack", "usock", "zlib", "zstd")),
              "sqlite_sharding and not TestClientClose", "sqlite_sharding and TestClientClose"),
        edits=(("tests/settings/*.py", ":6379", ":{port}"), ("tests/settings/*.py", "/tmp/redis.sock", "{unix}")),
    ),
}  # fmt: skip


class Altered(Exception):
    """What was fetched is not what was published when this was written."""


@dataclass
class Outcome:
    """Of tests, by name."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # and what was said
    skipped: dict[str, str] = field(default_factory=dict)  # by the suite itself, and why
    denied: dict[str, str] = field(default_factory=dict)  # failed, as expected.py says, and why
    wrong: dict[str, str] = field(default_factory=dict)  # denied, but passed
    stale: list[str] = field(default_factory=list)  # denials of no test
    aborted: str | None = None  # the suite did not come to its end, or a server did

    def add(self, other: Outcome) -> None:
        """What another run has found."""
        self.passed += other.passed
        self.failed |= other.failed
        self.skipped |= other.skipped

    @property
    def good(self) -> bool:
        return bool(self.passed) and not (self.failed or self.wrong or self.stale or self.aborted)


def read(report: Path) -> Outcome:
    """A report in JUnit's XML. A test that is in it more than once (its end is reported apart) has failed if it has once."""
    outcome = Outcome()
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
        said = {child.tag: child for child in case}
        if bad := [said[kind] for kind in ("failure", "error") if kind in said]:
            outcome.failed[name] = "\n".join((each.text or each.get("message") or "").strip() for each in bad)
        elif "skipped" in said:
            outcome.skipped[name] = said["skipped"].get("message") or ""
        else:
            outcome.passed.append(name)
    outcome.passed = [name for name in dict.fromkeys(outcome.passed) if name not in outcome.failed]
    return outcome


def compare(outcome: Outcome, denials: dict[str, str], whole: bool) -> None:
    """Sort out what is denied. denials: reasons, by patterns of several names (* is anything; one without brackets is of
    all parameters). whole: not a part of the suite, so that each pattern has to fit a test that is there."""
    patterns = [
        (pattern, re.compile(fnmatch.translate(pattern.replace("[", "[[]"))), why) for names, why in denials.items() for pattern in names.split()
    ]
    fitting = set()
    for name in [*outcome.passed, *outcome.failed, *outcome.skipped]:
        for pattern, compiled, why in patterns:
            if compiled.match(name) or compiled.match(name.partition("[")[0]):
                fitting.add(pattern)
                if name in outcome.failed:
                    outcome.denied[name] = why
                elif name not in outcome.skipped:
                    outcome.wrong[name] = why
    outcome.failed = {name: said for name, said in outcome.failed.items() if name not in outcome.denied}
    outcome.passed = [name for name in outcome.passed if name not in outcome.wrong]
    if whole:
        outcome.stale = [pattern for pattern, _, _ in patterns if pattern not in fitting]


def fetch(suite: Suite, folder: Path) -> Path:
    """The unpacked source distribution. Raises: servers.Missing, Altered."""
    kept = sorted(folder.glob("*.tar.gz"))
    if not kept:
        pip(sys.executable, "download", "--no-deps", "--no-binary", suite.project, "--dest", str(folder), f"{suite.project}=={suite.version}")
        kept = sorted(folder.glob("*.tar.gz"))
    digest = hashlib.sha256(kept[0].read_bytes()).hexdigest()
    if digest != suite.sha256:
        raise Altered(f"{kept[0].name} has the SHA-256 {digest}, not {suite.sha256}")
    with tarfile.open(kept[0]) as tar:
        tar.extractall(folder / "source", filter="data")
    return next((folder / "source").iterdir())


def install(suite: Suite, folder: Path) -> Path:
    """The interpreter of the environment that the tests run in."""
    python = folder / "venv" / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, capture_output=True)
        pip(str(python), "install", str(next(folder.glob("*.tar.gz"))), *suite.needs.split())
        done.touch()
    return python


def pip(python: str, *arguments: str) -> None:
    done = subprocess.run([python, "-m", "pip", *arguments, "-q"], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise servers.Missing(f"pip {arguments[0]} fails: {done.stderr.strip()[-2000:]}")


def run(suite: Suite, folder: Path, port: int, pid: int, unix: Path, options: argparse.Namespace) -> Outcome:
    """Against the server there. pid: of its parent, whose children have to live through it."""
    source, python, report = fetch(suite, folder), install(suite, folder), folder / "report.xml"
    (folder / "output").unlink(missing_ok=True)
    values = {"python": python, "report": report, "port": port, "unix": unix, "resp": options.resp, "only": options.only or suite.tests}
    for name, text in suite.files.items():
        (source / name).write_text(text.format(**values))
    for pattern, old, new in suite.edits:
        found = list(source.glob(pattern))
        changed = [path for path in found if old in path.read_text()]
        if not changed:
            raise Altered(f"{suite.project} {suite.version} has no {old} in {pattern}")
        for path in changed:
            path.write_text(path.read_text().replace(old, new.format(**values)))
    children = {p.pid for p in psutil.Process(pid).children()}
    outcome = Outcome()
    for each in suite.runs:
        report.unlink(missing_ok=True)
        said = run_once(suite, source, folder / "output", {**values, "each": each}, options.longest)
        if report.exists():
            outcome.add(read(report))
        if said or not report.exists():
            outcome.aborted = f"{each} {said}".strip() + "\n" + (folder / "output").read_text("utf-8", "replace")[-3000:]
    if not outcome.aborted and {p.pid for p in psutil.Process(pid).children()} != children:
        outcome.aborted = "a process of the server ended meanwhile"
    return outcome


def run_once(suite: Suite, source: Path, output: Path, values: dict[str, Any], longest: float) -> str:
    """One command of it. Returns: why it did not come to its end; empty: it did."""
    env = {k: v.format(**values) for k, v in suite.env.items()}
    env = {**{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON", "DJANGO"))}, **env}
    with output.open("ab") as out:
        process = subprocess.Popen(
            shlex.split(suite.command.format(**values)), cwd=source, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(longest)
        except subprocess.TimeoutExpired:
            return f"longer than {longest} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return ""


def show(outcome: Outcome, brief: bool) -> None:
    for name, said in outcome.failed.items():
        print(f"FAILED {name}\n    " + "\n".join(said.splitlines()[-12 if brief else 0 :]).replace("\n", "\n    "))
    for name, why in outcome.wrong.items():
        print(f"PASSED though denied {name}: {why}")
    for pattern in outcome.stale:
        print(f"NO SUCH TEST {pattern}")
    if outcome.aborted:
        print("ABORTED\n    " + outcome.aborted.replace("\n", "\n    "))
    for title, found in (("denied", outcome.denied), ("skipped by the suite", outcome.skipped)):
        for why, n in Counter(why.strip().split("\n")[0][:140] for why in found.values()).most_common():
            print(f"{title} {n:5}  {why}")
    counts = {"passed": outcome.passed, "failed": outcome.failed, "denied": outcome.denied, "skipped": outcome.skipped, "wrong": outcome.wrong}
    print(", ".join(f"{len(found)} {what}" for what, found in counts.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--resp", type=int, choices=(2, 3), default=2, help="of redis-py (2); the others use redis-py's default, 3")
    parser.add_argument("--workers", type=int, default=1, help="event loops of `shmcache serve` (1)")
    parser.add_argument("--redis", action="store_true", help="start redis-server instead")
    parser.add_argument("--only", help="what the suite's runner gets instead of all its tests, such as tests/test_lock.py")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a folder for source, environment, report and output, which stays")
    parser.add_argument("--longest", type=int, default=3600, help="seconds that it may take (3600)")
    parser.add_argument("--brief", action="store_true", help="of what a failed test says the last lines only")
    parser.add_argument("--list", action="store_true", help="what is denied; nothing is run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    suite, denials = SUITES[args.suite], {**OTHERS.get(args.suite, {}), **OTHERS.get(f"{args.suite} --resp {args.resp}", {})}
    if args.list:
        for names, why in denials.items():
            print(f"{why}:\n    " + "\n    ".join(names.split()))
        return 0
    try:
        with contextlib.ExitStack() as stack:
            folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmcache-test-")))
            folder = folder.resolve()
            folder.mkdir(parents=True, exist_ok=True)
            unix = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shmcache-test-")), "socket")
            if args.redis:
                server = servers.redis_server("--unixsocket", str(unix))
            else:
                server = servers.shmcache_server("--workers", str(args.workers), "--databases", "16", "--unix", str(unix))
            _, port, pid = stack.enter_context(server)
            outcome = run(suite, folder, port, pid, unix, args)
    except servers.Missing as e:
        print(e, file=sys.stderr)
        return 77
    except (servers.Failed, Altered) as e:
        print(e, file=sys.stderr)
        return 1
    if not args.redis:
        compare(outcome, denials, not args.only)
    if args.json:
        print(json.dumps({"suite": f"{suite.project} {suite.version}", "good": outcome.good, **vars(outcome)}, indent=1))
    else:
        show(outcome, args.brief)
    return 0 if outcome.good else 1


if __name__ == "__main__":
    servers.end_on_sigterm()
    sys.exit(main())
