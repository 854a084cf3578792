"""Every kernel compiles for GPUs without one, and fits them."""

import json
import os
import re
import subprocess
import sys

import pytest

from bench import aot
from bench.harness import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_compiles_and_fits(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    done = run("--targets", target, "--dtypes", "bfloat16", "--record", str(tmp_path / "aot.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "aot.json").read_text())["kernels"]
    assert {kernel["target"] for kernel in found} == {target} and all(kernel["registers"] > 0 for kernel in found)
    sources = "".join(path.read_text() for path in (ROOT / "csrc_triton").rglob("*.py"))
    kernels = {name.strip("_").removesuffix("_kernel") for name in re.findall(r"\ndef (\w+_kernel)\(", sources)}
    assert kernels, "no kernels found in csrc_triton"
    assert kernels - {kernel["name"] for kernel in found} == set(), "kernels that no call of aot.py launches"


def test_a_kernel_over_its_budget_is_refused():
    small = aot.Kernel("k", "float32", "sm_90", 64, 0, 1024, 4, 2, "")
    assert small.fits
    assert not aot.Kernel("k", "float32", "sm_90", 255, aot.SPILL_BYTES + 1, 1024, 4, 2, "").fits
    assert not aot.Kernel("k", "float32", "sm_86", 64, 0, 101377, 4, 2, "").fits


def test_unknown_target():
    with pytest.raises(ValueError, match="target"):
        aot.inspect("sm_20")


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), aot.compiling("sm_90"):
        pass
