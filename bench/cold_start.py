"""What does a worker pay for `import shmcache`, attach and a first get, over a bare interpreter, in time and private memory?

    python bench/cold_start.py [--json bench/results/cold_start.json]

Interpreters are started by turns, bare and with shmcache, of which a copy comes first on the path (an editable install's finders would
count as ours); medians. Private memory is the child's own reading of Private_Clean +
Private_Dirty at its end; the segment is shared and not in it, but for what this process's page tables and row touch.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import environment, options

import shmcache

TAIL = """
kb = sum(int(line.split()[1]) for line in open('/proc/self/smaps_rollup') if line.startswith(('Private_Clean', 'Private_Dirty')))
print(kb, (time.perf_counter_ns() - began) / 1e6)
"""
BARE = "import time; began = time.perf_counter_ns()" + TAIL
OURS = (
    "import time; began = time.perf_counter_ns(); import shmcache; "
    "cache = shmcache.attach({name!r}); assert cache.get(b'k') == b'v'"
)
OURS += TAIL


def child(code: str, path: str) -> tuple[float, float]:
    """(private KiB, ms from just before the import to just after the get)"""
    env = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/", env=env)
    kb, ms = out.stdout.split()
    return float(kb), float(ms)


def main() -> int:
    args = options(__doc__ or "").parse_args()
    rounds = 5 if args.quick else max(15, args.rounds)
    name = f"bench-cold-{os.getpid()}"
    with shmcache.create(name, "64M") as cache, tempfile.TemporaryDirectory() as path:
        shutil.copytree(Path(shmcache.__file__).parent, Path(path) / "shmcache")
        compileall.compile_dir(path, quiet=1)  # as an installer does
        try:
            cache.set(b"k", b"v")
            children = {"bare": BARE, "shmcache": OURS.format(name=name)}
            taken: dict[str, list[tuple[float, float]]] = {which: [] for which in children}
            for r in range(rounds + 1):
                for which, code in children.items():
                    got = child(code, path)
                    if r:
                        taken[which].append(got)
        finally:
            shmcache.unlink(name)
    median = {w: [statistics.median(x[i] for x in xs) for i in range(2)] for w, xs in taken.items()}
    result: dict[str, Any] = {
        "time_ms": round(median["shmcache"][1] - median["bare"][1], 2),
        "private_mb": round((median["shmcache"][0] - median["bare"][0]) / 1024, 2),
        "bare_private_mb": round(median["bare"][0] / 1024, 2),
        "rounds": rounds,
    }
    print(f"import, attach, first get: {result['time_ms']:.2f} ms and {result['private_mb']:.2f} MB private over a bare interpreter")
    if args.json:
        Path(args.json).write_text(json.dumps({"environment": environment(), "cases": {"cold_start": result}}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
