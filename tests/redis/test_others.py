"""The runner of other projects' tests: what it reads from their reports, and how that is held against what is denied."""

from __future__ import annotations

import hashlib
import tarfile

import pytest

from tests.redis import expected, others

REPORT = """\
<testsuites><testsuite name="x">
<testcase classname="tests.test_a.TestOne" name="test_good" time="0.1"/>
<testcase classname="tests.test_a.TestOne" name="test_hget[a-[b]]"><failure message="short">at length</failure></testcase>
<testcase classname="tests.test_a.TestOne" name="test_hset"><error message="unknown command"/></testcase>
<testcase classname="tests.test_a.TestOne" name="test_ends_badly"/>
<testcase classname="tests.test_a.TestOne" name="test_ends_badly"><error message="teardown"/></testcase>
<testcase classname="tests.test_a.TestOne" name="test_new"><skipped type="pytest.skip" message="7.2 is needed"/></testcase>
<testcase classname="" name="test_bare"/>
</testsuite></testsuites>
"""


@pytest.fixture
def outcome(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    return others.read(tmp_path / "report.xml")


def test_a_report_is_read(outcome):
    assert outcome.passed == ["tests.test_a.TestOne.test_good", "test_bare"]
    assert outcome.failed == {
        "tests.test_a.TestOne.test_hget[a-[b]]": "at length",
        "tests.test_a.TestOne.test_hset": "unknown command",
        "tests.test_a.TestOne.test_ends_badly": "teardown",
    }
    assert outcome.skipped == {"tests.test_a.TestOne.test_new": "7.2 is needed"}


DENIALS = {"*.test_hget[a-[b]] *.test_hset": "needs hashes", "*.test_ends_badly": "needs sets"}


@pytest.mark.parametrize(
    ("denials", "failed", "wrong", "stale"),
    [
        (DENIALS, 0, 0, []),
        ({}, 3, 0, []),
        ({"tests.test_a.*": "x"}, 0, 1, []),
        ({**DENIALS, "test_bare": "x"}, 0, 1, []),
        ({**DENIALS, "*.test_new": "x"}, 0, 0, []),
        ({**DENIALS, "test_gone *.test_h": "x"}, 0, 0, ["test_gone", "*.test_h"]),
        ({"*.test_h*": "x"}, 1, 0, []),
    ],
)
def test_what_is_denied_has_to_fail_and_all_else_to_pass(outcome, denials, failed, wrong, stale):
    others.compare(outcome, denials, whole=True)
    assert (len(outcome.failed), len(outcome.wrong), outcome.stale) == (failed, wrong, stale)
    assert len(outcome.passed) + len(outcome.failed) + len(outcome.denied) + len(outcome.wrong) == 5
    assert outcome.good == (not failed and not wrong and not stale)


def test_of_a_part_no_denial_is_missed(outcome):
    others.compare(outcome, {**DENIALS, "test_gone": "x"}, whole=False)
    assert outcome.good
    assert set(outcome.denied.values()) == {"needs hashes", "needs sets"}


def test_nothing_that_passes_is_not_good():
    assert not others.Outcome().good
    assert not others.Outcome(passed=["a"], aborted="longer than 1 s").good
    assert others.Outcome(passed=["a"]).good


def test_a_source_that_is_not_what_was_published(tmp_path, monkeypatch):
    archive = tmp_path / "x-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__, "x-1/test_x.py")
    suite = others.Suite("x", "1", hashlib.sha256(archive.read_bytes()).hexdigest(), "", "", "")
    assert (others.fetch(suite, tmp_path) / "test_x.py").exists()
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(others.Altered, match="SHA-256"):
        others.fetch(suite, tmp_path)


def test_what_is_denied_is_of_suites_that_are_run():
    assert {name.partition(" ")[0] for name in expected.OTHERS} <= set(others.SUITES)
    for denials in expected.OTHERS.values():
        names = [name for names in denials for name in names.split()]
        assert len(names) == len(set(names))
