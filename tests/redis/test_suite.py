"""The runner of Redis' own tests: what it reads from their output, and, if their sources are there, a unit of them."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.redis import expected, suite

OUTPUT = """\
Starting test server at port 21079
[ready]: 123
Testing unit/x
[ok]: one (3 ms)
[skip]: not for us
[ignore]: of a replica: Tag: needs:repl denied
[err]: two: with a colon in tests/unit/x.tcl
Expected '1' to be equal to '2'
  and more
[ok]: three (with brackets) (0 ms)
[1/1 done]: unit/x (0 seconds)

                   The End

!!! WARNING The following tests failed:

*** [err]: two: with a colon in tests/unit/x.tcl
Expected '1' to be equal to '2'
"""


def test_output():
    result = suite.read("unit/x", OUTPUT, {"not for us": "needs lists", "of a replica": "needs replication", "gone": "needs lists"})
    assert result.passed == ["one", "three (with brackets)"]
    assert result.failed == {"two: with a colon": "Expected '1' to be equal to '2'\n  and more"}
    assert result.denied == {"not for us": "needs lists"}
    assert result.ignored == ["of a replica: Tag: needs:repl denied"]
    assert result.stale == ["gone"]
    assert result.aborted is None
    assert not result.good


@pytest.mark.parametrize(
    "end", ["", "[exception]: Executing test client: I/O error\n    while executing\n", "[TIMEOUT]: clients state report follows.\n"]
)
def test_a_unit_that_does_not_end(end):
    result = suite.read("unit/x", OUTPUT[: OUTPUT.index("[err]")] + end, {})
    assert result.aborted is not None
    assert not result.good


def test_what_is_expected_is_of_units_that_are_run():
    assert set(expected.DENIED) | set(expected.NEEDS) <= set(suite.UNITS)
    for unit, tests in expected.NEEDS.items():
        assert not set(tests) & set(expected.DENIED.get(unit, ()))


@pytest.fixture
def sources(monkeypatch):
    if not list(suite.cache().glob("redis-7.0.*")) or not shutil.which("tclsh") or not shutil.which("redis-server"):
        pytest.skip("the tests of redis 7.0 were not fetched yet (python -m tests.redis.suite), or tclsh or redis-server is missing")
    monkeypatch.setattr(suite, "become_reaper", lambda: None)  # that would stay so for this process


@pytest.mark.parametrize(
    ("options", "code", "figures"), [(["--lean"], 0, (23, 0, 2)), (["--lean", "--all"], 1, (23, 2, 0)), (["--port=1"], 1, (0, 0, 0))]
)
def test_a_unit(sources, capsys, options, code, figures):
    assert suite.main([*options, "--unit=unit/type/incr", "--json"]) == code
    report = json.loads(capsys.readouterr().out)["units"][0]
    assert tuple(len(report[k]) for k in ("passed", "failed", "denied")) == figures
    assert report["stale"] == []
    assert bool(report["aborted"]) == (options == ["--port=1"])
