"""Every benchmark runs: the first case of each file, all providers, results within their budgets, ratios printed."""

import os
import re
import subprocess
import sys

import pytest

from bench.harness import ROOT


@pytest.mark.slow
def test_every_benchmark_runs(record_property):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--smoke", "-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:]
    for line in re.findall(r"^ *\d+\.\d\d \(\d.*", done.stdout, re.M):
        record_property("times faster", line)  # printed when all tests have ended
    rows = re.findall(r"^ *\d+\.\d\d \(\d+\.\d\d \.\.\. \d+\.\d\d\)  (\S.*?)  +(\w+), ", done.stdout, re.M)
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert {op for _, op in rows} == files, "a file without a row"
    assert len(rows) > len(files)
