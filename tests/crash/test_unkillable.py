"""The long crash programs, as often as there is time for at every landing; each can be run by hand for longer."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest

from tests import special
from tests.special import ROOT


def run(*module_and_args, timeout=600, build=None):
    if build is None:
        return subprocess.run([sys.executable, "-m", *module_and_args], cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    argv, env = special.command(build, *module_and_args)
    return subprocess.run(argv, env=env, cwd=build, capture_output=True, text=True, check=False, timeout=timeout)


def report_of(out):
    """The JSON object at the end, behind what it says of its findings; who was killed while it said one has not ended the line."""
    for at in (i for i, c in enumerate(out.stdout) if c == "{"):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(out.stdout[at:])
    raise AssertionError(out.stdout + out.stderr)


@pytest.mark.slow
def test_every_fault_point_of_every_operation():
    """Who dies there leaves nothing that others notice; every point is passed by some operation."""
    out = run("tests.crash.matrix", timeout=1200)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "failed: 0" in out.stdout


@pytest.mark.slow
def test_stopped_at_fault_points():
    """Who is stopped there is not robbed; readers go on, and writers but for what he holds."""
    names = ("set_replace", "set_first_of_class", "delete", "incr", "chain", "big_replace", "exec_several", "rename")
    out = run("tests.crash.matrix", "--stop", *(f"--only={name}" for name in names))
    assert out.returncode == 0, out.stdout + out.stderr
    assert "failed: 0" in out.stdout


@pytest.mark.slow
def test_storm():
    out = run("tests.crash.storm", "--kills", "500", "--seed", "1", "--longest", "5")
    assert out.returncode == 0, out.stdout + out.stderr
    assert report_of(out)["counted"] >= 500


@pytest.mark.slow
def test_storm_at_fault_points():
    """Deaths between any two stores, under load, in long chains: whatever can be left behind is, and is put in order."""
    out = run("tests.crash.storm", "--kills", "500", "--seed", "4", "--points", "0.7", "--crowd", "5", "--longest", "5")
    assert out.returncode == 0, out.stdout + out.stderr
    report = report_of(out)
    assert report["counted"] >= 500
    assert report["takeovers"] > 0
    assert all(report["repairs"].values()), report["repairs"]


@pytest.mark.slow
def test_storm_in_pid_namespaces():
    out = run("tests.crash.storm", "--kills", "100", "--seed", "2", "--pid-namespaces", "--longest", "5")
    if out.returncode == 77:
        pytest.skip("this machine allows no pid namespaces")
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-DSHMCACHE_NO_TAKEOVER", "-DSHMCACHE_NO_GENERATIONS"])
def test_the_storm_sees_what_liveness_is_for(flag):
    """With takeover compiled out, or with tokens that a reused row keeps, somebody waits for the dead, or a chunk is lost.

    All die together and most of them at a fault point, so that rows are reused while locks of the dead stand: some 500 kills do.
    """
    folder = special.build("-DSHMCACHE_FAULT_POINTS", flag)
    out = run("tests.crash.storm", "--kills", "20000", "--seed", "3", "--limit", "0.5", "--together", "1", "--points", "1", build=folder)
    assert out.returncode == 1, out.stdout + out.stderr
    report = report_of(out)
    assert report["stalls"] or report["chunks_lost"], report


@pytest.mark.slow
def test_storm_of_delays():
    """Processes that are slow, and live, at any point of any operation, and locks that are found busy: what each saw one register shows."""
    out = run("tests.stress.linear", "--seconds", "25", "--round", "3", "--seed", "5")
    assert out.returncode == 0, out.stdout + out.stderr
    report = report_of(out)
    assert report["checked"] >= 10_000
    assert report["clears"] >= report["rounds"]
    assert 0 < report["strict"] < report["rounds"], "rounds with and without evictions"
    assert report["delayed"] > 0 and report["forced_busy"] > 0, report


@pytest.mark.slow
def test_the_storm_of_delays_sees_what_versions_are_for():
    """With readers that trust what they copied somebody is given a torn, foreign or old value."""
    folder = special.build("-DSHMCACHE_FAULT_POINTS", "-DSHMCACHE_NO_VERSION_CHECK")
    out = run("tests.stress.linear", "--kind", "tight", "--focus", "read: to be copied", "--seconds", "10", "--round", "3", build=folder)
    assert out.returncode == 1, out.stdout + out.stderr
    assert report_of(out)["wrong"] > 0


@pytest.mark.slow
def test_fuzz():
    out = run("tests.crash.fuzz", "--ops", "60000", "--seed", "100")
    assert out.returncode == 0, out.stdout + out.stderr
    report = report_of(out)
    assert report["ops"] >= 60_000
    assert all(of["hits"] > 400 for of in report["sections"].values())
