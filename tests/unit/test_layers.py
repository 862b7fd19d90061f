"""Which file imports which: every arrow is declared, and points down but for those that are named here. The maps are of the files. And what a
worker pays for at its first get stays small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmcache

ROOT = Path(shmcache.__file__).parent

# module -> what it imports of ours, at its head or in a function, by import or cimport | for annotations only. Modules stand above what they
# import; ^: that one stands above. A .pyx and its .pxd are one module, a package's name is its __init__.
TREE = """
supervisor ->
stores.function -> core._core errors stores
sidecar.metrics -> cache metrics notices sidecar.bus
sidecar -> sidecar.embedded
sidecar.embedded -> cache errors sidecar.server | policy stores
core ->
cli -> __init__ core._sweep errors metrics notices segment sidecar.acl sidecar.serve stores supervisor.appendlog
    supervisor.datadir supervisor.dump supervisor.format supervisor.loop supervisor.refused supervisor.snapshot
supervisor.dump -> codec core._core core._stream errors namespace supervisor.format | cache
metrics ->
sidecar.serve -> cache errors notices segment sidecar.bus sidecar.server sidecar.worker
sidecar.worker -> errors notices sidecar.acl sidecar.bus sidecar.server stores
sidecar.server -> cache core._core core._resp core._text notices sidecar.acl sidecar.backed sidecar.bus sidecar.commands
    sidecar.commands.connection sidecar.commands.pubsub sidecar.commands.scripting sidecar.commands.transactions | stores
sidecar.backed -> core._claims core._core core._resp core._text errors sidecar.commands.table sidecar.commands.transactions
    stored stores through | ^sidecar.server
sidecar.bus -> core._core core._resp sidecar.acl | ^sidecar.server
sidecar.commands -> sidecar.commands.acl sidecar.commands.bits sidecar.commands.connection sidecar.commands.everywhere
    sidecar.commands.info sidecar.commands.keys sidecar.commands.leases sidecar.commands.pubsub sidecar.commands.scripting
    sidecar.commands.server sidecar.commands.strings sidecar.commands.table sidecar.commands.transactions
sidecar.commands.leases -> sidecar.commands.table sidecar.replies | ^sidecar.server
sidecar.commands.server -> core._core core._sweep core._text sidecar.acl sidecar.commands.everywhere sidecar.commands.keys
    sidecar.commands.table sidecar.replies | ^sidecar.server
sidecar.commands.scripting -> core._core core._resp errors notices sidecar.commands.pubsub sidecar.commands.table
    sidecar.commands.transactions sidecar.replies sidecar.undeclared | ^sidecar.server
sidecar.undeclared -> core._core core._resp errors sidecar.commands.table sidecar.commands.transactions sidecar.replies |
    ^sidecar.server
sidecar.commands.strings -> core._text sidecar.commands.table sidecar.replies | ^sidecar.server
sidecar.commands.acl -> errors sidecar.acl sidecar.commands.everywhere sidecar.commands.table sidecar.replies |
    ^sidecar.server
sidecar.commands.keys -> core._core core._resp core._text errors sidecar.commands.table sidecar.replies | ^sidecar.server
sidecar.commands.bits -> core._text sidecar.commands.table sidecar.commands.transactions sidecar.replies | ^sidecar.server
sidecar.commands.info -> __init__ sidecar.commands.everywhere sidecar.commands.pubsub sidecar.commands.table sidecar.replies
    | ^sidecar.server
sidecar.commands.connection -> core._core core._text sidecar.acl sidecar.commands.everywhere sidecar.commands.pubsub
    sidecar.commands.table sidecar.commands.transactions sidecar.replies | ^sidecar.server
sidecar.commands.everywhere -> | ^sidecar.server
sidecar.commands.transactions -> core._core core._text sidecar.acl sidecar.commands.pubsub sidecar.commands.table
    sidecar.replies | ^sidecar.server
sidecar.commands.pubsub -> core._text sidecar.commands.table sidecar.replies | sidecar.acl ^sidecar.server
supervisor.loop -> core._stream core._sweep errors notices supervisor.appendlog supervisor.snapshot supervisor.writeback |
    cache stores
supervisor.writeback -> codec core._core core._dirty errors notices policy segment stores supervisor.batch
    supervisor.datadir supervisor.refused | cache
supervisor.snapshot -> cache core._stream errors segment supervisor.appendlog supervisor.datadir supervisor.format
supervisor.appendlog -> core._core core._stream errors notices supervisor.datadir supervisor.format | cache
core._stream -> core._core core.atomics core.big core.bucket core.clock core.layout core.lock core.record core.ring
    core.siphash core.slab core.table core.token errors
notices ->
supervisor.datadir -> core._core core._dirty errors segment supervisor.format | cache
supervisor.refused -> core._core core._dirty errors stores supervisor.batch | cache
supervisor.batch -> | core._dirty
sidecar.acl -> core._text errors sidecar.commands.table sidecar.elsewhere sidecar.replies supervisor.format
supervisor.format -> errors
sidecar.elsewhere ->
sidecar.commands.table -> core._core core._resp core._text sidecar.replies | ^sidecar.server
sidecar.replies ->
core._text -> core.number
core._resp -> core._core core.atomics core.bucket core.clock core.databases core.dirty core.envelope core.layout core.lock
    core.number core.ring core.siphash core.sizes core.table core.token errors
core.number ->
aio -> cache core._claims core._core errors flight segment threads
threads -> core._claims core._core errors
__init__ -> cache errors segment supervisor.start | ^aio policy stores ^stores.function stores.sql
supervisor.start -> cache core._core errors
back -> codec core._claims core._core errors flight stored
cache -> ^back codec core._core core._sweep errors flight memoize namespace policy segment through | core._claims stores
stored -> ^cache codec core._claims core._core errors flight policy stores
through -> core._claims core._core errors flight ^stored stores
memoize -> canonical codec core._core errors flight | ^cache
canonical -> codec core._core errors
core._sweep -> core._core core.atomics core.big core.bucket core.clock core.dirty core.layout core.lock core.settle
    core.siphash core.sizes core.slab core.table core.token errors
core.sizes -> core.atomics core.bucket core.databases core.layout core.slab core.token
stores -> core._core errors stores.sql
stores.connections -> core._core errors ^stores stores.bounded
stores.sql -> codec core._core errors ^stores stores.columns ^stores.connections
stores.columns -> codec errors
stores.bounded -> core._core errors
policy -> core._core core._dirty errors segment | ^cache ^stores
core._dirty -> core._core core.atomics core.bucket core.clock core.dirty core.envelope core.layout core.lock core.siphash
    core.slab core.table core.token errors
segment -> core._core errors
namespace -> core._core errors flight | ^cache
flight -> codec core._claims core._core core.owner errors | ^cache
codec -> errors
core._claims -> core._core core.atomics core.layout core.lock core.siphash core.table core.token errors
core._core -> core.atomics core.big core.bucket core.clock core.dirty core.envelope core.layout core.lock core.owner
    core.ring core.siphash core.slab core.table core.token errors
core.owner ->
core.table -> core.atomics core.big core.bucket core.clock core.databases core.dirty core.envelope core.layout core.lock
    core.record core.ring core.settle core.siphash core.slab core.token
core.siphash ->
core.envelope ->
core.clock -> core.atomics core.big core.bucket core.layout core.lock core.settle core.slab core.token
core.settle -> core.atomics core.big core.bucket core.layout core.lock core.slab core.token
core.bucket -> core.atomics core.databases core.layout core.lock core.record core.ring core.slab core.token
core.ring -> core.atomics core.layout core.lock core.record core.token
core.record ->
core.databases -> core.atomics core.layout core.slab
core.big -> core.atomics core.layout core.slab core.token
core.dirty -> core.atomics core.layout core.slab
core.slab -> core.atomics core.layout core.lock core.token
core.lock -> core.atomics core.layout core.token
core.token -> core.atomics core.layout
core.layout ->
core.atomics ->
errors ->
"""

# Arrows up at run time: (from, to) -> why. There is to be none.
UP = {
    ("cache", "back"): "create() and attach() make the kind of cache that a policy wants",
    ("stored", "cache"): "the same: it is a Cache, and Cache.attach() may return it",
    ("through", "stored"): "the same",
    ("stores.connections", "stores"): "the errors of stores are in their package's __init__, which imports sql on demand",
    ("stores.sql", "stores"): "the same",
    ("stores.sql", "stores.connections"): "the same",
}

Arrows = dict[str, tuple[frozenset[str], frozenset[str]]]  # module -> (at run time, for annotations only)


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(path for pattern in ("*.py", "*.pyx", "*.pxd") for path in ROOT.rglob(pattern))
MODULES = {named(path) for path in FILES}


def module_of(name: str) -> set[str]:
    """Of a dotted name as it is imported: ours, or none."""
    within = name.partition(".")[2]
    return ({within or "__init__"} & MODULES) if name.partition(".")[0] == "shmcache" else set()


def of_python(path: Path) -> tuple[set[str], set[str]]:
    found: tuple[set[str], set[str]] = set(), set()

    def look(nodes: list[ast.stmt] | list[ast.AST], for_annotations: bool) -> None:
        for node in nodes:
            to = found[for_annotations]
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                look(node.body, True)
                look(node.orelse, for_annotations)
            elif isinstance(node, ast.Import):
                to.update(*(module_of(alias.name) for alias in node.names))
            elif isinstance(node, ast.ImportFrom) and node.module:
                to.update(*(module_of(f"{node.module}.{alias.name}") or module_of(node.module) for alias in node.names))
            else:
                look(list(ast.iter_child_nodes(node)), for_annotations)

    look(ast.parse(path.read_text()).body, False)
    return found


def of_cython(path: Path) -> set[str]:
    found: set[str] = set()
    text = path.read_text().replace("\\\n", " ")
    for module, names in re.findall(r"^ *from (shmcache[\w.]*) c?import ([^(\n#]+|\([^)]+\))", text, re.MULTILINE):
        for name in names.strip("()").split(","):
            found |= module_of(f"{module}.{name.split()[0]}") or module_of(module) if name.strip() else set()
    return found


def arrows() -> Arrows:
    run: dict[str, set[str]] = {name: set() for name in MODULES}
    shown: dict[str, set[str]] = {name: set() for name in MODULES}
    for path in FILES:
        name = named(path)
        if path.suffix == ".py":
            at_run_time, for_annotations = of_python(path)
            run[name] |= at_run_time
            shown[name] |= for_annotations
        else:
            run[name] |= of_cython(path)
    return {name: (frozenset(run[name] - {name}), frozenset(shown[name] - run[name] - {name})) for name in MODULES}


def declared() -> Iterator[tuple[str, list[str], list[str]]]:
    for line in re.sub(r"\n +", " ", TREE).strip().splitlines():
        name, _, imported = line.partition(" ->")
        run, _, shown = imported.partition("|")
        yield name, run.split(), shown.split()


def test_every_arrow_is_declared():
    found = arrows()
    tree = {name: (run, shown) for name, run, shown in declared()}
    assert tree.keys() == found.keys(), "give each file its line in TREE"
    for name, (run, shown) in found.items():
        for of, words in zip((run, shown), tree[name], strict=True):
            assert sorted(of) == sorted(word.removeprefix("^") for word in words), f"{name} imports these: say so in TREE, if it should"


def test_arrows_point_down():
    place = {name: i for i, (name, _, _) in enumerate(declared())}
    up = set()
    for name, run, shown in declared():
        for word in (*run, *shown):
            to = word.removeprefix("^")
            assert word.startswith("^") == (place[to] < place[name]), f"{name} -> {to}: ^ is of what stands above"
        up |= {(name, word[1:]) for word in run if word.startswith("^")}
    assert up == UP.keys()


@pytest.mark.parametrize("package", [path.parent for path in sorted(ROOT.rglob("__init__.py"))], ids=lambda path: path.name)
def test_a_packages_map_is_of_its_files(package):
    """In the docstring of its __init__ a line begins with each of its modules and folders, and with nothing else that looks like one."""
    there = {path.name + "/" * path.is_dir() for path in package.iterdir() if path.suffix in (".py", ".pyx") or path.is_dir()}
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    told = re.findall(r"^ *([a-z_]+(?:\.pyx?|/))  ", text, re.MULTILINE)
    assert sorted(told) == sorted(there - {"__init__.py", "__pycache__/"})


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
