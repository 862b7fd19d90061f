"""The benches' arithmetic: who is run when, and what is divided by what."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import harness

BENCH = Path(harness.__file__).parent


def test_peers_alternate_and_the_first_round_is_dropped():
    order = []
    times = harness.alternate([("a", lambda x: order.append(("a", x))), ("b", lambda x: order.append(("b", x)))], lambda r: [r], 2)
    assert order == [(p, r) for r in range(3) for p in "ab"]
    assert [len(t) for t in times.values()] == [2, 2]


def test_loop_divides_by_the_calls():
    ticks = iter([100, 1100])
    assert harness.loop_ns(lambda _: None, range(10), lambda: next(ticks)) == 100


def test_ratio_is_of_medians():
    s = harness.summary({"shmcache": [1.0, 50.0, 3.0], "peer": [6.0, 6.0, 60.0]})
    assert s["peer"]["ours_over_it"] == 0.5
    assert s["shmcache"]["median_ns"] == 3


def test_fresh_keys_are_new_objects():
    keys = [b"abc", b"def"]
    drawn = harness.fresh(keys, 100, 1)
    assert set(drawn) == set(keys)
    assert len({id(k) for k in drawn}) == 100


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_usage_names_is_taken(path):
    """Numbers where numbers are read: --size 1G is none."""
    tree = ast.parse(path.read_text())
    types = {
        call.args[0].value: kind.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument" and isinstance(call.args[0], ast.Constant)
        for kind in [word.value for word in call.keywords if word.arg == "type"]
        if isinstance(kind, ast.Name)
    }
    for option, value in re.findall(r"(--[\w-]+) ([^\s\]]+)", ast.get_docstring(tree) or ""):
        if types.get(option) in ("int", "float") and value[0].isdigit():
            {"int": int, "float": float}[types[option]](value)
