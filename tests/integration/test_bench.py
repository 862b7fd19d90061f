"""The benches run, say what they left out, and write figures that the report can draw."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.special import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bench", "arguments", "case"),
    [
        ("ops", ("--vlens", "100"), "get/klen=22/vlen=100"),
        ("scaling", (), "one hot key/50/50"),
        ("tail", (), "beside two that spin"),
        ("growth", ("--items", "10000"), "get/keys=10000"),
        ("memory", (), "klen=22/vlen=100/size=64M"),
        ("cold_start", (), "cold_start"),
        ("snapshot", (), "restore/klen=22/vlen=100"),
        ("log", (), "set/klen=22/vlen=100"),
        ("sidecar", ("--parts", "rates"), "rates"),
    ],
)
def test_a_bench_runs_in_short(bench, arguments, case, tmp_path):
    out = tmp_path / "figures.json"
    argv = [sys.executable, f"bench/{bench}.py", "--quick", "--json", str(out), *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["environment"]["cpu"]
    assert case in figures["cases"]
    if bench == "ops":
        assert figures["cases"][case]["shmcache"]["median_ns"] > 0
        left_out = {note.split()[0] for note in figures["notes"]}
        peers = set(figures["cases"][case])
        assert len(peers) + len(left_out) >= 10, (peers, left_out)
