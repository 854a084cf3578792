"""The tests for a GPU run on a CPU too, tiny and interpreted: no first minute on a GPU is spent on typos."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import small_cases
from tests.repo.docs_check import ROOT


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run for real here")
def test_rehearsal_passes(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_suite", "--dry-run", "--stages", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counts = json.loads((tmp_path / "summary.json").read_text())["tests"]
    assert set(counts) == {"truth", "behaviour", "ranks"}
    for name, ran in counts.items():
        assert (ran["failures"], ran["errors"], ran["skipped"], ran["failed"]) == (0, 0, 0, []), name
    assert counts["truth"]["tests"] >= 36 and counts["behaviour"]["tests"] >= 28


def test_small_cases_launch_every_kernel(launches):
    sources = "".join(path.read_text() for path in Path(ROOT / "csrc_triton").rglob("*.py"))
    kernels = set(re.findall(r"\ndef (\w+_kernel)\(", sources))
    for name in small_cases.CASES:
        small_cases.run(name)
    assert kernels and kernels - set(launches) == set()
