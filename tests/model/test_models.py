"""The models of this folder, by spin: each holds, and each with a flaw put back is refuted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("spin") is None or shutil.which("gcc") is None, reason="spin (Debian: apt-get install spin) or gcc is missing"),
]


def errors(folder, model, *flags):
    """Run one model exhaustively: the number of errors that spin's verifier counts, and what it said."""
    spin = subprocess.run(["spin", "-a", *flags, str(HERE / model)], cwd=folder, capture_output=True, text=True, check=False)
    assert spin.returncode == 0, spin.stdout + spin.stderr
    subprocess.run(["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=4096", "-o", "pan", "pan.c"], cwd=folder, check=True)
    pan = subprocess.run(["./pan", "-m1000000"], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert "max search depth too small" not in pan.stdout
    assert "out of memory" not in pan.stdout
    return int(pan.stdout.split("errors: ")[1].split()[0]), pan.stdout


HOLD = [
    ("lock.pml", "-DNP=2", "-DMAXD=1"),
    ("lock.pml", "-DNP=2", "-DMAXD=2"),
    ("lock.pml", "-DNP=3", "-DMAXD=0", "-DQUIET"),
    ("kept.pml",),
    ("page.pml",),
    ("big.pml",),
    ("overflow.pml",),
]
REFUTED = [
    ("lock.pml", "-DNP=2", "-DMAXD=1", "-DNOGEN"),
    ("lock.pml", "-DNP=2", "-DMAXD=1", "-DLIFEFIRST"),
    ("lock.pml", "-DNP=3", "-DMAXD=0", "-DQUIET", "-DNOKEEP"),
    ("lock.pml", "-DNP=3", "-DMAXD=0", "-DQUIET", "-DWORDFIRST"),
    ("kept.pml", "-DTWOSTEP"),
    ("page.pml", "-DNORECHECK"),
    ("big.pml", "-DNOHASH"),
    ("big.pml", "-DLATEWORD"),
    ("big.pml", "-DTWICE"),
    ("overflow.pml", "-DMOVE"),
    ("overflow.pml", "-DNOASK"),
]


@pytest.mark.parametrize("model", HOLD, ids=" ".join)
def test_model_holds(tmp_path, model):
    n, said = errors(tmp_path, *model)
    assert n == 0, said


@pytest.mark.parametrize("model", REFUTED, ids=" ".join)
def test_flaw_is_refuted(tmp_path, model):
    n, said = errors(tmp_path, *model)
    assert n > 0, said
