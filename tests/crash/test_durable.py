"""The durability programs, as often as there is time for at every landing; each can be run by hand for longer."""

from __future__ import annotations

import json

import pytest

from tests.crash.test_unkillable import report_of, run


@pytest.mark.slow
def test_everything_killed():
    out = run("tests.crash.durable", "--rounds", "6", "--seed", "5")
    assert out.returncode == 0, out.stdout + out.stderr
    assert report_of(out)["writes"] > 100


@pytest.mark.slow
def test_everything_killed_everysec():
    out = run("tests.crash.durable", "--rounds", "2", "--policy", "everysec", "--seed", "6")
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "everysec"])
def test_power_cut(policy):
    out = run("tests.crash.powercut", "--cuts", "60", "--policy", policy, "--seed", "7")
    assert out.returncode == 0, out.stdout + out.stderr
    report = report_of(out)
    assert report["acknowledged"] > 50 and report["torn"] > 0


@pytest.mark.slow
def test_power_cut_sees_what_syncing_the_directory_is_for():
    out = run("tests.crash.powercut", "--cuts", "60", "--no-folder-sync", "--seed", "8")
    assert out.returncode == 1, out.stdout + out.stderr
    assert json.loads(out.stdout.splitlines()[-1])["wrong"] > 0


@pytest.mark.slow
def test_rotten_files():
    out = run("tests.crash.rot", "--flips", "500")
    assert out.returncode == 0, out.stdout + out.stderr
    report = report_of(out)
    assert report["truncations"] > 1000 and report["DamagedFile"] > 100
