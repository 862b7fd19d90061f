"""`shmcache` (supervise) and `shmcache-admin` (look at segments, and mend them): what an operator types.

Exit codes: 0 done; 1 not found, not healthy, or no room; 2 usage. With --json what goes to standard output is JSON; errors go to
standard error, a line each. `rich` draws the tables if it is installed and the output is a terminal.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import shmcache
from shmcache import errors, metrics, notices, segment, stores
from shmcache.notices import notice

STUCK = 30.0  # seconds without a heartbeat: the supervisor is stopped
POLL = 0.02  # seconds between two looks whether a snapshot that was asked for is written
ALL = object()  # of --retry
STORE_VARIABLE = "SHMCACHE_STORE"  # of the environment
LONGEST_SECRET = 1 << 16  # bytes


def _mib(n: float) -> str:
    return f"{n / (1 << 20):,.1f} MiB"


def _text(key: bytes) -> str:
    return _harmless(key.decode("utf-8", "backslashreplace"))


def _harmless(text: str, kept: str = "") -> str:
    """With what a terminal would obey, or not show, escaped; but these."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table: by rich on a terminal, else in plain columns. Numbers stand to the right."""
    cells = [[f"{c:,}" if isinstance(c, int) else _harmless(str(c)) for c in row] for row in rows]
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.table import Table

            table = Table(title=title, title_justify="left")
            for i, name in enumerate(head):
                table.add_column(name, justify="left" if i == 0 else "right")
            for row in cells:
                table.add_row(*row)
            Console(markup=False, emoji=False).print(table)  # keys and errors are anybody's
            return
    widths = [max(len(r[i]) for r in [list(head), *cells]) for i in range(len(head))]
    print(title)
    for row in [list(head), *cells]:
        print("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip())


def _sure(args: argparse.Namespace, question: str) -> None:
    """Ask before something is destroyed. Raises: UsageError if the answer is no, or nobody can be asked."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise errors.UsageError(f"{question} Nobody can be asked here: say --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise errors.UsageError("not done")


# ---- figures --------------------------------------------------------------------------------------------------------------------


def _processes(before: dict[str, Any], now: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    import psutil

    earlier = {p["pid"]: p for p in before["processes"]}
    result = []
    for p in now["processes"]:
        was = earlier.get(p["pid"], p)
        operations = sum(p[k] - was[k] for k in ("hits", "misses", "sets", "deletes"))
        row = {**p, "ops_per_s": round(operations / seconds) if seconds else 0, "command": None, "rss_bytes": None, "pss_bytes": None}
        with contextlib.suppress(psutil.Error):  # it may just have ended, be in another pid namespace, or be another user's
            process = psutil.Process(p["pid"])
            row["command"] = stores.masked(" ".join(process.cmdline()))[:60] or process.name()
            memory = process.memory_full_info()
            row["rss_bytes"], row["pss_bytes"] = memory.rss, memory.pss
        result.append(row)
    return result


def collect(cache: shmcache.Cache, before: dict[str, Any], seconds: float) -> dict[str, Any]:
    """cache.stats() with rates since `before` (an earlier one, so many seconds ago), and what the system knows of the processes."""
    now = cache.stats()
    evicted = now["evictions"] - before["evictions"]
    now["evictions_per_s"] = evicted / seconds
    # Little's law: as many items as are evicted while one stays. None: nothing was evicted meanwhile
    now["eviction_age_s"] = now["items"] * seconds / evicted if evicted else None
    now["processes"] = _processes(before, now, seconds)
    return now


def _durability(d: dict[str, Any]) -> str:
    said = ["no snapshot" if d["snapshot_age_s"] is None else f"snapshot {d['snapshot_age_s']:,.0f} s old", f"log {d['log']}"]
    if d["restoring"]:
        said.append("BEING RESTORED, or that was killed")
    if d["snapshot_failed"]:
        said.append("THE LAST SNAPSHOT FAILED")
    if d["log_failed"]:
        said.append("THE LOG CANNOT BE WRITTEN")
    if d["log_gaps"]:
        said.append(f"LOG GAP: {d['log_gaps']:,} operations are not in it, till the next snapshot")
    return "; ".join(said)


def _store(d: dict[str, Any]) -> str:
    said = [f"written {d['policy']}", f"{d['loads']:,} keys loaded, {d['found']:,} there", f"{d['writes']:,} written"]
    if d["errors"]:
        said.append(f"{d['errors']:,} calls failed")
    if d["policy"] == "back":
        age = "" if d["oldest_s"] is None else f", the oldest for {d['oldest_s']:.1f} s"
        said.append(f"not stored yet: {d['dirty_items']:,} items, {_mib(d['dirty_bytes'])}{age}")
        if d["failing_s"] is not None:
            said.append(f"THE STORE FAILS, for {d['failing_s']:,.0f} s")
        if d["refused"]:
            said.append(f"THE STORE REFUSES {d['refused']:,} items")
    return "; ".join(said)


def show(s: dict[str, Any]) -> None:
    """Figures for a person."""
    ratio = "no gets yet" if s["hit_ratio"] is None else f"{100 * s['hit_ratio']:.2f} %"
    age = "nothing evicted just now" if s["eviction_age_s"] is None else f"{s['eviction_age_s']:,.1f} s"
    sup = s["supervisor"]
    state = "none"
    if sup["pid"] is not None:
        state = f"{'pid' if sup['alive'] else 'DEAD, was pid'} {sup['pid']}, looked round {sup['heartbeat_age_s']:.1f} s ago"
    rows = [
        ("hit ratio", ratio), ("hits / misses", f"{s['hits']:,} / {s['misses']:,}"), ("items", f"{s['items']:,}"),
        ("in use", f"{_mib(s['used_bytes'])} of {_mib(s['slab_bytes'])}, {s['free_pages']:,} pages in no class"),
        ("sets / deletes", f"{s['sets']:,} / {s['deletes']:,}"),
        ("evictions", f"{s['evictions']:,} ({s['evictions_per_s']:,.0f}/s), inline {s['inline_evictions']:,}"),
        ("age of what is evicted", age), ("expirations", f"{s['expirations']:,}"),
        ("lock waits", f"{s['lock_waits']:,}, longest {s['max_wait_ns'] / 1e6:.1f} ms, given up {s['stalls']:,}"),
        ("takeovers", f"{s['takeovers']:,}, settled {s['settled']:,}"), ("supervisor", state),
        ("on the disk", _durability(s["durability"])),
    ]  # fmt: skip
    if s["store"] is not None:
        rows.append(("in front of a store", _store(s["store"])))
    _table(s["name"], ("", "since it was created"), rows)
    _table(
        "slab classes",
        ("chunk", "pages", "live MiB", "reserved MiB", "free MiB"),
        [
            (f"{c['chunk_bytes']:,}", c["pages"], *(f"{c[k] * c['chunk_bytes'] / (1 << 20):,.2f}" for k in ("live", "reserved", "free")))
            for c in s["slab_classes"]
            if c["pages"]
        ],
    )
    _table(
        "processes",
        ("pid", "ops/s", "RSS", "PSS", "command"),
        [(str(p["pid"]), p["ops_per_s"], *("?" if p[k] is None else _mib(p[k]) for k in ("rss_bytes", "pss_bytes")), p["command"] or "?")
         for p in s["processes"]],
    )  # fmt: skip


# ---- commands -------------------------------------------------------------------------------------------------------------------


def do_create(args: argparse.Namespace) -> int:
    names = ("default_ttl", "max_value", "stripes", "max_processes", "lock_limit", "huge_pages", "log_buffer", "mode", "group")
    options = {k: getattr(args, k) for k in names}
    options = {k: v for k, v in options.items() if v is not None}
    with shmcache.create(args.name, args.size, **options) as cache:
        s = cache.stats()
        if args.json:
            print(json.dumps({k: s[k] for k in ("name", "size_bytes", "slab_bytes")}))
        else:
            print(f"created {args.name}: {_mib(s['size_bytes'])}, {_mib(s['slab_bytes'])} of it for items")
    return 0


ASIDE = (  # by its state
    "of another user, another version of shmcache, or no segment: if no process of theirs restores, it can be removed by hand",
    "a process that restores is about to give it its name",
    "left by a restore that was killed: unlink NAME removes it, and so does the next restore or create of it",
)


def _listed(name: str) -> dict[str, Any]:
    """What `list` says of it, if nothing can be known. aside: the name under which it stands there (segment.aside)."""
    return {"name": name, "size_bytes": None, "items": None, "processes": None, "supervisor": None, "error": None, "aside": None}


def do_list(args: argparse.Namespace) -> int:
    found = []
    for path in sorted(Path(segment.SHM_DIR).glob(segment.PREFIX + "*")):
        name = path.name.removeprefix(segment.PREFIX)
        row = _listed(name)
        try:
            row["size_bytes"] = path.stat().st_size
            with shmcache.cache.attach_unsettled(name) as cache:
                me = os.getpid()
                row |= {"items": len(cache), "supervisor": cache.supervisor()["alive"],
                        "processes": sum(p["pid"] != me for p in cache.processes())}  # fmt: skip
        except (errors.ShmcacheError, OSError) as e:
            row["error"] = str(e)
        found.append(row)
    for entry, name in segment.aside():
        with contextlib.suppress(FileNotFoundError):  # it has its name by now
            size_bytes, said = os.lstat(f"{segment.SHM_DIR}/{entry}").st_size, ASIDE[segment.aside_state(entry)]
            found.append(_listed(name) | {"size_bytes": size_bytes, "aside": entry, "error": f"{entry}: {said}"})
    if args.json:
        print(json.dumps(found))
    elif not found:
        print("no segments")
    else:
        _table("segments", ("name", "size", "items", "processes", "supervisor"), [
            (r["name"], _mib(r["size_bytes"] or 0), r["error"] or r["items"], r["processes"] if r["error"] is None else "",
             "" if r["error"] else "yes" if r["supervisor"] else "no") for r in found])  # fmt: skip
    return 0


def do_stats(args: argparse.Namespace) -> int:
    format_ = "json" if args.json else args.format
    with shmcache.cache.attach_unsettled(args.name) as cache:
        seconds = args.watch or args.interval
        while True:
            before, began = cache.stats(), time.monotonic()
            time.sleep(seconds)
            s = collect(cache, before, time.monotonic() - began)
            if format_ == "json":
                print(json.dumps(s), flush=True)
            elif format_ == "prometheus":
                print(metrics.as_text(metrics.of_segment(s)), end="", flush=True)
            else:
                if args.watch and sys.stdout.isatty():
                    print("\033[H\033[2J", end="")
                show(s)
            if not args.watch:
                return 0


def _shown(value: Any) -> Any:
    """A value as JSON takes it; bytes that are no text as {"base64": ...}, the rest that JSON lacks as its repr."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    return value


def do_get(args: argparse.Namespace) -> int:
    with shmcache.attach(args.name) as cache:
        missing = object()
        key = os.fsencode(args.key)
        value = cache.get(key, missing)
        if value is missing:
            print(f"{args.key}: not there", file=sys.stderr)
            return 1
        if args.json:
            ttl = cache.ttl(key)
            ttl = None if ttl in (None, float("inf")) else ttl
            print(json.dumps({"key": args.key, "value": _shown(value), "type": type(value).__name__, "ttl": ttl}))
        elif isinstance(value, bytes) and not sys.stdout.isatty():
            sys.stdout.buffer.write(value)
        else:
            text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value
            text = str(text) if isinstance(text, (str, int)) else json.dumps(_shown(text), ensure_ascii=False)
            print(_harmless(text, "\n\t") if sys.stdout.isatty() else text)
    return 0


def do_set(args: argparse.Namespace) -> int:
    raw = sys.stdin.buffer.read() if args.value == "-" else args.value.encode("utf-8", "surrogateescape")
    try:
        converters: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "str": bytes.decode, "int": int, "json": json.loads}
        value = converters[args.type](raw)
    except ValueError as e:
        raise errors.UsageError(f"the value is not {args.type}: {e}") from None
    with shmcache.attach(args.name) as cache:
        cache.set(os.fsencode(args.key), value, ttl=args.ttl)
    if args.json:
        print(json.dumps({"key": args.key, "stored": True}))
    return 0


def do_delete(args: argparse.Namespace) -> int:
    with shmcache.attach(args.name) as cache:
        remove = cache.discard if cache.mapping.settings()["policy"] not in (0, segment.WRITE_BACK) else cache.delete
        deleted = remove(os.fsencode(args.key))
    if args.json:
        print(json.dumps({"key": args.key, "deleted": deleted}))
    elif not deleted:
        print(f"{args.key}: not there", file=sys.stderr)
    return 0 if deleted else 1


def do_scan(args: argparse.Namespace) -> int:
    with shmcache.attach(args.name) as cache:
        for n, key in enumerate(cache.scan(os.fsencode(args.prefix))):
            if args.limit is not None and n >= args.limit:
                break
            print(json.dumps(_shown(key)) if args.json else _text(key))
    return 0


def do_flush(args: argparse.Namespace) -> int:
    with shmcache.attach(args.name) as cache:
        n = len(cache)
        _sure(args, f"Remove all {n:,} items of {args.name}, for every process?")
        cache.clear()
    print(json.dumps({"name": args.name, "removed": n}) if args.json else f"removed {n:,} items")
    return 0


def do_refused(args: argparse.Namespace) -> int:
    from shmcache.supervisor import refused

    with shmcache.attach(args.name) as cache:
        if cache.mapping.settings()["policy"] != segment.WRITE_BACK:
            raise errors.UsageError(f"nothing is written back in {args.name}, so that no store refuses rows later than the call")
        if args.drop is None and args.retry is None:
            _show_refused(args, *refused.ask(cache))
            return 0
        if args.drop is not None:
            row = refused.find(cache, os.fsencode(args.drop))
            _sure(args, f"Give up what the store refuses of {args.drop}? The store keeps what it has.")
            done = int(refused.drop(cache, row))
        else:
            one = None if args.retry is ALL else refused.find(cache, os.fsencode(args.retry))
            done = refused.retry_all(cache) if one is None else int(refused.retry(cache, one))
            refused.hurry(cache)
    if args.json:
        print(json.dumps({"name": args.name, "dropped" if args.drop is not None else "retried": done}))
    elif not done:
        print("there is none" if args.retry is ALL else "it is not as it was listed: look at the list again", file=sys.stderr)
    else:
        print("tried at once: look at the list again" if args.drop is None else "given up: the store keeps what it has")
    return 0 if done else 1


def _show_refused(args: argparse.Namespace, rows: list[Any], in_all: int) -> None:
    now = time.time()
    if args.json:
        shown = [
            {"key": _shown(row.key), "version": row.version, "error": row.error, "since_s": max(0.0, now - row.since), "tries": row.tries,
             "again_s": max(0.0, row.again - now)}
            for row in rows
        ]  # fmt: skip
        print(json.dumps({"name": args.name, "refused": in_all, "rows": shown}))
    elif not rows:
        print("the store refuses nothing")
    else:
        _table(f"{in_all:,} rows that the store refuses", ("key", "version", "since", "tries", "again in", "error"), [
            (_printable(_text(row.key)), row.version, f"{max(0.0, now - row.since):,.0f} s", row.tries,
             f"{max(0.0, row.again - now):,.0f} s", _printable(row.error)) for row in rows])  # fmt: skip
        if in_all > len(rows):
            print(f"and {in_all - len(rows):,} more")


def _printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def do_verify(args: argparse.Namespace) -> int:
    from shmcache.core import _sweep

    with shmcache.attach(args.name) as cache:
        found = cache.verify()
        left = found
        if args.repair:
            if found:
                _sure(args, f"Remove the damaged items of {args.name}?")
            _sweep.repair(cache)
            left = cache.verify()
    if args.json:
        print(json.dumps({"name": args.name, "violations": found, "repaired": args.repair, "left": left}))
    else:
        for line in found:
            print(line)
        if args.repair and found:
            print(f"repaired; {len(left)} violations are left" + (": unlink it and create it again" if left else ""))
        elif not found:
            print(f"{args.name} is whole")
    return 1 if left else 0


def do_layout(args: argparse.Namespace) -> int:
    if args.json:
        structs = {}
        for name, dtype in segment.dtypes().items():
            fields: Any = dtype.fields
            structs[name] = {"size": dtype.itemsize, "fields": {f: {"offset": at, "type": str(t)} for f, (t, at) in fields.items()}}
        print(json.dumps(structs))
    else:
        print(segment.format_layout())
    return 0


def do_unlink(args: argparse.Namespace) -> int:
    if not Path(segment.check_name(args.name)).exists() and not any(name == args.name for _, name in segment.aside()):
        raise errors.SegmentNotFound(f"there is no segment {args.name!r}")
    _sure(args, f"Remove the segment {args.name} and all that is in it?")
    shmcache.unlink(args.name)
    print(json.dumps({"name": args.name, "unlinked": True}) if args.json else f"unlinked {args.name}")
    return 0


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, of so many) that draws a bar by rich, if standard error is a terminal and it is installed."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress

            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
            return
    yield lambda done, total: None


def do_snapshot(args: argparse.Namespace) -> int:
    from shmcache.supervisor import datadir, snapshot

    with shmcache.attach(args.name) as cache:
        if args.data_dir is None:
            return _snapshot_by_supervisor(cache, args)
        snapshot.step_back(snapshot.NICE_UNTHROTTLED)
        with datadir.take(args.data_dir) as folder, _progress("writing") as progress:
            report = snapshot.write(cache, folder, keep=args.keep, compress=args.compress, progress=progress)
    for line in report["kept"]:
        print(f"shmcache-admin: kept: {line}", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{report['path']}: {report['items']:,} items, {_mib(report['bytes'])}, {report['seconds']:.1f} s")
    return 0


def _snapshot_by_supervisor(cache: shmcache.Cache, args: argparse.Namespace) -> int:
    from shmcache.core import _sweep

    if not cache.supervisor()["alive"]:
        raise errors.UsageError("the segment has no supervisor that could write it: start one with --data-dir, or say --data-dir here")
    began, number = time.monotonic(), _sweep.ask_for_snapshot(cache)
    while int(cache.segment.header["snapshots_ended"]) < number:
        time.sleep(POLL)
        supervisor = cache.supervisor()
        if not supervisor["alive"]:
            raise errors.SnapshotStopped("the supervisor ended before the snapshot was written: look at its output")
        if supervisor["heartbeat_age_s"] > STUCK:
            raise errors.StripeBusy(f"the supervisor, process {supervisor['pid']}, has not run for {STUCK:.0f} s: continue or kill it")
    state = cache.durability()
    if args.json:
        print(json.dumps({"name": args.name, "seconds": time.monotonic() - began, **state}))
    if state["snapshot_failed"]:
        print("the supervisor could not write it: it has no --data-dir, or its output says why", file=sys.stderr)
        return 1
    if not args.json:
        print(f"written by the supervisor in {time.monotonic() - began:.1f} s")
    return 0


def do_restore(args: argparse.Namespace) -> int:
    from shmcache.supervisor import datadir, snapshot

    options = {"huge_pages": args.huge_pages, **({} if args.size is None else {"size": args.size})}
    with datadir.take(args.data_dir) as folder, _progress("restoring") as progress:
        report = snapshot.restore(args.name, folder, progress=progress, **options)
    _say_restored(report, lambda line: print(line, file=sys.stderr), print, args.json)
    return 0


def _say_restored(report: dict[str, Any], warn: Callable[[str], object], say: Callable[[str], object], as_json: bool = False) -> None:
    if report["gaps"]:
        warn(f"shmcache: LOG GAP: {report['gaps']:,} operations were never logged; some keys may be older than they were")
    for line in report["cut"]:
        warn(f"shmcache: {line}")
    for line in report["damaged"]:
        warn(f"shmcache: passed over, and kept: {line}")
    if report["unnoted"]:
        warn(f"shmcache: that this was restored from there could not be noted there: {report['unnoted']}. Before it is, no log and no "
             "snapshot is begun there")  # fmt: skip
    if report["clock_back_s"]:
        warn(f"shmcache: the wall clock is {report['clock_back_s']:.0f} s behind the snapshot: lives count from there")
    if as_json:
        say(json.dumps(report))
    else:
        text = "restored {stored:,} items in {seconds:.1f} s from {items:,} of {snapshot} and {log_records:,} log records since ("
        text += "{expired:,} expired, {dropped:,} found no room, {present:,} overtaken, {copies:,} to be loaded again)"
        say(text.format(**report))


def do_dump(args: argparse.Namespace) -> int:
    from shmcache.supervisor import dump

    if sys.stdout.isatty():
        raise errors.UsageError("a dump is binary (msgpack maps): send it to a file or a pipe")
    with shmcache.attach(args.name) as cache, _progress("dumping") as progress:
        n = dump.dump(cache, sys.stdout.buffer, os.fsencode(args.prefix), progress)
        sys.stdout.buffer.flush()
    print(json.dumps({"name": args.name, "items": n}) if args.json else f"{n:,} items", file=sys.stderr)
    return 0


def do_load(args: argparse.Namespace) -> int:
    from shmcache.supervisor import dump

    n = stopped = 0

    def count(done: int) -> None:
        nonlocal n
        n = done
        if stopped:  # and what stop() raised was swallowed
            sys.exit(128 + stopped)

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = number
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with shmcache.attach(args.name) as cache:
        try:
            dump.load(cache, sys.stdin.buffer, count, lambda line: print(f"shmcache-admin: {line}", file=sys.stderr))
        except BaseException:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # another one does not cut this short
            text = f"the load was stopped: {n:,} items are in, and maybe the next. Load all of it again: that sets them anew"
            print(f"shmcache-admin: {text}", file=sys.stderr)
            raise
    print(json.dumps({"name": args.name, "items": n}) if args.json else f"{n:,} items")
    return 0


@contextlib.contextmanager
def _data_dir(args: argparse.Namespace) -> Iterator[Path | None]:
    from shmcache.supervisor import datadir

    if args.data_dir is None:
        yield None
    else:
        with datadir.take(args.data_dir) as folder:
            yield folder


def _log_buffer(size_bytes: int) -> int:
    """A power of two: a sixteenth of the segment for 128 processes, 64 to 256 KiB each."""
    return int(min(256 << 10, max(64 << 10, 1 << (size_bytes // 16 // 128).bit_length() - 1)))


def _whole(name: str) -> bool:
    """Is there such a segment, and not one whose restore was killed?"""
    if not Path(segment.check_name(name)).exists():
        return False
    with shmcache.cache.attach_unsettled(name) as cache:
        return not cache.durability()["restoring"]


def _live_or_restored(args: argparse.Namespace, folder: Path | None) -> shmcache.Cache:
    """The segment: the live one; else restored from the data directory, if anything is there; else created, if there is a size.

    Where something is there, none is created, and whose the files are is asked of the handle that is returned: by its name it could be
    another, which somebody has put there since.
    """
    from shmcache.supervisor import appendlog, datadir, format, snapshot

    if args.start_empty and (args.size is None or folder is None):
        raise errors.UsageError("--start-empty needs --data-dir, and --size: of the segment that is created then")
    base = None if folder is None else snapshot.base_of_empty(folder)  # a note of a newer format is refused before anything is moved
    created: dict[str, Any] = {"huge_pages": args.huge_pages}
    if args.log_buffer:
        created["log_buffer"] = args.log_buffer
    buffer = None if args.log == "off" else _log_buffer(segment.parse_size(args.size or shmcache.cache.DEFAULT_SIZE))
    is_there = folder is not None and any(format.listing(folder))
    if folder is not None and is_there:
        if not _whole(args.name):
            try:
                options = {**created, "log_policy": appendlog.POLICIES[args.log], **({} if args.size is None else {"size": args.size})}
                _say_restored(snapshot.restore(args.name, folder, log_buffer_if_none=buffer, **options), notice, notice)
            except (errors.NoSnapshot, errors.DamagedFile, errors.NewerFormat) as e:
                if datadir.is_blank(folder):  # who began the log was killed before anything was in it
                    is_there = False
                elif not args.start_empty:
                    notice(f"shmcache: nothing was changed in {folder}. --start-empty sets aside what is there, and begins without it")
                    raise
                else:
                    notice(f"shmcache: {e}\nshmcache: {args.name} starts empty; what was there is in {datadir.set_aside(folder)}")
                    is_there = False
                    snapshot.end_restore(args.name)
    elif args.start_empty:
        snapshot.end_restore(args.name)  # the files were set aside by a process that was killed then
    if buffer:
        created.setdefault("log_buffer", buffer)
    policy = args.policy or ("through" if args.store else None)
    if args.size is None:
        cache = shmcache.attach(args.name)
    else:
        created |= {"policy": policy, "version_base": base}
        cache = shmcache.cache.open_logged(args.name, args.size, appendlog.POLICIES[args.log], create=not is_there, **created)
    try:
        if folder is not None and is_there and not datadir.is_of(cache, folder):
            _say_whose(args, folder)
    except BaseException:
        cache.close()
        raise
    return cache


def _say_whose(args: argparse.Namespace, folder: Path) -> None:
    """Raises: ForeignDataDir, if it is to be logged there."""
    what = (
        f"{args.name} was there already, created by somebody else, or restored from another directory: nothing is restored into "
        f"it, and what is in {folder} and not of it is kept. To have that back, without what is in the segment: end all, "
        "unlink it, move the snapshots and logs that it has written there since out of the directory, and start this first"
    )
    if args.log != "off":  # what would be acknowledged there, a restore could not tell from the earlier segment's
        raise errors.ForeignDataDir(
            f"{what}. To go on with the segment, which loses nothing of it: move all snapshots and logs out of the directory, or "
            "use another directory"
        )
    notice(f"shmcache: {what}")


def _pauses(fd: int) -> Callable[[], bool]:
    """Is CLIENT PAUSE in force? serve says until when there, in lines: ms of CLOCK_MONOTONIC."""
    os.set_blocking(fd, False)
    until_ms, rest = 0, b""

    def read() -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, 65536)
        return b""

    def paused() -> bool:
        nonlocal until_ms, rest
        while part := read():
            rest += part
        *lines, rest = rest.split(b"\n")
        if lines:
            until_ms = int(lines[-1])
        return time.monotonic() * 1000 < until_ms

    return paused


def do_supervise(args: argparse.Namespace) -> int:
    from shmcache.supervisor.loop import Supervisor

    if args.log != "off" and args.data_dir is None:
        raise errors.UsageError("a log needs a directory: say --data-dir")
    supervisor = None
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        if supervisor is not None:
            supervisor.stop()

    # from the start, and not a blocked signal: threads that a library started earlier would take it, and the default ends the process
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    args.store = _store_of(args)
    store = stores.opened(args.store, args.store_table) if args.store else None
    closing = contextlib.closing(store) if store else contextlib.nullcontext()
    with _data_dir(args) as folder, closing, _live_or_restored(args, folder) as cache:
        writes_back = cache.mapping.settings()["policy"] == segment.WRITE_BACK
        if writes_back and store is None:
            notice(f"shmcache: {args.name} is written back, and nobody stores: say --store")
        supervisor = Supervisor(
            cache, args.parent, folder=folder, every=args.snapshot_every, keep=args.keep, compress=args.compress, log=args.log,
            store=store if writes_back else None, spares=_pauses(args.pauses) if args.pauses is not None else lambda: False,
        )  # fmt: skip
        if asked:
            supervisor.stop()
        if not args.quiet:
            notice(f"supervising {args.name}")
        supervisor.run()
        supervisor = None
    return 0


SUPERVISED = ("size", "data_dir", "log", "log_buffer", "snapshot_every", "keep", "store_table", "policy")  # serve's, handed on


def do_serve(args: argparse.Namespace) -> int:
    from shmcache.sidecar import acl
    from shmcache.sidecar.serve import Service

    supervise = [
        word for name in SUPERVISED if (value := getattr(args, name)) is not None
        for word in ("--" + name.replace("_", "-"), str(value))
    ]  # fmt: skip
    supervise += [flag for flag in ("--compress", "--huge-pages", "--start-empty") if getattr(args, flag[2:].replace("-", "_"))]
    store = _store_of(args)
    settings = {
        "bind": " ".join(args.bind), "port": str(args.port), "unixsocket": args.unix or "", "maxclients": str(args.maxclients),
        "timeout": str(int(args.timeout)), "protected-mode": args.protected_mode,
        "lua-time-limit": str(args.lua_time_limit), "scripts-undeclared": "yes" if args.scripts_undeclared else "no",
        "enable-debug-command": "yes" if args.enable_debug_command else "no",
    }  # fmt: skip
    if args.databases is not None:
        settings["databases"] = str(args.databases)
    if args.password_file is not None:
        settings["requirepass"] = _secret(args.password_file, "the password").decode("latin-1")
    password = settings.get("requirepass", "").encode("latin-1")
    users = {acl.DEFAULT: acl.default_user(password)}
    if args.acl_file is not None:
        settings["aclfile"] = os.path.abspath(args.acl_file)
        _check_secret(args.acl_file, "a list of users")
        users = acl.read_file(settings["aclfile"], password)
    if bool(args.tls_cert) != bool(args.tls_key):
        raise errors.UsageError("--tls-cert and --tls-key go together")
    tls = {"cert": args.tls_cert, "key": args.tls_key, "ca": args.tls_ca} if args.tls_cert else None
    return Service(
        args.name, supervise, workers=args.workers, bind=args.bind, port=args.port, unix=args.unix, unix_mode=args.unix_mode,
        settings=settings, users={name: user.line for name, user in users.items()}, disabled=sorted(acl.disabled(args.disable_command)),
        tls=tls, quiet=args.quiet, metrics_port=args.metrics_port, metrics_bind=args.metrics_bind,
        store=(store, args.store_table) if store else None,
    ).run()  # fmt: skip


def _check_secret(path: str, what: str) -> None:
    """Warn if others than its owner can read a file. Raises: UsageError: it is no regular file: a fifo would be waited for."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise errors.UsageError(f"{path} is no regular file: {what} is read from one")
    if mode & 0o077:
        print(f"shmcache: {path} is open to others than its owner (mode {mode & 0o777:03o}): chmod 600", file=sys.stderr)


def _secret(path: str, what: str) -> bytes:
    """The first line of a file. Raises: UsageError: it has none."""
    _check_secret(path, what)
    with open(path, "rb") as file:
        return _first_line(file, path, what)


def _first_line(file: BinaryIO, path: str, what: str) -> bytes:
    line = file.readline(LONGEST_SECRET + 1).strip()
    if not line:
        raise errors.UsageError(f"{path} is empty: its first line is to be {what}")
    if len(line) > LONGEST_SECRET:
        raise errors.UsageError(f"the first line of {path} has over {LONGEST_SECRET:,} bytes: it is to be {what}")
    return line


def _store_of(args: argparse.Namespace) -> str | None:
    """What stands behind the segment: by --store or --store-file, or else by the environment, which children do not inherit it from."""
    variable = os.environ.pop(STORE_VARIABLE, "").strip()
    if args.store_file is None:
        if args.store and stores.masked(args.store) != args.store:
            notice(f"shmcache: the password of --store is shown to every user who lists processes: use --store-file, or {STORE_VARIABLE}")
        return args.store or variable or None
    what = "the store's url, or module:function"
    if args.store_file == "-":
        return os.fsdecode(_first_line(sys.stdin.buffer, "standard input", what))
    return os.fsdecode(_secret(args.store_file, what))


# ---- the parsers ----------------------------------------------------------------------------------------------------------------


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("a number of seconds above 0")
    return value


def _databases(text: str) -> int:
    if not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError("1 to 1024")
    return int(text)


def _snapshot_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--keep", type=int, default=2, metavar="K", help="so many of the newest snapshots are left (2)")
    p.add_argument("--compress", action="store_true", help='with zstd (pip install "shmcache[zstd]")')


def admin_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shmcache-admin", description="Look at the segments of this host, and mend them.")
    parser.add_argument("--version", action="version", version=shmcache.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, *, named: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        if named:
            p.add_argument("name", metavar="NAME", help="of the segment")
        p.add_argument("--json", action="store_true", help="print JSON")
        return p

    p = command("create", do_create, "Create a segment; its memory is reserved at once.")
    p.add_argument("--size", default="256M", help="bytes, or 256M, 1G (256M)")
    p.add_argument("--default-ttl", type=float, metavar="S", help="seconds until an item expires that is set without ttl (never)")
    p.add_argument("--max-value", metavar="SIZE", help="of one value (64M)")
    p.add_argument("--stripes", type=int, help="locks, a power of two (1024)")
    p.add_argument("--max-processes", type=int, help="attached at once (128)")
    p.add_argument("--huge-pages", action="store_true", help="put it into pages of 2 MiB (Linux 6.1)")
    p.add_argument("--log-buffer", metavar="SIZE", help="for each process, so that supervise --log can log (none)")
    p.add_argument("--lock-limit", type=float, metavar="S", help="that a write waits for a stopped process (1)")
    p.add_argument("--mode", type=lambda t: int(t, 8), help="octal (600)")
    p.add_argument("--group", help="that owns it")
    command("list", do_list, "List the segments of this host.", named=False)
    p = command("stats", do_stats, "Figures of a segment: hits, memory by class, evictions, locks, processes, supervisor.")
    p.add_argument("--watch", nargs="?", type=_positive, const=2.0, metavar="S", help="again every S seconds (2)")
    p.add_argument("--interval", type=_positive, default=0.5, metavar="S", help="over which rates are taken (0.5)")
    p.add_argument("--format", choices=("text", "json", "prometheus"), default="text")
    p = command("get", do_get, "Print a key's value.")
    p.add_argument("key", metavar="KEY")
    p = command("set", do_set, "Store a value.")
    p.add_argument("key", metavar="KEY")
    p.add_argument("value", metavar="VALUE", help="-: standard input")
    p.add_argument("--ttl", type=float, metavar="S", help="seconds until it expires")
    p.add_argument("--type", choices=("str", "bytes", "int", "json"), default="str", help="of the value (str)")
    p = command("delete", do_delete, "Delete a key; before a store that is written through or around, its cached copy.")
    p.add_argument("key", metavar="KEY")
    p = command("scan", do_scan, "Print the keys, one a line.")
    p.add_argument("--prefix", default="", help="of the keys")
    p.add_argument("--limit", type=int, metavar="N", help="at most so many")
    p = command("flush", do_flush, "Remove every item.")
    p.add_argument("--yes", action="store_true", help="do not ask")
    p = command("refused", do_refused, "List the rows that the store refuses of what is written back; try them again, or give them up.")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--retry", nargs="?", const=ALL, metavar="KEY", help="try this row at once; without KEY all that is not stored")
    what.add_argument("--drop", metavar="KEY", help="give up this row's value: the store keeps what it has, and the next get loads that")
    p.add_argument("--yes", action="store_true", help="do not ask")
    p = command("verify", do_verify, "Hold every structure against its invariants.")
    p.add_argument("--repair", action="store_true", help="remove what is damaged, settle what the dead left")
    p.add_argument("--yes", action="store_true", help="do not ask")
    p = command("snapshot", do_snapshot, "Write a snapshot: by the supervisor, or with --data-dir by this command.")
    p.add_argument("--data-dir", metavar="D", help="to write to, if no supervisor does")
    _snapshot_options(p)
    p = command("restore", do_restore, "Create the segment from the newest snapshot that is whole. Workers can use it meanwhile.")
    p.add_argument("--data-dir", metavar="D", required=True, help="where the snapshots are")
    p.add_argument("--size", help="of the segment, larger or smaller than it was (as it was)")
    p.add_argument("--huge-pages", action="store_true", help="put it into pages of 2 MiB (Linux 6.1)")
    p = command("dump", do_dump, "Write all items to standard output, as msgpack maps of key, value, ttl, tags and namespace.")
    p.add_argument("--prefix", default="", help="of the keys")
    command("load", do_load, "Set all items that dump wrote, from standard input. If it is stopped it says how many are in.")
    command("layout", do_layout, "Print the binary layout, from the dtypes.", named=False)
    p = command("unlink", do_unlink, "Remove a segment. Who is attached keeps what he has mapped.")
    p.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shmcache", description="Processes that serve a segment.")
    parser.add_argument("--version", action="version", version=shmcache.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "Evict ahead of demand, expire, settle what the dead left; till SIGTERM. One per segment."
    p = commands.add_parser("supervise", help=text, description=text)
    p.set_defaults(run=do_supervise)
    _supervise_options(p)
    p.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    p.add_argument("--pauses", type=int, help=argparse.SUPPRESS)
    text = "Serve a segment over the Redis protocol, with a supervisor; till SIGTERM."
    p = commands.add_parser("serve", help=text, description=text)
    p.set_defaults(run=do_serve)
    _supervise_options(p)
    p.add_argument("--port", type=int, default=6379, help="TCP port; 0: none (6379)")
    p.add_argument("--bind", nargs="+", default=["127.0.0.1"], metavar="ADDRESS", help="addresses to listen on (127.0.0.1)")
    p.add_argument("--unix", metavar="PATH", help="listen on a unix socket, too")
    p.add_argument("--unix-mode", type=lambda t: int(t, 8), default=0o700, metavar="MODE", help="of the socket, octal (700)")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes with an event loop each (1)")
    p.add_argument("--password-file", metavar="F", help="clients have to authenticate with what is in it")
    p.add_argument("--acl-file", metavar="F", help="users and what each may do, in the format of Redis' ACL files")
    p.add_argument("--disable-command", action="append", default=[], metavar="NAME",
                   help="a command, subcommand (config|set) or @category that is to be unknown; again for more")  # fmt: skip
    p.add_argument("--protected-mode", choices=("yes", "no"), default="yes", help="without a password serve loopback only (yes)")
    p.add_argument("--maxclients", type=int, default=10000, metavar="N", help="connections of a process (10000)")
    p.add_argument("--databases", type=_databases, metavar="N",
                   help="what SELECT chooses from, each with keys of its own (16; with a store 1: others are not stored)")  # fmt: skip
    p.add_argument("--timeout", type=float, default=0, metavar="S", help="close a connection that is idle so long; 0: never (0)")
    p.add_argument("--lua-time-limit", type=int, default=500, metavar="MS", help="end a script that runs so long (500)")
    p.add_argument("--scripts-undeclared", action=argparse.BooleanOptionalAction, default=True,
                   help="scripts may touch keys that are not among their KEYS (they may)")  # fmt: skip
    p.add_argument("--tls-cert", metavar="F", help="TCP with TLS: the certificate")
    p.add_argument("--tls-key", metavar="F", help="its key")
    p.add_argument("--tls-ca", metavar="F", help="clients need a certificate of this authority")
    p.add_argument("--metrics-port", type=int, default=0, metavar="P",
                   help='Prometheus metrics on http://ADDRESS:P/metrics (pip install "shmcache[metrics]"); 0: none (0)')  # fmt: skip
    p.add_argument("--metrics-bind", default="127.0.0.1", metavar="ADDRESS", help="where they are served (127.0.0.1)")
    p.add_argument("--enable-debug-command", action="store_true", help="DEBUG, for tests")
    return parser


def _supervise_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", help="of the segment")
    p.add_argument("--size", help="create the segment with it if there is none")
    p.add_argument("--huge-pages", action="store_true", help="create it in pages of 2 MiB (Linux 6.1)")
    p.add_argument("--policy", choices=("through", "around", "back"), help="create it to stand in front of a store: how writes get there")
    store = p.add_mutually_exclusive_group()
    store.add_argument("--store", metavar="S", help="what stands behind it: an url (sqlite:///app.db, ...), or module:function")
    store.add_argument("--store-file", metavar="F", help="the same, in the first line of a file (-: of standard input): for an url with a "
                       f"password, which arguments show to everybody. Without either the variable {STORE_VARIABLE} may say it")  # fmt: skip
    p.add_argument("--store-table", default="shmcache", metavar="T", help="of an url: table, made if it is not there (shmcache)")
    p.add_argument("--data-dir", metavar="D", help="write snapshots to it, and restore the segment from it if there is none")
    p.add_argument("--log", choices=("off", "no", "everysec", "always"), default="off",
                   help="log every write to --data-dir, synced never, every second, or before it returns (off)")  # fmt: skip
    p.add_argument("--log-buffer", metavar="SIZE", help="of the log, for each process, if it is created (by its size: 64K to 256K)")
    p.add_argument("--start-empty", action="store_true",
                   help="if what is in --data-dir cannot be restored, set it aside and start empty, instead of ending")  # fmt: skip
    p.add_argument("--snapshot-every", type=_positive, default=300.0, metavar="S", help="seconds (300); one more is written at the end")
    _snapshot_options(p)
    p.add_argument("--quiet", action="store_true", help="say nothing but errors")


def _run(args: argparse.Namespace, prog: str) -> int:
    try:
        return int(args.run(args))
    except (errors.SegmentNotFound, errors.SupervisorRunning, errors.SegmentExists, errors.SegmentForbidden, errors.DataDirInUse,
            errors.ForeignDataDir, errors.NoSnapshot, errors.NewerFormat, errors.CapacityError, errors.DamageError) as e:  # fmt: skip
        print(f"{prog}: {e}", file=sys.stderr)
        return 1
    except errors.ShmcacheError as e:
        print(f"{prog}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # no room, no right, a broken disk: of a data directory, or of what output goes to
        print(f"{prog}: {e}", file=sys.stderr)
        return 1


def admin(argv: Sequence[str] | None = None) -> int:
    """`shmcache-admin`"""
    return _run(admin_parser().parse_args(argv), "shmcache-admin")


def main(argv: Sequence[str] | None = None) -> int:
    """`shmcache`"""
    notices.never_wait()
    return _run(parser().parse_args(argv), "shmcache")


if __name__ == "__main__":
    sys.exit(main())
