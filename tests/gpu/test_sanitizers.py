"""compute-sanitizer over a small case of every kernel: accesses out of bounds, and races in shared memory."""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import small_cases
from tests.gpu.calls import ON_GPU

ROOT = Path(__file__).resolve().parents[2]


def sanitizer() -> str | None:
    """On PATH, beside nvcc, or in one of NVIDIA's or Triton's wheels."""
    found = shutil.which("compute-sanitizer")
    places = [Path("/usr/local/cuda/bin"), Path(os.environ.get("CUDA_HOME", "/nowhere")) / "bin"]
    for packages in {*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))}:
        places += [Path(packages) / "triton" / "backends" / "nvidia" / "bin", *Path(packages).glob("nvidia/*/bin")]
    return found or next(
        (str(path / "compute-sanitizer") for path in places if (path / "compute-sanitizer").exists()), None
    )


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_cases_are_clean(tool):
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "small_cases.py")]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor a block of its own, with edges
    if ON_GPU:
        path = sanitizer()
        if path is None:
            pytest.skip("compute-sanitizer is neither on PATH nor in a wheel")
        environment["TRITON_INTERPRET"] = "0"
        command = [
            path,
            "--tool",
            tool,
            "--error-exitcode",
            "77",
            "--report-api-errors",
            "no",
            "--print-limit",
            "20",
            *command,
        ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    tail = (done.stdout + done.stderr)[-3000:]
    if "Device not supported" in tail:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, tail
    assert all(f"\n{name}\n" in f"\n{done.stdout}" for name in small_cases.CASES), tail
    if ON_GPU:
        assert re.search(r"(ERROR SUMMARY|RACECHECK SUMMARY): 0 ", done.stdout + done.stderr), tail
