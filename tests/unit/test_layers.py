"""Imports point down the module map, and what a worker pays for at its first get stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import shmcache

ROOT = Path(shmcache.__file__).parent
ALLOWED = {  # module -> what of ours it may import
    "errors": set(),
    "codec": {"errors"},
    "core": {"errors", "core"},
    "segment": {"errors", "core"},
    "stores": {"errors", "codec", "core", "stores"},
    "canonical": {"errors", "codec", "core"},
    "flight": {"errors", "codec", "core", "cache"},  # cache for annotations only
    "memoize": {"errors", "codec", "core", "canonical", "flight", "cache"},  # cache for annotations only
    "namespace": {"errors", "core", "flight", "cache"},
    "cache": {"errors", "core", "segment", "codec", "flight", "memoize", "namespace", "policy", "stores", "through", "back"},  # memoize, namespace and the last four on demand
    "policy": {"errors", "core", "segment", "cache", "stores"},  # the last two for annotations only
    "stored": {"errors", "codec", "core", "cache", "policy", "flight", "stores"},
    "through": {"errors", "core", "cache", "flight", "stored", "stores"},
    "back": {"errors", "codec", "core", "flight", "stored"},
    "threads": {"errors", "core"},
    "aio": {"errors", "core", "segment", "cache", "flight", "threads"},
    "supervisor": {"errors", "codec", "core", "segment", "cache", "namespace", "policy", "stores", "notices", "supervisor"},
    "metrics": set(),
    "notices": set(),
    "sidecar": {"errors", "core", "segment", "cache", "metrics", "notices", "policy", "stored", "stores", "through", "supervisor", "sidecar"},
    "cli": {"errors", "core", "segment", "policy", "stores", "supervisor", "metrics", "notices", "sidecar"},
    "__init__": {"errors", "segment", "cache", "policy", "supervisor", "stores", "aio"},
}


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_arrows_point_down():
    for path in sorted(ROOT.rglob("*.py")):
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert layer in ALLOWED, f"{path.name}: give it a place in the map"
        for name in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "shmcache" and len(parts) > 1 and (ROOT / f"{parts[1]}.py").exists() | (ROOT / parts[1]).is_dir():
                assert parts[1] in ALLOWED[layer], f"{path.name} imports {name}"


def test_a_first_get_imports_no_heavy_module(cache):
    cache.set("k", "v")
    code = f"import sys, shmcache; assert shmcache.attach({cache.name!r}).get('k') == 'v'; print([m for m in ('numpy', 'msgpack', 'psutil', 'hashlib', 'subprocess', 'typing', 'shmcache.namespace', 'shmcache.stores', 'sqlalchemy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_deadline_is_by_a_clock_that_a_test_may_have_stopped():
    """freezegun and the like put another function in the place of time.monotonic(); cli, supervisor and serve measure, or are a process of their own."""
    for path in sorted(ROOT.rglob("*.py")):
        if (path.relative_to(ROOT).parts[0] in ("cli.py", "supervisor") and path.stem not in ("start", "writeback")) or path.stem == "serve":
            continue
        assert "time.monotonic()" not in path.read_text(), f"{path}: take _core.monotonic()"
